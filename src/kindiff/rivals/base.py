"""What a rival is, and the two steps that all share: the base's weights for new classes, and a plain DiT again.

C classes, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kindiff.classes import ClassSet
from kindiff.config import DiTConfig, RivalConfig
from kindiff.errors import UsageError
from kindiff.models.dit import DiT
from kindiff.models.layers import position_table

CLASS_ROWS = "class_embed.weight"


def own_weight(layer: nn.Module) -> Tensor:
    """The weight of a plain dense layer."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A method, as two functions."""

    wrap: Callable[[DiT, RivalConfig, int], DiT]
    """(a dense model of the new classes, settings, seed) -> the model to train, what trains marked by requires_grad.
    The model is the method's own and may be changed; torch's generator is seeded already."""
    weight: Callable[[nn.Module], Tensor] = own_weight
    """The dense weight (O, I) that a trained matrix stands for."""
    foreign: bool = False
    """Whether its layers are another library's, so that no file of ours says how to build them."""
    keeps: float | None = None
    """How close the forward before training is to the base's, absolute and relative; None for no promise."""


def for_classes(base: DiT, classes: ClassSet) -> DiT:
    """A new dense model of new classes: every class starts from the mean of the base's, the null row is the base's.

    UsageError for a model of components.
    """
    if base.structure is not None:
        raise UsageError(
            "the base is made of components; rivals start from a dense model (pre-train with method dense, or "
            "recombine one class with layers merged)."
        )
    state = {name: tensor.detach().clone() for name, tensor in base.state_dict().items()}
    state[CLASS_ROWS] = rows_of_new_classes(state[CLASS_ROWS], len(classes))
    return dense(dataclasses.replace(base.config, num_classes=len(classes)), classes, state)


def rows_of_new_classes(rows_CD: Tensor, count: int) -> Tensor:
    """The embedding of `count` new classes, (count + 1, D): the mean of the old ones, and the old null row."""
    return torch.cat([rows_CD[:-1].mean(dim=0).expand(count, -1), rows_CD[-1:]])


def dense(config: DiTConfig, classes: ClassSet, state: Mapping[str, Tensor]) -> DiT:
    """A plain DiT that holds these very tensors; all of it trains."""
    with torch.device("meta"):
        model = DiT(config, classes=classes)
    model.load_state_dict(state, assign=True)
    model.positions_TD = position_table(config.width, config.input_size // config.patch)
    return model.requires_grad_(True)


@torch.no_grad()
def densified(model: DiT, weight: Callable[[nn.Module], Tensor] = own_weight) -> DiT:
    """A plain DiT of copies; what a matrix does not hold as a tensor of that name comes from `weight` and its bias."""
    own = model.state_dict()
    with torch.device("meta"):
        names = list(DiT(model.config, classes=model.classes).state_dict())
    state = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        if name in own:
            tensor = own[name]
        else:
            layer = model.get_submodule(owner)
            tensor = weight(layer) if leaf == "weight" else layer.bias  # type: ignore[assignment]
        state[name] = tensor.detach().clone()
    return dense(model.config, model.classes, state)
