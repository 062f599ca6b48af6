"""The components' view of a model: where the energy of learngenes and tailors is, and which tailors are alike."""

from __future__ import annotations

from itertools import pairwise

from kindiff.components.gates import TableGate
from kindiff.components.views import SHUFFLES, energies, relatedness, tailor_cosines
from kindiff.config import MATRICES
from kindiff.data.avatars import SUPERCLASSES
from kindiff.errors import UsageError
from kindiff.models import DiT
from kindiff.report.heat import heat
from kindiff.report.page import figures, heading, paragraph

GROUP_OF = {name: group for group, names in SUPERCLASSES.items() for name in names}
MAX_CLASSES = 60
"""A map of more classes would not be read."""


def has_tailors(model: DiT) -> bool:
    """Whether there are tailors to look at."""
    structure = model.structure
    return bool(structure and structure["tailor_rank"] and structure["slots"] and structure["targets"])


def has_several(model: DiT) -> bool:
    """Whether classes have tailors of their own, to compare and to exchange."""
    return has_tailors(model) and isinstance(model.gate, TableGate) and model.structure["slots"] > 1  # type: ignore[index]


def components_view(model: DiT, *, title: str) -> list[str]:
    """Where the energy is; where classes have tailors of their own, which are alike."""
    if not has_several(model):
        return [heading(title, 3), _shares(model)]
    return [heading(title, 3), figures([_shares(model), _likeness(model)]), *_related(model)]


def _shares(model: DiT) -> str:
    found = energies(model)
    values = [
        [found[f"blocks.{i}.{matrix}"].tailor_share for matrix in MATRICES] for i in range(model.config.depth)
    ]
    return heat(
        "Tailors' share of each matrix's energy (squared Frobenius norm, mean over classes); the learngenes hold the "
        "rest",
        [f"layer {i + 1}" for i in range(model.config.depth)],
        MATRICES,
        values,
        limit=max(1e-9, 1.5 * max(max(row) for row in values)),
        show=lambda share: f"{100 * share:.{0 if share >= 0.1 else 1}f}%",
        numbers=True,
    )


def _likeness(model: DiT) -> str:
    names = model.classes.names
    if len(names) > MAX_CLASSES:
        return paragraph(f"{len(names)} classes are too many for a map of their tailors.", soft=True)
    order, breaks = list(range(len(names))), []
    if _groups(model):
        order.sort(key=lambda i: (GROUP_OF[names[i]], names[i]))
        grouped = [GROUP_OF[names[i]] for i in order]
        breaks = [i for i, (a, b) in enumerate(pairwise(grouped), start=1) if a != b]
    cosines = tailor_cosines(model)[order][:, order]
    largest = max((abs(float(cosines[i, j])) for i in range(len(names)) for j in range(i)), default=1.0)
    labels = [names[i] for i in order]
    return heat(
        f"Cosine between classes' tailors ({'groups of related styles apart; ' if breaks else ''}full colour at "
        f"{max(largest, 1e-6):.2f})",
        labels,
        labels,
        cosines.tolist(),
        limit=max(largest, 1e-6),
        show=lambda cosine: f"{cosine:.2f}",
        breaks=breaks,
    )


def _related(model: DiT) -> list[str]:
    groups = _groups(model)
    if not groups:
        return []
    try:
        found = relatedness(tailor_cosines(model), groups)
    except UsageError:
        return []  # no two classes of one group, or a single group
    more = "more alike than others" if found.chance < 0.05 else "not clearly more alike than others"
    small = (
        "; both are near 0, so tailors share little"
        if max(abs(found.within), abs(found.between)) < 0.1
        else ""
    )
    return [
        paragraph(
            f"Tailors of related styles are {more}: their mean cosine is {found.within:.3f} within a group, "
            f"{found.between:.3f} between groups{small}. Of {SHUFFLES:,} random groupings {100 * found.chance:.2g} % "
            "differ as much."
        )
    ]


def _groups(model: DiT) -> list[str]:
    """The group of each class; nothing where some class has none."""
    names = model.classes.names
    return [GROUP_OF[name] for name in names] if all(name in GROUP_OF for name in names) else []
