"""Hot swap: another class in a model's slot, in place, while the model stays as it was built and compiled.

D width, N components of a tailor, O/I features out/in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kindiff.checkpoint import hash_tensors
from kindiff.classes import ClassSet
from kindiff.components.assembly import factors_of, fill_slot_
from kindiff.components.gates import TableGate
from kindiff.components.linear import ComponentLinear
from kindiff.components.parts import EMBEDDING, Components
from kindiff.components.split import learngenes_of
from kindiff.errors import UsageError
from kindiff.models.dit import DiT


@dataclass(frozen=True)
class Tailor:
    """One class, apart from the learngenes that it fits."""

    name: str
    """The class."""
    tensors: Mapping[str, Tensor]
    """For each matrix u (N, O), sigma (N,), v (N, I), and the class embedding (D,), by their names in parts."""
    learngenes: str
    """`Components.learngene_hash` of what it was trained with."""

    @staticmethod
    def of(parts: Components, name: str) -> Tailor:
        """A class of parts in memory (`load_tailor` reads one alone); UsageError for an unknown one."""
        ClassSet(parts.classes).id(name)
        return Tailor(name, parts.tailors[name], parts.learngene_hash)


@torch.no_grad()
def swap_tailor_(model: DiT, old: str, tailor: Tailor, *, check: bool = True) -> DiT:
    """Put a class in the place of class `old`: its components in the slot, its row in the embedding; in place.

    The model is then the one that recombining with the new class at that place gives, to the bit where the
    tailors have equal ranks. No tensor is made anew, so a compiled model stays compiled. check: compare the
    hash of the learngenes, where the model holds them whole and factored; that reads them all, so a service
    that swaps often checks once.

    UsageError for an unknown class, one that the model has already, a model where `old` has no slot of its own,
    a tailor that is larger than the slot or has other matrices, or other learngenes; nothing is changed then.
    """
    row = model.classes.id(old)
    names = (*model.classes.names[:row], tailor.name, *model.classes.names[row + 1 :])
    classes = ClassSet(names)
    slot = _own_slot(model, row)
    layers = {
        name: layer
        for name, layer in model.named_matrices()
        if isinstance(layer, ComponentLinear) and layer.has_tailors
    }
    wanted = {f"{name}.{leaf}" for name in layers for leaf in ("u", "sigma", "v")} | {EMBEDDING}
    if foreign := sorted(tailor.tensors.keys() - wanted):
        raise UsageError(f"the model has no tailor slot for {foreign[0]!r} of the tailor of {tailor.name!r}.")
    for name, layer in layers.items():
        if f"{name}.sigma" in tailor.tensors:
            _check_fits(name, layer, tailor)
    if check and model.structure is not None and model.structure["rank"] is not None:
        whole = hash_tensors(learngenes_of(model))
        if whole != tailor.learngenes:
            raise UsageError(
                f"the tailor of {tailor.name!r} belongs to other learngenes than the model's, or the model holds "
                "fewer components of them; recombine from the tailor's own parts, or pass check=False if you know "
                "that they fit."
            )
    for name, layer in layers.items():
        fill_slot_(layer.tailors, slot, tailor.tensors, name)
    model.class_embed.weight[row].copy_(tailor.tensors[EMBEDDING])
    model.classes = classes
    return model


def _own_slot(model: DiT, row: int) -> int:
    """The slot of a class that no other class uses."""
    gate = model.gate
    slots_CK = gate.slots_CK[:-1] if isinstance(gate, TableGate) else None
    if slots_CK is None or slots_CK.shape[1] != 1 or int((slots_CK == slots_CK[row]).sum()) != 1:
        raise UsageError(
            f"class {model.classes.names[row]!r} has no tailor slot of its own in this model; swapping needs one "
            "that was recombined with factored or dense layers."
        )
    return int(slots_CK[row])


def _check_fits(name: str, layer: ComponentLinear, tailor: Tailor) -> None:
    room = tuple(tensor[0] for tensor in layer.tailors)
    for tensor, place in zip(factors_of(tailor.tensors, name), room, strict=True):
        if len(tensor) > len(place) or tensor.shape[1:] != place.shape[1:]:
            raise UsageError(
                f"{name} of the tailor of {tailor.name!r} is {tuple(tensor.shape)} and the model's slot "
                f"{tuple(place.shape)}; recombine with the largest tailor first."
            )
