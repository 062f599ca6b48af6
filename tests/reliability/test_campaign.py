"""The fault campaign in its short form (`make faults` runs the long one)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from toys import one_thread

CAMPAIGN = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.mark.slow
def test_the_short_campaign_holds(tmp_path: Path) -> None:
    command = [sys.executable, CAMPAIGN, "--short", "--out", tmp_path / "faults.json"]
    done = subprocess.run(command, env=one_thread(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    parts = json.loads((tmp_path / "faults.json").read_text())["parts"]
    assert all(part["complete"] and part["done"] == part["held"] > 0 for part in parts.values())
    assert parts["kill_operations"]["seen"].keys() >= {"at_write", "at_sync", "at_rename"}
    assert parts["fuzz"]["seen"]["inputs"] >= 3000
