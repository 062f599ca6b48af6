"""Taking a model apart into learngenes and tailors.

K slots per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kindiff.components.assembly import named_factors
from kindiff.components.linear import ComponentLinear
from kindiff.components.parts import EMBEDDING, GATE, NULL_EMBEDDING, Components
from kindiff.errors import UsageError
from kindiff.models.dit import DiT


@torch.no_grad()
def decompose(model: DiT) -> Components:
    """Take a model apart; the parts are copies, in host memory. UsageError for a model that is not made of components.

    Where a class has several slots or soft weights, its tailor is their sum: the components of all its slots,
    sigma scaled by the gate's weight.
    """
    if model.structure is None or model.structure["rank"] is None:
        way = (
            "pre-train with method kind, or factorize it"
            if model.structure is None
            else "recombine its parts with factored layers"
        )
        raise UsageError(
            f"the model has dense matrices; only a model made of factored components can be decomposed ({way})."
        )
    assert model.gate is not None
    rows = model.class_embed.weight
    ids = torch.arange(len(model.classes), device=rows.device)
    gating = model.gate(ids, rows[:-1])
    matrices = dict(model.named_matrices())
    learngenes = {name: tensor.to("cpu", copy=True) for name, tensor in learngenes_of(model).items()}
    tailors: dict[str, dict[str, Tensor]] = {}
    for i, name in enumerate(model.classes.names):
        tensors = {EMBEDDING: rows[i].clone()}
        for matrix, layer in matrices.items():
            if isinstance(layer, ComponentLinear) and layer.has_tailors:
                tensors |= named_factors(matrix, layer.tailor_of(gating, i))
        tailors[name] = {key: tensor.cpu() for key, tensor in tensors.items()}
    targets = tuple(m for m in model.structure["targets"] if any(f".{m}.sigma" in key for key in tensors))
    return Components(model.config, targets, learngenes, tailors)


def learngenes_of(model: DiT) -> dict[str, Tensor]:
    """Everything of a model of factored components that is not a class's, by its name in parts; no copies."""
    found = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if ".tailor_" not in name and not name.startswith(("class_embed.", GATE))
    }
    return found | {NULL_EMBEDDING: model.class_embed.weight[-1]}
