"""What long work says of its pace and its end where there is no terminal."""

from __future__ import annotations

import pytest

from kindiff import progress


@pytest.mark.parametrize(
    ("total", "unit", "done", "line"),
    [
        (4000, "images", 100, "work: 100/4000 images  loss 2  5 images/s, about 13.0 minutes left"),
        (8, "cells", 1, "work: 1/8 cells  loss 2  180 cells/hour, about 2.3 minutes left"),
    ],
)
def test_a_line_says_pace_and_time_left_in_units_that_fit(monkeypatch, capsys, total, unit, done, line):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.Track("work", total, unit=unit) as track:
        track.note = "loss 2"
        now = 20.0
        track.advance(done)
        now = 7200.0
        track.done = total
    assert capsys.readouterr().err.splitlines() == [line, f"work: {total}/{total} {unit}, done in 2.0 hours"]


def test_a_duration_is_in_the_largest_unit_that_it_fills():
    found = [progress.duration(s) for s in (0.4, 59.0, 90.0, 5400.0, 200_000.0)]
    assert found == ["0 seconds", "59 seconds", "1.5 minutes", "1.5 hours", "2.3 days"]
