"""The benchmarks still run: each at its smallest, for the sake of its code; no time is looked at."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kindiff.runtime import precision_on

ROOT = Path(__file__).parents[1]
FAST = precision_on(torch.device("cpu"), "auto")
"""Without bf16 in hardware, a block in it takes minutes."""
COMMANDS = (
    "speed.py blocks --quick --rounds 1",
    "speed.py classes --quick --rounds 1",
    "speed.py products --quick --rounds 1",
    "speed.py sweep --quick --rounds 1",
    "models.py steps --model DiT-T --rounds 1",
    "models.py sampling --model DiT-T --rounds 1",
    "models.py profile --model DiT-T --rounds 1",
    "strategies.py --rounds 1 --images 4 --tokens 16",
)


@pytest.mark.slow
def test_the_allocators_benchmark_runs(tmp_path: Path) -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")
    few = ["--models", "DiT-T", "--modes", "sample", "--batch", "1", "--steps", "1", "--processes", "1"]
    out = tmp_path / "figures.json"
    subprocess.run([sys.executable, "benchmarks/allocator.py", *few, "--out", str(out)], cwd=ROOT, check=True)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["variant"], row["leave / keep"] > 0) for row in rows] == [("dense", True), ("kind", True)]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_runs_and_writes_its_figures(tmp_path: Path, command: str) -> None:
    script, *arguments = command.split()
    out = tmp_path / "figures.json"
    called = [sys.executable, f"benchmarks/{script}", *arguments, "--device", "cpu", "--precision", FAST]
    called += ["--out", str(out)]
    done = subprocess.run(called, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"versions", "hardware"} < json.loads(out.read_text()).keys()
