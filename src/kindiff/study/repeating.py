"""Repeating a study: what its tables show is trained and scored again, each method at the rate that was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kindiff.study.config import Study
from kindiff.study.records import Record
from kindiff.study.tables import best_rows, markdown_grid, with_spread


def repetition(study: Study, records: Sequence[Record], work: Path) -> Study:
    """The study of the chosen rates alone, with all seeds; its records go below `work`, the study's own stay as they
    are. FileNotFoundError without a scored record."""
    chosen = {(row.task, row.method): row.lr for row in best_rows(records)}
    if not chosen:
        raise FileNotFoundError(
            f"{study.results} has no scored cell to repeat; `kindiff study run {study.folder}` makes them."
        )
    name = f"{study.name}-again"
    return replace(study, name=name, results=work / name / "results", chosen=chosen)


def compared(before: Sequence[Record], after: Sequence[Record]) -> str:
    """A table of the records before: distance and accuracy as they stand in the study and as they came again, and
    whether the two intervals of mean and spread meet; then how many do."""
    there = {(row.task, row.method): row for row in best_rows(before)}
    lines, met = [], 0
    # An earlier repetition may have been of other rates.
    chosen = {pair: row.lr for pair, row in there.items()}
    for row in best_rows([r for r in after if chosen.get((r.task, r.method)) == r.lr]):
        old = there[row.task, row.method]
        apart = abs(row.distance_mean - old.distance_mean)
        meets = apart <= sum(r.distance_spread for r in (old, row) if r.seeds > 1)  # one seed has no spread
        met += meets
        lines.append(
            (
                row.task,
                row.label,
                with_spread(old.distance_mean, old.distance_spread, 1),
                with_spread(row.distance_mean, row.distance_spread, 1),
                with_spread(old.accuracy_mean, old.accuracy_spread, 3),
                with_spread(row.accuracy_mean, row.accuracy_spread, 3),
                "yes" if meets else f"no, {apart:.1f} apart",
            )
        )
    distance = next(iter(there.values())).distance_name
    columns = ("task", "method", distance, "again", "accuracy", "again", "spreads meet")
    return (
        f"{markdown_grid(columns, lines)}\n\n{met} of {len(lines)} distances came again within their spreads."
    )
