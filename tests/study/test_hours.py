"""The studies' hours: measured parts times what the records say was done (the figures: benchmarks/study_hours.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small import record, write_study

from kindiff.study.records import write_record
from toys import one_thread

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_hours_are_parts_times_what_was_done(tmp_path, monkeypatch):
    monkeypatch.setenv("KINDIFF_CACHE", str(tmp_path / "cache"))
    study, out = write_study(tmp_path), tmp_path / "hours.json"
    for lr in (0.001, 0.003, 0.01, 0.03):
        write_record(study / "results", record("kind", lr, validation=lr, test=5.0 if lr == 0.001 else None))
    write_record(study / "results", record("kind", 0.001, seed=1, test=6.0))
    write_record(study / "results", record("gone", 0.001, test=6.0))  # of a method that the study has no more
    few = ["--methods", "kind", "--steps", "2", "--per-class", "2"]
    command = [sys.executable, "benchmarks/study_hours.py", *few, "--studies", str(study), "--out", str(out)]
    said = subprocess.run(
        command, cwd=ROOT, env=one_thread(), check=True, capture_output=True, text=True
    ).stdout
    found = json.loads(out.read_text())
    assert set(found["parts"]["small"]) == {"kind"}
    assert set(found["bases"]) == {"kind"}
    part, base, (row,) = found["parts"]["small"]["kind"], found["bases"]["kind"], found["rows"]
    assert all(seconds > 0 for seconds in (part["step"], part["start"], base["step"], base["start"]))
    training = part["start"] + 4 * part["step"]  # 4 steps and 8 images are what small's records say
    score = part["score"] + 8 * part["image"]
    assert row["hours"] == pytest.approx({"trainings": 5 * training / 3600, "scores": 6 * score / 3600})
    assert row["again"] == pytest.approx({"trainings": 2 * training / 3600, "scores": 2 * score / 3600})
    assert found["pretraining"] == pytest.approx((base["start"] + 6 * base["step"]) / 3600)
    assert found["hours"]["again"] == pytest.approx(sum(row["again"].values()) + found["pretraining"])
    assert "of 2 side by side" in said
