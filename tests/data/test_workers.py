"""Child processes: results in order, failures reported, nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kindiff.data.workers import ordered_map

FUNCTIONS = """
import os, signal, time

def square(task):
    time.sleep(0.02 * (task % 3))
    return [task * task, os.getpid()], bytes([task]) * task

def fail_at_three(task):
    if task == 3:
        raise LookupError("task three is bad")
    return task, b""

def die_at_three(task):
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task, b""

def chatter(task):
    print("this must not fall into the results")
    return task, b"x" * 300_000
"""


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(workers: int) -> None:
    results = list(ordered_map("some_functions:square", range(12), workers=workers))
    assert [value[0] for value, _ in results] == [n * n for n in range(12)]
    assert [payload for _, payload in results] == [bytes([n]) * n for n in range(12)]
    pids = {value[1] for value, _ in results}
    assert (pids == {os.getpid()}) if workers == 1 else (1 < len(pids) <= 3 and os.getpid() not in pids)


def test_a_failure_in_a_child_is_raised_here() -> None:
    results = ordered_map("some_functions:fail_at_three", range(8), workers=2)
    assert [next(results)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="task three is bad"):
        next(results)


def test_a_child_that_dies_is_reported() -> None:
    with pytest.raises(RuntimeError, match="worker process ended early"):
        list(ordered_map("some_functions:die_at_three", range(8), workers=2))


def test_prints_and_long_results(capfd: pytest.CaptureFixture[str]) -> None:
    results = list(ordered_map("some_functions:chatter", range(4), workers=2))
    assert [(value, len(payload)) for value, payload in results] == [(n, 300_000) for n in range(4)]
    assert capfd.readouterr().out == ""


def test_stopping_early_ends_the_children() -> None:
    results = ordered_map("some_functions:square", range(100), workers=2)
    (_, pid), _ = next(results)
    results.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def start(script: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_interrupts_reach_the_parent_alone() -> None:
    """A parent that takes Ctrl-C its own way loses no child to it."""
    parent = start(
        "import signal\n"
        "from kindiff.data.workers import ordered_map\n"
        "signal.signal(signal.SIGINT, lambda *_: print('asked', flush=True))\n"
        "for (square, _), _ in ordered_map('some_functions:square', range(60), workers=2):\n"
        "    print(square, flush=True)\n"
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "0\n"
    os.killpg(parent.pid, signal.SIGINT)
    out, err = parent.communicate(timeout=30)
    assert (parent.returncode, err) == (0, "")
    assert "asked" in out
    assert out.endswith("3481\n")


def test_children_end_when_the_parent_is_killed() -> None:
    script = (
        "from kindiff.data.workers import ordered_map\n"
        "for (_, pid), _ in ordered_map('some_functions:square', range(10**6), workers=2):\n"
        "    print(pid, flush=True)\n"
    )
    parent = start(script)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and time.monotonic() < deadline:
        state = Path(f"/proc/{pid}/stat").read_text().split()[2]
        if state == "Z":  # ended; whoever adopted it has not asked yet
            return
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
