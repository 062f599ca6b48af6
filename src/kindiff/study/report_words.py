"""A study's outcome in words: who won each task, by how much of the spread, and how far from real images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kindiff.report.svg import short
from kindiff.study.tables import Row, goal_of, reached

FAMILIES = {
    "kind": "KIND",
    "peft": "adapters and partial fine-tuning",
    "full": "full fine-tuning",
    "learngene": "other learngene methods",
    "scratch": "training from scratch",
}
"""Sorts of methods, in the order of the pages' colours."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The best row of a group of methods beside its best opponent."""

    first: Row
    """Lowest distance of all."""
    second: Row
    """The best of the other side (of the rivals when KIND is first, KIND's when a rival is), or the next row."""
    sides: bool
    """Whether the two are KIND and a rival."""

    @property
    def gap(self) -> float:
        """How much lower the first one's distance is."""
        return self.second.distance_mean - self.first.distance_mean

    @property
    def spread(self) -> float:
        """The larger standard deviation over seeds of the two; nan when neither has one."""
        known = [s for s in (self.first.distance_spread, self.second.distance_spread) if not math.isnan(s)]
        return max(known, default=math.nan)

    @property
    def spreads(self) -> float:
        """The gap in spreads; nan when there is none to measure with."""
        return self.gap / self.spread if self.spread > 0 else math.nan

    @property
    def clear(self) -> bool:
        """Whether the gap is beyond the spread."""
        return self.spreads > 1


def verdict(rows: Sequence[Row], *, sides: bool) -> Verdict | None:
    """The verdict over rows of one task; None with fewer than two methods.

    sides: KIND against its rivals, where both are there; else the first against the next.
    """
    ranked = sorted(rows, key=lambda row: row.distance_mean)
    if len(ranked) < 2:
        return None
    other_side = [row for row in ranked[1:] if sides and _is_kind(row) != _is_kind(ranked[0])]
    return Verdict(first=ranked[0], second=(other_side or ranked[1:])[0], sides=bool(other_side))


def budgets(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The groups of like numbers of trained parameters in which KIND meets a rival."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.budget:
            groups.setdefault(row.budget, []).append(row)
    return {name: own for name, own in sorted(groups.items()) if len({_is_kind(r) for r in own}) == 2}


def sentence(found: Verdict) -> str:
    """A verdict in two or three sentences."""
    first, second = found.first, found.second
    name = first.distance_name
    against = "next one"
    if found.sides:
        against = "best rival" if _is_kind(first) else "KIND's best setting"
    lead = f"{first.label} is first with {name} {distance(first)}; the {against}, {second.label}, has "
    lead += f"{distance(second)}."
    if math.isnan(found.spreads):
        by = "With one seed there is no spread to measure the difference by."
    elif found.clear:
        by = f"The difference of {found.gap:.3g} is {found.spreads:.1f} times the larger spread."
    else:
        by = f"The difference of {found.gap:.2g} is within the spread ({found.spreads:.1f} of it): no clear winner."
    if not math.isnan(first.floor):
        above, other = (row.distance_mean - row.floor for row in (first, second))
        by += (
            f" Two sets of real images differ by {first.floor:.3g}: it is {above:.3g} above that, the other "
        )
        by += f"{other:.3g}."
    if not math.isnan(first.accuracy_mean + second.accuracy_mean):
        by += f" Class accuracy: {first.accuracy_mean:.3f} against {second.accuracy_mean:.3f}"
        by += (
            f" ({first.real_accuracy:.3f} on real images)."
            if first.real_accuracy == first.real_accuracy
            else "."
        )
    cost = (
        f" Trained parameters: {short(first.trainable)} against {short(second.trainable)}; GMACs an image: "
        f"{first.gmacs:.4g} against {second.gmacs:.4g}."
    )
    return f"{lead} {by}{cost}"


def headline(tasks: Mapping[str, Sequence[Row]], *, sides: bool) -> str:
    """Who won, in a sentence or two: KIND against all its rivals, and at like numbers of trained parameters."""
    found = [v for rows in tasks.values() if (v := verdict(rows, sides=sides))]
    against = [v for v in found if v.sides]
    if not against:
        return " ".join(dict.fromkeys(f"{v.first.label} is first{_how_clear(v)}." for v in found))
    won = [v for v in against if _is_kind(v.first)]
    if len(against) == 1:
        one = against[0]
        said = f"{'KIND' if won else one.first.label} is first{_how_clear(one)}: {one.first.distance_name} "
        said += f"{distance(one.first)} against {distance(one.second)} of {one.second.label}"
    else:
        said = f"KIND is first on {_of(len(won), len(against))} tasks"
        if won:
            clear = sum(v.clear for v in won)
            said += f", {'each time' if clear == len(won) else f'on {clear} of them'} beyond the spread"
        if lost := {v.first.label for v in against if not _is_kind(v.first)}:
            said += f"; where it is not, {' or '.join(sorted(lost))} is"
    groups = [own for rows in tasks.values() for own in budgets(rows).values()]
    if level := [v for own in groups if (v := verdict(own, sides=True))]:
        count = sum(_is_kind(v.first) for v in level)
        where = (
            f"first in {_of(count, len(level))} groups"
            if len(level) > 1
            else "first"
            if count
            else "not first"
        )
        said += f". Among methods that train about as many parameters KIND is {where}"
    return f"{said}."


def _is_kind(row: Row) -> bool:
    return row.family == "kind"


def _how_clear(found: Verdict) -> str:
    return (
        ", beyond the spread"
        if found.clear
        else "; the difference is within the spread"
        if found.spreads <= 1
        else ""
    )


def _of(count: int, total: int) -> str:
    return f"all {total}" if count == total else f"{count} of {total}"


def distance(row: Row) -> str:
    """A row's distance with its spread."""
    return with_spread(row.distance_mean, row.distance_spread, 1 if row.distance_mean >= 100 else 2)


def accuracy(row: Row) -> str:
    """A row's class accuracy with its spread."""
    return with_spread(row.accuracy_mean, row.accuracy_spread, 3)


def with_spread(mean: float, spread: float, digits: int) -> str:
    """mean ± spread; the mean alone where there is one seed, nothing where there is no mean."""
    if math.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" if math.isnan(spread) else f"{mean:.{digits}f} ± {spread:.{digits}f}"


def convergence(lines: Sequence[Sequence[Row]]) -> str:
    """In a sentence, when KIND reaches the best rival's last score; lines are rows of a method by steps. Empty where
    KIND or a rival is missing."""
    kinds, rival = [own for own in lines if _is_kind(own[0])], goal_of(lines)
    if not kinds or rival is None:
        return ""
    kind = min(kinds, key=lambda own: own[-1].distance_mean)
    told = f"The best rival, {rival.label}, has {rival.distance_name} {distance(rival)} after {rival.steps} steps"
    first = reached(kind, rival)
    if first is None:
        return (
            f"{told}; {kind[-1].label} does not reach that in {kind[-1].steps} steps ({distance(kind[-1])})."
        )
    share = first.steps / rival.steps
    return f"{told}; {first.label} is there with {distance(first)} after {first.steps} steps, {share:.2f} of them."
