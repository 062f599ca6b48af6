"""From a description of the structure to an empty model made of components, and from a dense model to one.

S slots, K slots per sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from kindiff.classes import ClassSet, shorten
from kindiff.components import algebra
from kindiff.components.embedding import MixedEmbedding
from kindiff.components.gates import MixtureGate, SoftGate, TableGate
from kindiff.components.linear import ComponentLinear
from kindiff.config import MATRICES, DiTConfig, KindConfig, Share, from_dict, to_dict
from kindiff.errors import UsageError
from kindiff.models.dit import DiT


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What config.json says of a model made of components."""

    rank: int | None
    """Learngene components of every matrix; null when they are folded into dense weights."""
    tailor_rank: int
    """Components of a tailor slot."""
    slots: int
    """Tailor slots."""
    gate: Literal["table", "soft", "mixture"] = "table"
    """How ids choose slots. mixture: as a table says; each class weighs them in each matrix (training of a mixture)."""
    gate_width: int = 1
    """Slots per sample of a table or mixture gate."""
    targets: tuple[str, ...] = MATRICES
    """The matrices that have tailors."""

    def __post_init__(self) -> None:
        if min(self.tailor_rank, self.slots) < 0 or self.gate_width < 1 or (self.rank or 1) < 1:
            raise UsageError(f"a structure has ranks, slots and a gate width above zero, not {self}.")
        if max(self.tailor_rank, self.rank or 1) > 2**14 or self.slots > 2**21 or self.gate_width > 64:
            raise UsageError(
                f"a structure has ranks up to {2**14}, slots up to {2**21} and a gate width (tailors on at once, "
                f"a mixture's `mixes`) up to 64, not {self}."
            )
        if unknown := set(self.targets) - set(MATRICES):
            raise UsageError(f"target {min(unknown)!r} is no matrix of a block; use {MATRICES}.")
        if self.gate == "mixture" and self.rank is None:
            raise UsageError("a mixture has learngenes as components; set a rank.")


def build(config: DiTConfig, classes: ClassSet, structure: dict[str, Any]) -> DiT:
    """An unfilled model of a structure (as stored in config.json). UsageError when it cannot be."""
    return empty(config, classes, from_dict(Structure, structure, where="structure"))


def empty(config: DiTConfig, classes: ClassSet, structure: Structure) -> DiT:
    """A model whose components are not set yet."""

    def linear(matrix: str, features_in: int, features_out: int) -> nn.Module:
        check_rank(structure.rank, matrix, config)
        return ComponentLinear(
            features_in,
            features_out,
            rank=structure.rank,
            slots=structure.slots,
            tailor_rank=structure.tailor_rank if matrix in structure.targets else 0,
            mix=(len(classes), structure.gate_width) if structure.gate == "mixture" else None,
        )

    gate: nn.Module
    if structure.gate == "soft":
        gate = SoftGate(len(classes), structure.slots, config.width)
    else:
        table = MixtureGate if structure.gate == "mixture" else TableGate
        gate = table(len(classes), structure.gate_width)
    model = DiT(config, classes=classes, linear=linear, gate=gate, structure=to_dict(structure))
    if structure.gate == "mixture":
        embedding = MixedEmbedding(len(classes), structure.gate_width, config.width)
        model.class_embed = embedding  # type: ignore[assignment]  # it has rows as well
    return model


def check_rank(rank: int | None, matrix: str, config: DiTConfig, *, what: str = "learngene") -> None:
    """UsageError when a rank exceeds what the matrix can have."""
    full = min(config.matrix_shape(matrix))
    if rank is not None and rank > full:
        raise UsageError(
            f"{what} rank {rank} is larger than the full rank {full} of matrix {matrix!r}; use 1 to {full}."
        )


def factorize(
    model: DiT, kind: KindConfig, *, superclasses: Mapping[str, str] | None = None, seed: int = 0
) -> DiT:
    """A new, decomposable model from a dense one; the caller's model is not changed.

    With init svd the largest singular components of each matrix become learngenes and the next ones are dealt
    out to the slots in turn; components beyond the full rank start fresh (u zero). At learngene rank = full
    rank the new model computes what the dense one did. superclasses: class -> superclass, for gate superclass
    alone: the slots are the classes, then the superclasses in order of appearance. UsageError for ranks that
    the matrices do not have, or a class without superclass.
    """
    if model.structure is not None:
        raise UsageError("the model is already made of components; factorize takes a dense one.")
    structure, table = structure_of(model.config, model.classes, kind, superclasses)
    new = empty(model.config, model.classes, structure)
    if isinstance(new.gate, TableGate):
        new.gate.fill_(table)
    new.load_state_dict(_outside_matrices(model), strict=False)
    generator = torch.Generator().manual_seed(seed)
    matrices = dict(model.named_matrices())
    for name, layer in new.named_matrices():
        assert isinstance(layer, ComponentLinear)
        fill_components_(layer, matrices[name], kind, structure, generator)
    return new


