"""Any transformer: nn.Linear layers of a module tree that is not ours, chosen by name, as components.

The modules in the tree are called without a gate, so what is on for a call is said around it: `model(ids, ...)`,
or `with model.condition(ids):` where the backward pass must see it too (activation checkpointing).

B batch, I/O features in/out, K slots per sample.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from kindiff.classes import ClassSet, nearest, numbered, shorten
from kindiff.components.build import Structure, fill_components_, sizes_of, slots_of_classes
from kindiff.components.gates import TableGate
from kindiff.components.linear import ComponentLinear
from kindiff.config import MATRICES, KindConfig
from kindiff.errors import UsageError
from kindiff.models.layers import Gating


class Cell:
    """What is on now, for the layers of one model; empty outside a call."""

    gating: Gating | None = None


class GatedLinear(nn.Module):
    """In an nn.Linear's place: components, switched by the cell that its model fills for a call."""

    def __init__(
        self, name: str, inner: ComponentLinear, features_in: int, features_out: int, cell: Cell
    ) -> None:
        super().__init__()
        self.name, self.cell = name, cell
        self.inner = inner
        self.in_features, self.out_features = features_in, features_out

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"{self.name} is made of components and has no weight, which the model uses directly; leave this layer "
                "out of the targets."
            )
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ..., I), the samples first -> (B, ..., O)."""
        gating = self.cell.gating
        if self.inner.has_tailors:
            if gating is None:
                raise UsageError(
                    f"{self.name} was called without a condition; call the model as model(ids, ...), or inside "
                    "`with model.condition(ids):`."
                )
            if x.shape[0] != len(gating.slots_BK):
                raise UsageError(
                    f"{self.name} is given {tuple(x.shape)} and the condition has {len(gating.slots_BK)} samples; its "
                    "first dimension must be the samples. Leave this layer out of the targets, or put the batch first."
                )
        y_BTO = self.inner(x.reshape(x.shape[0], -1, x.shape[-1]), gating)
        return y_BTO.reshape(*x.shape[:-1], self.out_features)


class ComponentModel(nn.Module):
    """A foreign model some of whose matrices are components. Made by `factorize_modules`; `inner` is the model.

    One call at a time: the condition is held by the model while a call runs (nested calls are fine, two threads
    on one model are not).
    """

    def __init__(self, inner: nn.Module, classes: ClassSet, structure: Structure, cell: Cell) -> None:
        super().__init__()
        self.inner = inner
        self.classes, self.structure = classes, structure
        self.cell = cell
        self.gate = TableGate(len(classes), structure.gate_width)

    def forward(self, condition: Tensor | Gating, *args: Any, **kwargs: Any) -> Any:
        """The inner model's own call, under a condition: class ids (B,), or a Gating from a gate of one's own."""
        with self.condition(condition):
            return self.inner(*args, **kwargs)

    @contextlib.contextmanager
    def condition(self, condition: Tensor | Gating) -> Iterator[nn.Module]:
        """What is on for every call inside: class ids (B,), the null id for the learngenes alone, or a Gating."""
        before, self.cell.gating = self.cell.gating, self._gating(condition)
        try:
            yield self.inner
        finally:
            self.cell.gating = before

    def layers(self) -> dict[str, GatedLinear]:
        """The factored layers by their names in the inner model."""
        return {name: m for name, m in self.inner.named_modules() if isinstance(m, GatedLinear)}

    def slots_on(self, ids_B: Tensor) -> Tensor:
        """The tailor slots that a batch trains; all others must keep still (`kindiff.train.optimiser.RowAdam`)."""
        return self.gate.slots_on(ids_B)

    def tailors(self) -> list[nn.Parameter]:
        """Every bank of tailors, the slots first: what belongs to classes; all else belongs to everyone."""
        return [p for name, p in self.named_parameters() if ".tailor_" in name]

    def _gating(self, condition: Tensor | Gating) -> Gating:
        if isinstance(condition, Gating):
            return condition
        if condition.ndim != 1 or condition.is_floating_point():
            raise UsageError(
                f"a condition is class ids of the shape (samples,), not {condition.dtype} {tuple(condition.shape)}."
            )
        rows = self.classes.rows
        if condition.device.type == "cpu" and not bool(((condition >= 0) & (condition < rows)).all()):
            raise UsageError(f"class ids are 0 to {rows - 1} (the null class), not {condition.tolist()}.")
        ids_B = condition.to(self.gate.slots_CK.device)
        return self.gate(ids_B, ids_B)


def factorize_modules(
    model: nn.Module,
    *,
    targets: Sequence[str],
    kind: KindConfig,
    classes: ClassSet | int,
    superclasses: Mapping[str, str] | None = None,
    seed: int = 0,
) -> ComponentModel:
    """A new model in which the nn.Linear layers that `targets` name are components; the caller's is not changed.

    targets: name patterns (`*.attention.self.query`, * and ? and []), as `model.named_modules()` names layers.
    kind: ranks, init and gate (class or superclass), as in `factorize`: at full rank the new model computes what
    the old one does. UsageError for a pattern that matches no linear
    layer, a layer that others share or use by its weight, or a rank that a layer does not have.
    """
    if kind.gate == "soft" or kind.targets != MATRICES:
        raise UsageError(
            "for a foreign model kind.targets stays as it is (give targets), and kind.gate is class or superclass; for "
            "soft weights call the model with a Gating of your own."
        )
    names = numbered(classes) if isinstance(classes, int) else classes
    table = slots_of_classes(names, kind, superclasses)
    slots, width = sizes_of(table)
    structure = Structure(
        rank=kind.learngene_rank, tailor_rank=kind.tailor_rank, slots=slots, gate_width=width
    )
    cell = Cell()
    new = ComponentModel(copy.deepcopy(model), names, structure, cell)
    new.gate.fill_(table)
    generator = torch.Generator().manual_seed(seed)
    for name in _chosen(model, targets):
        dense = new.inner.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        full = min(dense.weight.shape)
        for what, rank in (("learngene", kind.learngene_rank), ("tailor", kind.tailor_rank)):
            if rank > full:
                raise UsageError(
                    f"{what} rank {rank} is larger than the full rank {full} of {name!r}; use 1 to {full}, or leave it "
                    "out of the targets."
                )
        layer = empty_like(dense, structure)
        fill_components_(layer, copy.deepcopy(dense).float(), kind, structure, generator)
        if layer.bias is not None:
            layer.bias.data.copy_(dense.bias)
        layer.to(dense.weight)
        gated = GatedLinear(name, layer, dense.in_features, dense.out_features, cell)
        replace_(new.inner, name, gated.train(dense.training))
    new.gate.to(next(iter(new.inner.parameters())).device)
    new.training = new.gate.training = model.training  # the layers have what theirs had
    return new


def empty_like(like: nn.Linear | GatedLinear, structure: Structure) -> ComponentLinear:
    """Unset components of a layer's shape, with a bias where it has one."""
    layer = ComponentLinear(
        like.in_features,
        like.out_features,
        rank=structure.rank,
        slots=structure.slots,
        tailor_rank=structure.tailor_rank,
    )
    if (like.bias if isinstance(like, nn.Linear) else like.inner.bias) is None:
        layer.register_parameter("bias", None)
    return layer


def _chosen(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the layers that the patterns choose, in the model's order."""
    linear = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)}
    chosen: set[str] = set()
    for pattern in targets:
        matched = [name for name in linear if fnmatchcase(name, pattern)]
        if not matched:
            raise UsageError(
                f"target {pattern!r} matches no linear layer{nearest(pattern, linear)}; the model has {len(linear)}: "
                f"{shorten(linear, 6)}."
            )
        chosen.update(matched)
    if not chosen:
        raise UsageError("no targets are given; name the linear layers to factorise, for example '*.query'.")
    users = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name in chosen:
        if users[id(linear[name].weight)] > 1:
            raise UsageError(f"{name!r} shares its weight with another layer; leave it out of the targets.")
        if type(linear[name]) is not nn.Linear:
            raise UsageError(
                f"{name!r} is a {type(linear[name]).__name__}, not a plain nn.Linear: others may use its weight "
                "directly; leave it out of the targets."
            )
    return [name for name in linear if name in chosen]


def replace_(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in another's place, in place."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, layer)
