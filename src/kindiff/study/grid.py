"""Which cells of a study are left to do: rates are tried with the first seed, the best goes on with all seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kindiff.study.config import Cell, Study
from kindiff.study.records import Record


@dataclass(frozen=True, kw_only=True)
class Work:
    """Something to do for a cell."""

    cell: Cell
    test: bool
    """Whether it is to be scored on the test images; else training and validation are enough."""


def best_rate(records: Sequence[Record]) -> float | None:
    """The learning rate with the lowest validation distance, of one task's and method's records of one seed."""
    scored = [r for r in records if r.validation is not None]
    return min(scored, key=lambda r: r.validation.distance).lr if scored else None  # type: ignore[union-attr]


def left(study: Study, records: Sequence[Record]) -> list[Work]:
    """What is missing, in the order to do it in: seed by seed, so that a study cut short compares all methods."""
    known = {r.cell: r for r in records}
    first, *others = study.config.seeds
    stages: list[list[Work]] = [[] for _ in range(1 + len(study.config.seeds))]
    for task, method in study.pairs():
        sweep = [Cell(task=task, method=method, lr=lr, seed=first) for lr in study.rates(method)]
        if missing := [cell for cell in sweep if cell not in known]:
            stages[0] += [Work(cell=cell, test=False) for cell in missing]
            continue
        lr = best_rate([known[cell] for cell in sweep])
        if lr is None:
            continue  # failed at every rate
        for stage, seed in enumerate((first, *others), start=1):
            cell = Cell(task=task, method=method, lr=lr, seed=seed)
            if cell not in known or (known[cell].test is None and not known[cell].failed):
                stages[stage].append(Work(cell=cell, test=True))
    return [work for stage in stages for work in stage]


def done(study: Study, records: Sequence[Record], only: Sequence[str] = ()) -> int:
    """Units of work that are done, of study.units(only); records of what the study no longer has do not count."""
    pairs, first = [pair for pair in study.pairs() if study.picks(*pair, only)], study.config.seeds[0]
    return sum(
        (r.seed == first) + (r.test is not None)
        for r in records
        if (r.task, r.method) in pairs and r.lr in study.rates(r.method) and r.seed in study.config.seeds
    )


def spent(study: Study, records: Sequence[Record], only: Sequence[str] = ()) -> str:
    """A sentence: how much is done of what `only` picks, the hours that its training took, and those of the rest."""
    units, now = study.units(only), done(study, records, only)
    hours = sum(r.train_seconds for r in records if study.picks(r.task, r.method, only)) / 3600
    rest = f"; the rest takes about {hours / now * (units - now):.1f}" if 0 < now < units else ""
    return (
        f"{now} of {units} trainings and scores are done, {hours:.1f} hours of training in one process{rest}"
    )
