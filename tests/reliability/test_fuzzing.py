"""The fuzz harness sees what it is there for; some thousand guided inputs where atheris is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kindiff.errors import BadFileError
from toys import one_thread

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def fuzzing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fuzzing

    monkeypatch.setattr(fuzzing, "SECONDS", 0.2)
    return fuzzing


def crash(path: Path) -> None:
    raise KeyError(path.name)


def wait(path: Path) -> None:
    began = time.process_time()
    while time.process_time() - began < 30:
        pass


def hoard(path: Path) -> None:
    bytearray(4 * 2**20)


def refuse(path: Path) -> None:
    raise BadFileError("one sentence")


def refuse_twice(path: Path) -> None:
    raise BadFileError("one line\nand another")


@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (crash, "KeyError at"), (wait, "_TooLongError"), (hoard, "bytes above twice the file"),
        (refuse_twice, "several lines"), (refuse, ""), (len, "TypeError at"),
    ],
)  # fmt: skip
def test_each_sort_of_fault_is_seen(fuzzing, tmp_path: Path, read, fault: str) -> None:
    watch = fuzzing.Watch(tmp_path)
    watch.read(fuzzing.Target("x.json", "json", read, 1), b"{}", traced=True)
    facts = watch.end()
    assert [fault in f for f in facts["faults"]] == [True] * bool(fault)
    assert facts["inputs"] == {"x.json": 1}


@pytest.mark.slow
def test_guided_inputs_hold(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    command = [
        sys.executable,
        BENCHMARKS / "guided_fuzzing.py",
        "--inputs",
        "10000",
        "--work",
        tmp_path / "work",
    ]
    command += ["--targets", "headers.safetensors", "recipe.toml", "hierarchy.tsv", "images/manifest.json"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "fuzz.json"],
        env=one_thread(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((tmp_path / "fuzz.json").read_text())
    assert facts["inputs"] >= 10_000
    assert facts["faults"] == 0
    for target in facts["targets"].values():
        assert target["kept_for_their_coverage"] > 10  # it is guided: what reaches new code is kept
