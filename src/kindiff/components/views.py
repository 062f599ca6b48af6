"""Looking at a model's components: how much each part weighs, how alike tailors are, tailors exchanged.

Everything is computed from the components, no dense tailor is ever formed; in float64 on the CPU.

C classes, S slots, K slots per sample, N components of a slot, I/O features in/out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kindiff.components.algebra import Factors
from kindiff.components.gates import TableGate
from kindiff.components.linear import ComponentLinear
from kindiff.errors import UsageError
from kindiff.models.dit import DiT
from kindiff.models.layers import Gating

SHUFFLES = 2000
"""Random groupings that `relatedness` compares with."""


@dataclass(frozen=True)
class Energy:
    """Squared Frobenius norms of the parts of one matrix, cross terms between components included."""

    learngenes: float
    """|W_G|^2."""
    tailors: float
    """|W_T(c)|^2, the mean over the classes."""

    @property
    def tailor_share(self) -> float:
        """The tailors' part of the sum, 0 to 1; the learngenes have the rest."""
        return self.tailors / (self.learngenes + self.tailors)


@dataclass(frozen=True)
class Relatedness:
    """Whether tailors of one group are more alike than tailors of different groups."""

    within: float
    """Mean cosine of two classes of the same group."""
    between: float
    """Mean cosine of two classes of different groups."""
    chance: float
    """Share of random groupings of the same sizes whose difference within - between is at least as large."""


def inner(a: Factors, b: Factors) -> Tensor:
    """The Frobenius inner product of two matrices: sum_ij sigma_i sigma_j (u_i . u_j) (v_i . v_j)."""
    return _products(a, b).sum()


@torch.no_grad()
def energies(model: DiT) -> dict[str, Energy]:
    """The energy of learngenes and tailors in every matrix, by the matrix's full name. UsageError for a dense model."""
    gating = _gating(model)
    found = {}
    for name, layer in model.named_matrices():
        assert isinstance(layer, ComponentLinear)
        if layer.rank is None:
            common = layer.weight.cpu().double().square().sum()
        else:
            own = _double(layer.u, layer.sigma, layer.v)
            common = inner(own, own)
        gram_CC = _tailor_gram(layer, gating)
        found[name] = Energy(float(common), float(gram_CC.diagonal().mean()))
    return found


@torch.no_grad()
def tailor_cosines(model: DiT) -> Tensor:
    """(C, C) float64: the cosine of each two classes' tailors, all matrices of all layers as one long vector.

    A tailor that is zero has cosine 0 with every tailor. UsageError for a dense model.
    """
    gating, classes = _gating(model), len(model.classes)
    gram_CC = torch.zeros(classes, classes, dtype=torch.float64)
    for _, layer in model.named_matrices():
        assert isinstance(layer, ComponentLinear)
        gram_CC += _tailor_gram(layer, gating)
    norms_C = gram_CC.diagonal().clamp(min=0).sqrt()
    size_CC = norms_C.outer(norms_C)
    return torch.where(size_CC > 0, gram_CC / size_CC, 0.0)


def relatedness(cosines_CC: Tensor, groups: Sequence[str], *, seed: int = 0) -> Relatedness:
    """Cosines within and between groups; groups (C,) names the group of each class.

    UsageError unless some group has two classes and there are two groups.
    """
    same_CC, pairs_CC = _same_group(groups), ~torch.eye(len(groups), dtype=torch.bool)
    if not (same_CC & pairs_CC).any() or same_CC.all():
        raise UsageError("similarity within and between groups needs two groups, one of them of two classes.")

    def difference(order: Tensor) -> tuple[float, float]:
        same = same_CC[order][:, order]
        return float(cosines_CC[same & pairs_CC].mean()), float(cosines_CC[~same].mean())

    within, between = difference(torch.arange(len(groups)))
    generator = torch.Generator().manual_seed(seed)
    shuffled = (difference(torch.randperm(len(groups), generator=generator)) for _ in range(SHUFFLES))
    as_large = sum(w - b >= within - between for w, b in shuffled)
    return Relatedness(within, between, as_large / SHUFFLES)


def exchange_tailors(model: DiT, partners: Sequence[int]) -> DiT:
    """A new model in which class i has the tailor of class partners[i] and keeps its own embedding.

    UsageError for a model without a table gate, or a partner that it does not have.
    """
    if not isinstance(model.gate, TableGate):
        raise UsageError(
            "only tailors that a table gives to the classes can be exchanged; this model has none."
        )
    classes = len(model.classes)
    if len(partners) != classes or not all(0 <= i < classes for i in partners):
        raise UsageError(f"partners are {list(partners)}; give one class id, 0 to {classes - 1}, a class.")
    new = copy.deepcopy(model)
    assert isinstance(new.gate, TableGate)
    new.gate.slots_CK[:classes] = model.gate.slots_CK[list(partners)]
    new.gate.weights_CK[:classes] = model.gate.weights_CK[list(partners)]
    return new


def _gating(model: DiT) -> Gating:
    """The gating of all classes."""
    if model.structure is None or model.gate is None:
        raise UsageError(
            "the model has dense matrices; only a model made of components has parts to look at."
        )
    rows_CD = model.class_embed.weight[:-1]
    gating: Gating = model.gate(torch.arange(len(rows_CD), device=rows_CD.device), rows_CD)
    return gating


def _tailor_gram(layer: ComponentLinear, gating: Gating) -> Tensor:
    """(C, C) inner products of the classes' tailors in one matrix."""
    classes = len(gating.slots_BK)
    if not layer.has_tailors:
        return torch.zeros(classes, classes, dtype=torch.float64)
    u, sigma, v = layer.tailors
    slots = len(sigma)
    weights_CS = torch.zeros(classes, slots, dtype=torch.float64).scatter_add(
        1, gating.slots_BK.cpu(), layer.weigh(gating).weights_BK.cpu().double()
    )
    bank = _double(u.flatten(0, 1), sigma.flatten(), v.flatten(0, 1))
    gram_SS = _products(bank, bank).unflatten(0, (slots, -1)).unflatten(2, (slots, -1)).sum(dim=(1, 3))
    return weights_CS @ gram_SS @ weights_CS.T


def _products(a: Factors, b: Factors) -> Tensor:
    """Inner products of each component of a with each of b."""
    left, right = a.u * a.sigma.unsqueeze(1), b.u * b.sigma.unsqueeze(1)
    return (left @ right.T) * (a.v @ b.v.T)


def _double(u: Tensor, sigma: Tensor, v: Tensor) -> Factors:
    return Factors(u.cpu().double(), sigma.cpu().double(), v.cpu().double())


def _same_group(groups: Sequence[str]) -> Tensor:
    ids_C = torch.tensor([sorted(set(groups)).index(group) for group in groups])
    return ids_C.unsqueeze(0) == ids_C.unsqueeze(1)
