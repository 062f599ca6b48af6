"""Tables of a study, made of its records alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kindiff.study.grid import best_rate
from kindiff.study.records import Record


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method on a task at its best learning rate: means over seeds, spreads are standard deviations."""

    task: str
    method: str
    label: str
    family: str
    budget: str
    lr: float
    bracketed: bool
    """Whether a lower and a higher rate were tried and were worse."""
    seeds: int
    """Seeds that were scored."""
    distance_name: str
    distance_mean: float
    distance_spread: float
    accuracy_mean: float
    accuracy_spread: float
    precision_mean: float
    recall_mean: float
    floor: float
    real_accuracy: float
    trainable: int
    gmacs: float
    steps: int
    seconds: float
    """Time of the method's least disturbed training on this task; nan where nothing is trained."""
    count: int
    """Samples of a score."""


def best_rows(records: Sequence[Record]) -> list[Row]:
    """One row for each task and method with a score, best first within a task."""
    rows = []
    for (task, method), own in _by_pair(records).items():
        swept = _swept_of(own)
        lr = best_rate(swept)
        scored = [r for r in own if r.lr == lr and r.test is not None]
        if lr is None or not scored:
            continue
        tests = [r.test for r in scored if r.test is not None]
        tried = sorted(r.lr for r in swept)
        distances = [t.distance for t in tests]
        accuracies = _known(t.accuracy for t in tests)
        one = scored[0]
        rows.append(
            Row(
                task=task,
                method=method,
                label=one.label,
                family=one.family,
                budget=one.budget,
                lr=lr,
                bracketed=tried[0] < lr < tried[-1],
                seeds=len(tests),
                distance_name=tests[0].distance_name,
                distance_mean=statistics.mean(distances),
                distance_spread=_spread(distances),
                accuracy_mean=_mean(accuracies),
                accuracy_spread=_spread(accuracies),
                precision_mean=_mean(_known(t.precision for t in tests)),
                recall_mean=_mean(_known(t.recall for t in tests)),
                floor=_mean(_known(t.floor for t in tests)),
                real_accuracy=_mean(_known(t.real_accuracy for t in tests)),
                trainable=one.trainable,
                gmacs=one.gmacs,
                steps=one.steps,
                seconds=min((r.train_seconds for r in own if r.steps), default=math.nan),
                count=tests[0].count,
            )
        )
    return sorted(rows, key=lambda row: (row.task, row.distance_mean))


def by_steps(rows: Sequence[Row]) -> dict[str, list[list[Row]]]:
    """Lines of methods over tasks that are named NAME-STEPSs and differ in their steps: NAME -> a line a method."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: row.steps):
        if row.task.endswith(f"-{row.steps}s"):
            of_name = found.setdefault(row.task.removesuffix(f"-{row.steps}s"), {})
            of_name.setdefault(row.method, []).append(row)
    return {name: list(lines.values()) for name, lines in found.items()}


def goal_of(lines: Sequence[Sequence[Row]]) -> Row | None:
    """The last row of the rival that ends best, which KIND is measured by; None without a rival."""
    ends = [own[-1] for own in lines if own[-1].family != "kind"]
    return min(ends, key=lambda row: row.distance_mean, default=None)


def reached(own: Sequence[Row], goal: Row) -> Row | None:
    """The first of a method's rows by steps that is as good as the goal."""
    return next((row for row in own if row.distance_mean <= goal.distance_mean), None)


def sweep(records: Sequence[Record]) -> dict[tuple[str, str], dict[float, float]]:
    """For each task and method the validation distance at each rate (first seed); nan where training failed."""
    tried = [r for r in records if r.validation or r.failed]
    return {
        pair: {
            r.lr: r.validation.distance if r.validation else math.nan
            for r in sorted(_swept_of(own), key=_rate)
        }
        for pair, own in sorted(_by_pair(tried).items())
    }


