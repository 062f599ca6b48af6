"""The last steps of putting a model together from parts: slots filled, tailors folded in, learngenes frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from kindiff.components.algebra import Factors
from kindiff.components.linear import ComponentLinear
from kindiff.models.dit import DiT


def factors_of(tensors: Mapping[str, Tensor], matrix: str) -> Factors:
    """The components of one matrix among the tensors of a part."""
    return Factors(tensors[f"{matrix}.u"], tensors[f"{matrix}.sigma"], tensors[f"{matrix}.v"])


def named_factors(matrix: str, factors: Factors) -> dict[str, Tensor]:
    """A matrix's components as tensors of a part, copies."""
    return {
        f"{matrix}.u": factors.u.clone(),
        f"{matrix}.sigma": factors.sigma.clone(),
        f"{matrix}.v": factors.v.clone(),
    }


@torch.no_grad()
def merge_(model: DiT) -> DiT:
    """A dense model of the single class, its tailor folded in; it has no class-agnostic part any more.

    The new model takes over the tensors of the given one; where its learngenes are dense no weight is held twice.
    """
    assert model.gate is not None
    gating = model.gate(torch.zeros(1, dtype=torch.int64), model.class_embed.weight[:1])
    state = model.state_dict()
    for name, layer in model.named_matrices():
        assert isinstance(layer, ComponentLinear)
        merged = layer.merged_weight(gating)
        state[f"{name}.weight"] = merged if layer.rank is not None else layer.weight.copy_(merged)
    with torch.device("meta"):
        new = DiT(model.config, classes=model.classes)
    new.load_state_dict({name: state[name] for name in new.state_dict()}, assign=True)
    new.positions_TD = model.positions_TD
    return new


def freeze_learngenes(model: DiT, train_also: tuple[Literal["bias", "final"], ...]) -> DiT:
    """Only tailors (of a mixture their weights), class embeddings and what `train_also` names require gradients;
    in place."""
    assert model.structure is not None
    tailor = "tailor_mix" if model.structure["gate"] == "mixture" else "tailor_"
    matrices = {name for name, _ in model.named_matrices()}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        parameter.requires_grad_(
            leaf.startswith(tailor)
            or owner == "class_embed"
            or ("bias" in train_also and owner in matrices and leaf == "bias")
            or ("final" in train_also and name.startswith("final."))
        )
    return model


def fill_slot_(bank: Factors, slot: int, tailor: Mapping[str, Tensor], matrix: str) -> None:
    """Copy one class's components into a slot of a matrix's bank (u (S, N, O), sigma (S, N), v (S, N, I)).

    A smaller tailor is padded with components of sigma zero.
    """
    room = bank.sigma.shape[1]
    own = factors_of(tailor, matrix) if f"{matrix}.sigma" in tailor else None
    count = 0 if own is None else len(own.sigma)
    for tensors, tensor in zip(bank, own or (None, None, None), strict=True):
        if count < room:
            tensors[slot].zero_()
        if tensor is not None:
            tensors[slot, :count].copy_(tensor)
