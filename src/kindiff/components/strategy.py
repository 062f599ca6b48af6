"""Which of several equal ways computes component matrices: the rule, its measured crossovers, and its reasons.

factored  learngenes as two thin products; or dense, folded into one weight. Decided when a model is recombined.
gathered  a sample's own tailors as narrow batched products, added to the learngenes' output.
joined    all tailors of the bank in the learngenes' products, each sample's columns masked: no narrow products and
          no copies, for S times the tailors' multiplications. For few slots, and in training only: without gradients
          a model and one recombined from it are to agree to the bit, whatever other classes they have.

S slots, K slots per sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from kindiff.config import MATRICES, DiTConfig
from kindiff.errors import UsageError
from kindiff.models.layers import Gating

if TYPE_CHECKING:
    from kindiff.components.linear import ComponentLinear
    from kindiff.models.dit import DiT

Choice = Literal["auto", "gathered", "joined"]

JOINED_UP_TO = {("cpu", torch.float32): 6, ("cpu", torch.bfloat16): 16}
"""Slots for each one that a sample has, up to which `joined` is faster than `gathered`: one narrow product costs as
much as so many times its operations within a wide one. Measured: `python benchmarks/strategies.py`."""
JOINED_ELSEWHERE = 4
"""The same where it was not measured."""


@dataclass(frozen=True)
class Strategy:
    """A choice and what decided it."""

    name: Literal["gathered", "joined"]
    why: str


def strategy_of(layer: ComponentLinear, gating: Gating, dtype: torch.dtype) -> Strategy:
    """How a layer's tailors are computed; decided by shapes alone, so that no batch compiles anything again."""
    return choose(
        layer.strategy,
        slots=len(layer.tailor_sigma),
        on=gating.slots_BK.shape[1],
        device=layer.tailor_sigma.device.type,
        dtype=dtype,
        training=torch.is_grad_enabled() and layer.tailor_u.requires_grad and layer.u.requires_grad,
        weights_train=gating.weights_BK.requires_grad,
    )


def choose(
    wanted: Choice,
    *,
    slots: int,
    on: int,
    device: str,
    dtype: torch.dtype,
    training: bool,
    weights_train: bool = False,
) -> Strategy:
    """The rule itself. slots: S of the bank; on: K."""
    if weights_train:
        return Strategy("gathered", "the gate's weights train, and a mask has no gradient")
    if wanted != "auto":
        return Strategy(wanted, "asked for")
    if not training:
        return Strategy("gathered", "learngenes or tailors do not train; equal to the bit for any set of classes")
    limit = JOINED_UP_TO.get((device, dtype), JOINED_ELSEWHERE) * on
    if slots <= limit:
        return Strategy("joined", f"{slots} slots in the batch's bank, at most {limit}")
    return Strategy("gathered", f"{slots} slots in the batch's bank, more than {limit}")


def set_strategy_(model: DiT, wanted: Choice) -> DiT:
    """Overrule the rule in every component matrix of a model, in place; "auto" gives it back."""
    if wanted not in ("auto", "gathered", "joined"):
        raise UsageError(f"strategy {wanted!r} is not known; use auto, gathered or joined.")
    for module in model.modules():
        if hasattr(module, "strategy"):
            module.strategy = wanted
    return model


def factored_is_cheaper(config: DiTConfig, rank: int) -> bool:
    """Whether learngenes of this rank cost fewer multiplications as components than as dense weights."""
    factored, dense = matrix_macs(config, rank)
    return factored < dense


def matrix_macs(config: DiTConfig, rank: int) -> tuple[int, int]:
    """Multiply-accumulates of one token in the matrices of a block: as components of a rank, and dense."""
    shapes = [config.matrix_shape(matrix) for matrix in MATRICES]
    return rank * sum(o + i for o, i in shapes), sum(o * i for o, i in shapes)
