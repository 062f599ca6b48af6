"""The tables of the documents are what the commands print from the committed records."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def fill(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "studies/fill.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_table_is_what_its_command_prints(tmp_path) -> None:
    for document in ("README.md", "docs/results.md"):
        done = fill("--check", document)
        assert done.returncode == 0, done.stderr
    text = (ROOT / "docs" / "results.md").read_text()
    assert text.count("<!-- $ kindiff") == text.count("<!-- end -->") >= 2
    other = tmp_path / "results.md"
    other.write_text(text.replace("| full fine-tuning |", "| full fine-tuning, better |", 1))
    assert fill("--check", str(other)).returncode == 1  # a figure that no command makes is found


def test_no_record_names_a_place_of_one_machine() -> None:
    records = list(ROOT.glob("studies/*/results/*.json"))
    assert records
    assert [path.name for path in records if '"/' in path.read_text()] == []
