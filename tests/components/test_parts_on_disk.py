"""Extracting one class reads and holds little more than what is written (the figures: benchmarks/parts_on_disk.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from toys import one_thread

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "parts_on_disk.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system keeps no count of bytes read")
def test_one_class_of_many_reads_and_holds_its_own_size(tmp_path: Path) -> None:
    command = [
        sys.executable,
        BENCHMARK,
        "--work",
        tmp_path,
        "--out",
        tmp_path / "out.json",
        "--repeats",
        "1",
    ]
    command += ["--preset", "DiT-S/4", "--classes", "20"]
    subprocess.run(command, env=one_thread(), check=True, capture_output=True)
    facts = json.loads((tmp_path / "out.json").read_text())
    for row in facts["rows"]:
        if row["what"] == "image":
            assert row["seconds_to_first_image"] > 0
            continue
        assert 0 < row["asked_bytes"] <= 1.1 * row["output_bytes"], row
        assert row["disk_bytes"] <= 1.1 * row["output_bytes"], row
        assert 0 < row["peak_bytes"] <= 1.5 * row["output_bytes"], row
