"""New classes as weighted sums of known ones: nothing but the weights trains.

C classes, K known classes that each mixes, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from kindiff.classes import ClassSet
from kindiff.components.algebra import Factors
from kindiff.components.assembly import fill_slot_, freeze_learngenes, named_factors
from kindiff.components.build import Structure, empty
from kindiff.components.parts import EMBEDDING, NULL_EMBEDDING, Components, with_classes
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
    `train_also` names). The model holds K tailors for a class; `decompose(model).with_tailor_rank(rank)` makes them
    one. UsageError for a class that the parts do not have, or different numbers of them.
    """
    wanted, known = ClassSet(tuple(nearest)), ClassSet(parts.classes)
    count = len(next(iter(nearest.values())))
    if not count or any(len(names) != count for names in nearest.values()):
        raise UsageError("each class of a mixture mixes the same number of known classes, one or more.")
    shapes = {matrix: parts.config.matrix_shape(matrix) for matrix in targets}
    tailors = {}
    for name, sources in nearest.items():
        known.ids(tuple(sources))
        tailors[name] = {EMBEDDING: parts.tailors[sources[0]][EMBEDDING]}
        for matrix, (features_out, features_in) in shapes.items():
            for i in range(parts.config.depth):
                room = (count, parts.tailor_rank)
                bank = Factors(
                    torch.empty(*room, features_out), torch.empty(room), torch.empty(*room, features_in)
                )
                for slot, source in enumerate(sources):
                    fill_slot_(bank, slot, parts.tailors[source], f"blocks.{i}.{matrix}")
                own = Factors(*(tensor.flatten(0, 1) for tensor in bank))
                tailors[name] |= named_factors(f"blocks.{i}.{matrix}", own)
    config = with_classes(parts.config, len(wanted))
    plain = dataclasses.replace(parts, config=config, targets=targets, tailors=tailors).recombine(
        layers="factored"
    )
    assert plain.structure is not None
    structure = dataclasses.replace(from_dict(Structure, plain.structure), mixes=count)
    with torch.device("meta"):
        model = empty(config, wanted, structure)
    state = plain.state_dict()
    del state["class_embed.weight"]
    null = parts.learngenes[NULL_EMBEDDING]
    rows = [torch.stack([parts.tailors[source][EMBEDDING] for source in names]) for names in nearest.values()]
    first = torch.zeros(len(wanted) + 1, count, dtype=null.dtype)
    first[:, 0] = 1.0
    state["class_embed.known_RKD"] = torch.stack([*rows, null.expand(count, -1)])
    state["class_embed.mix"] = first
    state |= {
        f"{name}.tailor_mix": first[:-1].clone() for name, layer in model.named_matrices() if layer.mixes
    }
    model.load_state_dict(state, assign=True)
    model.set_positions_()
    return freeze_learngenes(model, train_also)
