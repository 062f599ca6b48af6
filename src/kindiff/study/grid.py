"""Which cells of a study are left to do: rates are tried with the first seed, the best goes on with all seeds."""

from __future__ import annotations

import math
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
    """The learning rate with the lowest validation distance, of one task's and method's records of one seed; where
    there was nothing to choose, and so no validation, the only one."""
    scored = [r for r in records if r.validation is not None]
    if scored:
        return min(scored, key=lambda r: r.validation.distance).lr  # type: ignore[union-attr]
    rates = {r.lr for r in records if not r.failed}
    return rates.pop() if len(rates) == 1 else None


def sweep_of(study: Study, known: dict[Cell, Record], task: str, method: str) -> list[Cell]:
    """The cells that choose a method's rate on a task, as far as is known: those of lrs, and as long as the lowest or
    the highest is the best, the next of lrs_beyond."""
    rates, every = set(study.rates(task, method)), sorted({*study.config.lrs, *study.config.lrs_beyond})
    while True:
        cells = [Cell(task=task, method=method, lr=lr, seed=study.config.seeds[0]) for lr in sorted(rates)]
        best = best_rate([known[cell] for cell in cells if cell in known])
        if best is None or len(cells) == 1 or not all(cell in known for cell in cells):
            return cells
        place = every.index(best)
        more = set(every[max(place - 1, 0) : place + 2]) - rates
        if not more:
            return cells
        rates |= more


def left(study: Study, records: Sequence[Record]) -> list[Work]:
    """What is missing, in the order to do it in: seed by seed, so that a study cut short compares all methods."""
    known = {r.cell: r for r in records}
    first, *others = study.config.seeds
    stages: list[list[Work]] = [[] for _ in range(1 + len(study.config.seeds))]
    for task, method in study.pairs():
        sweep = sweep_of(study, known, task, method)
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


def progress(study: Study, records: Sequence[Record], only: Sequence[str] = ()) -> tuple[int, int]:
    """Units of work that are done, and in all as far as is known, of what `only` picks: a rate tried, a seed trained or
    scored; records of what the study no longer has do not count."""
    known, seeds = {r.cell: r for r in records}, study.config.seeds
    done = units = 0
    for task, method in study.pairs():
        if study.picks(task, method, only):
            sweep = sweep_of(study, known, task, method)
            tried = [known[cell] for cell in sweep if cell in known]
            lr = best_rate(tried)
            best = [r for r in records if (r.task, r.method, r.lr) == (task, method, lr)]
            done += len(tried) + sum(r.test is not None and r.seed in seeds for r in best)
            units += len(sweep) + len(seeds)
    return done, units


def spent(study: Study, records: Sequence[Record], only: Sequence[str] = ()) -> str:
    """A sentence: how much is done of what `only` picks, the hours that its training takes where nothing disturbs it
    (each method at its fastest training's images a second), those of the scored cells among it, and of the rest."""
    done, units = progress(study, records, only)
    trained = [r for r in records if study.picks(r.task, r.method, only) and r.steps]
    pace: dict[str, float] = {}
    for r in trained:
        pace[r.method] = min(r.train_seconds / (r.steps * r.batch), pace.get(r.method, math.inf))
    hours, again = (
        sum(pace[r.method] * r.steps * r.batch for r in some) / 3600
        for some in (trained, [r for r in trained if r.test])
    )
    rest = f"; the rest takes about {hours / done * (units - done):.1f}" if 0 < done < units else ""
    return (
        f"{done} of {units} trainings and scores are done, {hours:.1f} hours of training in one process "
        f"({again:.1f} of what the tables show, which `repeat` does){rest}"
    )
