"""New classes as weighted sums of known ones: nothing but the weights trains.

C classes, K known classes that each mixes, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from kindiff.classes import ClassSet
from kindiff.components.assembly import freeze_learngenes
from kindiff.components.build import Structure, empty
from kindiff.components.gates import TableGate
from kindiff.components.parts import GATE, Components
from kindiff.config import MATRICES, from_dict
from kindiff.errors import UsageError
from kindiff.models.dit import DiT


@torch.no_grad()
def mixture(
    parts: Components,
    nearest: Mapping[str, Sequence[str]],
    *,
    targets: tuple[str, ...] = MATRICES,
    train_also: tuple[Literal["bias", "final"], ...] = (),
) -> DiT:
    """A model of new classes, each a sum of known classes' tailors and embeddings: W_T(c) = sum_k m_k(c) W_T(k).

    nearest: for each new class the K known ones that it mixes; it starts as the first of them. Each has a weight in
    each of the `targets` of each block and one for the embedding, and these weights are what trains (with what
    `train_also` names). `decompose` gives each class one tailor of all its components, `recombine(tailor_rank=...)`
    cuts it. UsageError for a class that the parts do not have, or different numbers of them.
    """
    wanted, known = ClassSet(tuple(nearest)), ClassSet(parts.classes)
    count = len(next(iter(nearest.values())))
    if not count or any(len(names) != count for names in nearest.values()):
        raise UsageError("each class of a mixture mixes the same number of known classes, one or more.")
    used = ClassSet(tuple(dict.fromkeys(source for names in nearest.values() for source in names)))
    known.ids(used.names)
    config = dataclasses.replace(parts.config, num_classes=len(wanted))
    bank = dataclasses.replace(parts, targets=targets).recombine(used.names, layers="factored")
    assert bank.structure is not None
    structure = dataclasses.replace(from_dict(Structure, bank.structure), gate="mixture", gate_width=count)
    with torch.device("meta"):
        model = empty(config, wanted, structure)
    places = [used.ids(tuple(names)) for names in nearest.values()]
    rows = bank.class_embed.weight
    first = torch.zeros(len(wanted), count, dtype=rows.dtype)
    first[:, 0] = 1.0
    state = {
        name: tensor
        for name, tensor in bank.state_dict().items()
        if not name.startswith(("class_embed.", GATE))
    }
    gate = TableGate(len(wanted), count).fill_(places)
    state |= {GATE + name: tensor for name, tensor in gate.state_dict().items()}
    state["class_embed.known_CKD"] = torch.stack([rows[ids] for ids in places])
    state["class_embed.null_D"] = rows[-1].clone()
    state |= {name: first.clone() for name in model.state_dict() if name.endswith("tailor_mix")}
    model.load_state_dict(state, assign=True)
    model.set_positions_()
    return freeze_learngenes(model, train_also)
