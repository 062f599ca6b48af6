"""Tables and figures of a study's report, made of rows and records alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from kindiff.report.charts import Axis, Series, chart
from kindiff.report.page import Cell, sortable
from kindiff.report.svg import short
from kindiff.study.records import Record
from kindiff.study.report_words import FAMILIES, accuracy, budgets, distance, verdict
from kindiff.study.tables import Row


def colour(family: str) -> int:
    """The page's colour of a sort of methods."""
    return list(FAMILIES).index(family) if family in FAMILIES else len(FAMILIES) - 1


def winners(tasks: Mapping[str, Sequence[Row]], labels: Mapping[str, str], *, sides: bool) -> str:
    """Who is first on each task, against the next one; with sides, KIND against its rivals, also within each group of
    like numbers of trained parameters."""
    lines: list[list[str | Cell]] = []
    for task, rows in tasks.items():
        groups = {"any": list(rows), **(budgets(rows) if sides else {})}
        for group, own in groups.items():
            found = verdict(own, sides=sides)
            if found is None:
                continue
            first, second = found.first, found.second
            lines.append(
                [
                    labels.get(task, task),
                    group,
                    Cell(text=first.label, key=colour(first.family)),
                    _number(distance(first), first.distance_mean),
                    Cell(text=second.label, key=colour(second.family)),
                    _number(distance(second), second.distance_mean),
                    _number("" if math.isnan(found.spreads) else f"{found.spreads:.1f}", found.spreads),
                    _number(_plain(first.floor, 3), first.floor),
                ]
            )
    name = next(iter(tasks.values()))[0].distance_name
    return sortable(("task", "trained", "first", name, "against", name, "gap in spreads", "floor"), lines)


def task_table(rows: Sequence[Row]) -> str:
    """Every method of a task at its best rate."""
    lines: list[list[str | Cell]] = [
        [
            Cell(text=row.label, key=colour(row.family)),
            _number(distance(row), row.distance_mean),
            _number(accuracy(row), row.accuracy_mean),
            _number(_plain(row.precision_mean, 2), row.precision_mean),
            _number(_plain(row.recall_mean, 2), row.recall_mean),
            Cell(text=f"{row.trainable:,}", order=row.trainable),
            Cell(text=f"{row.gmacs:.4f}", order=row.gmacs),
            _rate(row),
            Cell(text=str(row.seeds), order=row.seeds),
        ]
        for row in rows
    ]
    columns = (
        "method", rows[0].distance_name, "accuracy", "precision", "recall", "trained parameters", "GMACs",
        "learning rate", "seeds",
    )  # fmt: skip
    marked = [i for i, row in enumerate(rows) if row.family == "kind"]
    return sortable(columns, lines, marked=marked)


def paretos(rows: Sequence[Row], records: Sequence[Record]) -> list[str]:
    """Distance against each cost in which the methods differ: trained parameters, GMACs, parameters in total."""
    sizes = {r.method: float(r.parameters) for r in records if r.task == rows[0].task}
    costs = (
        ("trained parameters", {row.method: float(row.trainable) for row in rows}),
        ("GMACs of one forward pass", {row.method: row.gmacs for row in rows}),
        ("parameters in total", sizes),
    )
    return [
        pareto(rows, against, what)
        for what, against in costs
        if len({against[row.method] for row in rows}) > 1
    ]


def pareto(rows: Sequence[Row], against: Mapping[str, float], what: str) -> str:
    """Distance against a cost of each method, with the front that no other method beats in both."""
    series = [
        Series(
            name=row.label,
            points=[(against[row.method], row.distance_mean)],
            spreads=[_known(row.distance_spread)],
            colour=colour(row.family),
            strong=row.family == "kind",
        )
        for row in rows
    ]
    name = rows[0].distance_name
    x, y = Axis(name=what, log=True), Axis(name=name, log=True)
    return chart(f"{name} against {what}", series, x=x, y=y, rule=_floor(rows), front=True)


def courses(lines: Sequence[Sequence[Row]], what: Literal["steps", "seconds"]) -> str:
    """Distance against steps or time: for each method its rows over tasks that differ in their steps alone."""
    return chart(
        f"{lines[0][0].distance_name} against {what} of training, each point a training of its own",
        [
            Series(
                name=own[0].label,
                points=[(getattr(row, what), row.distance_mean) for row in own],
                spreads=[_known(row.distance_spread) for row in own],
                colour=colour(own[0].family),
                strong=own[0].family == "kind",
            )
            for own in lines
        ],
        x=Axis(name=what, log=True),
        y=Axis(name=lines[0][0].distance_name, log=True),
        rule=_floor(lines[0]),
    )


def rates(rows: Sequence[Row], swept: Mapping[tuple[str, str], Mapping[float, float]], *, title: str) -> str:
    """Distance on the validation images at every learning rate tried."""
    return chart(
        title,
        [
            Series(
                name=row.label,
                points=list(swept[row.task, row.method].items()),
                colour=colour(row.family),
                strong=row.family == "kind",
            )
            for row in rows
            if row.trainable
        ],
        x=Axis(name="learning rate", log=True),
        y=Axis(name=f"{rows[0].distance_name} on validation images", log=True),
    )


def legend(rows: Sequence[Row]) -> str:
    """What the colours stand for."""
    present = [family for family in FAMILIES if family in {row.family for row in rows}]
    keys = "".join(f'<span><span class="key s{colour(f)}"></span>{FAMILIES[f]}</span>' for f in present)
    return f'<div class="keys">{keys}</div>'


def _floor(rows: Sequence[Row]) -> tuple[float, str] | None:
    known = [row.floor for row in rows if not math.isnan(row.floor)]
    return (min(known), f"floor: real against real, {short(min(known))}") if known else None


def _known(spread: float) -> float:
    return 0.0 if math.isnan(spread) else spread


def _rate(row: Row) -> Cell:
    if not row.trainable:
        return Cell(text="not trained")
    return Cell(text=f"{row.lr:g}{'' if row.bracketed else ' (edge)'}", order=row.lr)


def _number(text: str, order: float) -> Cell:
    return Cell(text=text, order=None if math.isnan(order) else order)


def _plain(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}g}" if digits == 3 else f"{value:.{digits}f}"