def markdown(records: Sequence[Record]) -> str:
    """The tables of a study: for each task the methods, best first."""
    rows = best_rows(records)
    blocks = []
    for task in dict.fromkeys(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        first = own[0]
        seeds = sorted({row.seeds for row in own})
        blocks.append(
            f"**{task}**: {first.distance_name} and class accuracy of {first.count} samples, "
            f"{'/'.join(map(str, seeds))} seeds; real against real {first.floor:.1f} and {first.real_accuracy:.3f}.\n\n"
            + markdown_grid(
                (
                    "method",
                    first.distance_name,
                    "accuracy",
                    "precision",
                    "recall",
                    "trainable",
                    "GMACs",
                    "rate",
                ),
                [
                    (
                        row.label,
                        with_spread(row.distance_mean, row.distance_spread, 1),
                        with_spread(row.accuracy_mean, row.accuracy_spread, 3),
                        f"{row.precision_mean:.2f}",
                        f"{row.recall_mean:.2f}",
                        f"{row.trainable / 1000:.1f}k",
                        f"{row.gmacs:.4f}",
                        _rate_in_words(row),
                    )
                    for row in own
                ],
            )
        )
    for name, lines in by_steps(rows).items():
        if (goal := goal_of(lines)) is not None:
            blocks.append(_arrivals(name, lines, goal))
    return "\n\n".join(blocks)


def _arrivals(name: str, lines: Sequence[Sequence[Row]], goal: Row) -> str:
    """For each method the distance at each number of steps, and when it is where the best rival ends."""
    counts = sorted({row.steps for own in lines for row in own})
    table = []
    for own in sorted(lines, key=lambda own: own[-1].distance_mean):
        known = {row.steps: f"{row.distance_mean:.1f}" for row in own}
        there = reached(own, goal)
        when = (f"{there.steps} steps", f"{there.seconds:.0f} s") if there else ("no", "")
        table.append((own[0].label, *(known.get(count, "") for count in counts), *when))
    return (
        f"**{name}**: {goal.distance_name} by steps; the best rival, {goal.label}, ends at {goal.distance_mean:.1f}. "
        "Times are of the least disturbed training of each.\n\n"
        + markdown_grid(("method", *map(str, counts), "as good after", "time"), table)
    )


def sweep_markdown(records: Sequence[Record]) -> str:
    """Validation distances at every learning rate, the appendix of a study."""
    labels = {r.method: r.label for r in records}
    table = sweep(records)
    rates = sorted({rate for of_method in table.values() for rate in of_method})
    blocks = []
    for task in dict.fromkeys(task for task, _ in table):
        lines = []
        for (t, method), found in table.items():
            if t == task:
                best = min(found.values(), key=lambda d: math.inf if math.isnan(d) else d)
                cells = [found.get(rate) for rate in rates]
                lines.append((labels[method], *(_swept(cell, best) for cell in cells)))
        blocks.append(f"**{task}**\n\n" + markdown_grid(("method", *(f"{rate:g}" for rate in rates)), lines))
    return "\n\n".join(blocks)


def with_spread(mean: float, spread: float, digits: int) -> str:
    return f"{mean:.{digits}f} (1 seed)" if math.isnan(spread) else f"{mean:.{digits}f} ± {spread:.{digits}f}"


def _swept(distance: float | None, best: float) -> str:
    if distance is None:
        return ""
    if math.isnan(distance):
        return "failed"
    return f"**{distance:.1f}**" if distance == best else f"{distance:.1f}"


def markdown_grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by_pair(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """The records of each task and method, in their order."""
    found: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        found.setdefault((r.task, r.method), []).append(r)
    return found


def _swept_of(records: Sequence[Record]) -> list[Record]:
    """Those of the seed that rates were tried with: the one with the most of them, the lowest of those."""
    seeds = [r.seed for r in records]
    first = min(set(seeds), key=lambda seed: (-seeds.count(seed), seed))
    return [r for r in records if r.seed == first]


def _rate(record: Record) -> float:
    return record.lr


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values) if values else math.nan


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _rate_in_words(row: Row) -> str:
    """The chosen rate, marked where the best might lie outside the grid; of what is not trained, none."""
    if not row.trainable:
        return "none"
    return f"{row.lr:g}{'' if row.bracketed else ' (edge)'}"
