"""Taking a foreign model apart, putting models together from its parts, and merging one class into plain layers.

N components of a tailor, R learngene components, O/I features out/in.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from kindiff.classes import ClassSet
from kindiff.components import algebra
from kindiff.components.algebra import Factors
from kindiff.components.anymodel import Cell, ComponentModel, GatedLinear, empty_like, replace_
from kindiff.components.build import Structure
from kindiff.errors import UsageError


@dataclass(frozen=True)
class ModuleParts:
    """The parts of a foreign model: its learngenes, a model that runs by itself, and a tailor for each class.

    learngenes: the model without tailors. tailors: for each class and layer name u (N, O), sigma (N,), v (N, I).
    """

    learngenes: ComponentModel
    tailors: dict[str, dict[str, Factors]]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.tailors)

    def recombine(
        self, classes: Iterable[str] | None = None, *, learngene_rank: int | None = None
    ) -> ComponentModel:
        """A new model of these classes (None: all), its learngenes cut to a rank by their singular values.

        UsageError for an unknown class or a rank that the parts do not hold.
        """
        wanted = ClassSet(tuple(self.classes if classes is None else classes))
        ClassSet(self.classes).ids(wanted.names)
        held = self.learngenes.structure.rank
        assert held is not None
        rank = held if learngene_rank is None else learngene_rank
        if not 1 <= rank <= held:
            raise UsageError(
                f"learngene rank {rank} is not in the parts; they hold {held}, so use 1 to {held}."
            )
        counts = {len(f.sigma) for name in wanted.names for f in self.tailors[name].values()}
        structure = Structure(rank=rank, tailor_rank=max(counts, default=0), slots=len(wanted))
        return _rebuilt(self.learngenes, wanted, structure, self.tailors)


@torch.no_grad()
def decompose_modules(model: ComponentModel) -> ModuleParts:
    """Take a model apart; the parts are copies. A class's tailor is the components of all its slots."""
    gating = model.gate(
        torch.arange(len(model.classes), device=model.gate.slots_CK.device), model.gate.slots_CK
    )
    tailors: dict[str, dict[str, Factors]] = {}
    for i, name in enumerate(model.classes.names):
        tailors[name] = {
            layer_name: layer.inner.tailor_of(gating, i)
            for layer_name, layer in model.layers().items()
            if layer.inner.has_tailors
        }
    bare = Structure(rank=model.structure.rank, tailor_rank=0, slots=0)
    return ModuleParts(_rebuilt(model, model.classes, bare, {}), tailors)


@torch.no_grad()
def merge_modules(model: ComponentModel, name: str | None) -> nn.Module:
    """The inner model of one class (None: of the learngenes alone) with plain nn.Linear layers again; a copy."""
    id_ = model.classes.null_id if name is None else model.classes.id(name)
    gating = model.gate(torch.tensor([id_], device=model.gate.slots_CK.device), model.gate.slots_CK)
    plain = copy.deepcopy(model.inner)
    for layer_name, layer in model.layers().items():
        inner = layer.inner
        dense = nn.Linear(layer.in_features, layer.out_features, bias=inner.bias is not None).to(inner.u)
        dense.weight.copy_(inner.merged_weight(gating))
        if inner.bias is not None:
            dense.bias.copy_(inner.bias)
        replace_(plain, layer_name, dense.train(layer.training))
    return plain


@torch.no_grad()
def _rebuilt(
    model: ComponentModel,
    classes: ClassSet,
    structure: Structure,
    tailors: Mapping[str, Mapping[str, Factors]],
) -> ComponentModel:
    """A copy with other classes, tailors or learngene rank."""
    cell = Cell()
    new = ComponentModel(copy.deepcopy(model.inner), classes, structure, cell)
    for name, old in model.layers().items():
        layer = empty_like(old, structure)
        own = Factors(old.inner.u, old.inner.sigma, old.inner.v)
        if structure.rank is not None and structure.rank < len(own.sigma):
            own = algebra.canonical(own).first(structure.rank)
        for leaf, tensor in own._asdict().items():
            getattr(layer, leaf).copy_(tensor)
        if layer.bias is not None:
            layer.bias.copy_(old.inner.bias)
        if layer.has_tailors:
            for slot, class_name in enumerate(classes.names):
                for leaf, tensor in tailors[class_name][name]._asdict().items():
                    bank = getattr(layer, f"tailor_{leaf}")
                    bank[slot].zero_()
                    bank[slot, : len(tensor)].copy_(tensor)
        layer.to(old.inner.u)
        gated = GatedLinear(name, layer, old.in_features, old.out_features, cell)
        replace_(new.inner, name, gated.train(old.training))
    if structure.slots:
        new.gate.fill_([[i] for i in range(len(classes))])
    new.training = new.gate.training = model.training
    return new.to(model.gate.slots_CK.device)