def structure_of(
    config: DiTConfig, classes: ClassSet, kind: KindConfig, superclasses: Mapping[str, str] | None = None
) -> tuple[Structure, list[list[int]]]:
    """What `factorize` makes of a dense model of this shape, and the slots of each class. Raises as it does."""
    for matrix in kind.targets:
        check_rank(kind.tailor_rank, matrix, config, what="tailor")
    table = slots_of_classes(classes, kind, superclasses)
    slots, width = sizes_of(table)
    structure = Structure(
        rank=kind.learngene_rank,
        tailor_rank=kind.tailor_rank,
        slots=slots,
        gate="soft" if kind.gate == "soft" else "table",
        gate_width=width,
        targets=kind.targets,
    )
    return structure, table


def slots_of_classes(
    classes: ClassSet, kind: KindConfig, superclasses: Mapping[str, str] | None
) -> list[list[int]]:
    """The tailor slots of each class: its own, and with gate superclass its superclass's too."""
    own = [[i] for i in range(len(classes))]
    if (kind.gate == "superclass") != (superclasses is not None):
        asked = (
            "needs superclasses (class -> superclass)" if superclasses is None else "takes no superclasses"
        )
        raise UsageError(f"gate {kind.gate!r} {asked}.")
    if superclasses is None:
        return own
    if lacking := [name for name in classes.names if name not in superclasses]:
        raise UsageError(f"no superclass is given for {shorten(lacking)}; name one for each class.")
    places: dict[str, int] = {}
    for name in classes.names:
        places.setdefault(superclasses[name], len(classes) + len(places))
    return [[*slot, places[superclasses[name]]] for slot, name in zip(own, classes.names, strict=True)]


def sizes_of(table: list[list[int]]) -> tuple[int, int]:
    """Slots and gate width of a structure whose classes have these slots."""
    return 1 + max(map(max, table)), len(table[0])


def slots_by_share(count: int, share: Share) -> list[list[int]]:
    """The tailor slots of each of `count` classes: one of its own, the same one for all, or one of each sort."""
    if share == "task":
        return [[0]] * count
    return [[i] if share == "class" else [i, count] for i in range(count)]


def _outside_matrices(model: DiT) -> dict[str, torch.Tensor]:
    weights = {f"{name}.weight" for name, _ in model.named_matrices()}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in weights}


@torch.no_grad()
def fill_components_(
    layer: ComponentLinear,
    dense: nn.Module,
    kind: KindConfig,
    structure: Structure,
    generator: torch.Generator,
) -> None:
    """Set a matrix's learngenes and tailors from its dense weight, as `kind.init` says; in place."""
    weight_OI = dense.weight
    assert isinstance(weight_OI, torch.Tensor)
    slots, on_at_once = structure.slots, structure.gate_width
    dealt = slots * kind.tailor_rank if layer.has_tailors else 0
    rank, wanted = kind.learngene_rank, kind.learngene_rank + dealt
    active = rank + (kind.tailor_rank * on_at_once if dealt else 0)
    if kind.init == "per-factor":
        pool = algebra.random(wanted, *_sides(weight_OI), active, generator)
    else:
        pool = algebra.svd(weight_OI)
        lacking = wanted - len(pool.sigma)
        if lacking > 0:
            blank = algebra.fresh(lacking, *_sides(weight_OI), generator)
            pool = algebra.Factors(*(torch.cat([a, b.to(a)]) for a, b in zip(pool, blank, strict=True)))
    scale = 1.0
    if kind.init == "svd-rescaled":
        energy = pool.sigma[:wanted].square()
        energy[min(weight_OI.shape) :] = 0.0  # fresh components contribute nothing yet
        on = energy[:rank].sum() + (energy[rank:].sum() * on_at_once / slots if dealt else 0.0)
        scale = float((weight_OI.square().sum() / on).sqrt())
    layer.u.copy_(pool.u[:rank])
    layer.sigma.copy_(pool.sigma[:rank] * scale)
    layer.v.copy_(pool.v[:rank])
    if dealt:
        # component rank + n * slots + s goes to slot s: each slot gets a like share of every size
        for slot in range(slots):
            own = slice(rank + slot, wanted, slots)
            layer.tailor_u[slot].copy_(pool.u[own])
            layer.tailor_sigma[slot].copy_(pool.sigma[own] * scale)
            layer.tailor_v[slot].copy_(pool.v[own])


def _sides(weight_OI: torch.Tensor) -> tuple[int, int]:
    return weight_OI.shape[0], weight_OI.shape[1]
