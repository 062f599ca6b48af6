"""Which of several equal ways computes component matrices: the rule, its measured crossovers, and its reasons.

factored  learngenes as two thin products; or dense, folded into one weight. Decided when a model is recombined.
gathered  a sample's own tailors as narrow batched products, to which the learngenes' are added.
fused     a sample's own tailors inside the learngenes' products, by kernels of our own: half precision on a GPU.
joined    all tailors of the bank in the learngenes' products (beside them where those are frozen), each sample's
          columns masked: no narrow products and no copies for each sample, for S times the tailors' multiplications.
          For few slots, and in training only: without gradients a model and one recombined from it are to agree to
          the bit, whatever other classes they have.

S slots, N components of a slot, K slots per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from kindiff import native
from kindiff.components import fused, narrow
from kindiff.config import MATRICES, DiTConfig
from kindiff.errors import UsageError
from kindiff.models.layers import Gating
from kindiff.native import MATRIX_UNITS, compiled

if TYPE_CHECKING:
    from kindiff.components.linear import ComponentLinear
    from kindiff.models.dit import DiT

Choice = Literal["auto", "gathered", "fused", "joined"]

JOINED_COLUMNS = {("cpu", torch.float32): 24, ("cpu", torch.bfloat16): 112 if MATRIX_UNITS else 24}
"""Components of a bank (S N, for each slot that a sample has) up to which `joined` is faster than `gathered` by the
library's products, of which a narrow one costs as much whatever its few columns are. Measured: `python
benchmarks/strategies.py`, with matrix units and without."""
FEW_SHARED = 12
"""Components that all samples share up to which kernels of our own are faster with a sample's own in their pass than
`joined`; level at 16. By the same command."""
UNMEASURED_COLUMNS = 16
"""The same for other devices, until it is measured there."""
MIXED_SLOTS = {
    ("cpu", torch.float32): 2 if MATRIX_UNITS else 1.25,
    ("cpu", torch.bfloat16): 4 if MATRIX_UNITS else 1.5,
}
"""Slots of a mixture's bank, for each that a sample has, up to which all of them together are faster; on other devices,
until it is measured there, 1. By the same command."""
FACTORED_SHARE = 0.85
"""Learngenes are kept as components while these take at most this share of the dense matrices' multiplications: thin
products are less efficient. Measured by the same command, in fp32 on a CPU."""


@dataclass(frozen=True)
class Strategy:
    """A choice and what decided it."""

    name: Literal["gathered", "fused", "joined"]
    why: str


def strategy_of(layers: Sequence[ComponentLinear], gating: Gating, dtype: torch.dtype) -> Strategy:
    """How the tailors of layers that share an input are computed; decided by shapes alone: no batch compiles again."""
    layer, on = layers[0], gating.slots_BK.shape[1]
    slots, components = layer.tailor_sigma.shape
    return choose(
        layer.strategy,
        slots=slots,
        components=components,
        on=on,
        device=layer.tailor_sigma.device.type,
        dtype=dtype,
        training=torch.is_grad_enabled() and layer.tailor_u.requires_grad,
        weights_train=gating.weights_BK.requires_grad,
        mixed=torch.is_grad_enabled() and layer.tailor_mix is not None,
        kernels=None if all(_for_kernels(each) for each in layers) else False,
        fits=len({(each.rank, each.tailor_u.shape[2], each.bias is None) for each in layers}) == 1
        and fused.fits(layer.rank, on * components, dtype),
    )


def _for_kernels(layer: ComponentLinear) -> bool:
    return layer.bias is not None and layer.tailor_sigma.dtype == torch.float32


def choose(
    wanted: Choice,
    *,
    slots: int,
    components: int,
    on: int,
    device: str,
    dtype: torch.dtype,
    training: bool,
    weights_train: bool = False,
    mixed: bool = False,
    fits: bool = False,
    kernels: bool | None = None,
) -> Strategy:
    """The rule itself. slots: S of the bank; components: N of a slot; on: K; fits: `fused.fits`; kernels: whether those
    of `kindiff.native` compute the layers' passes in this dtype, by default what this CPU has."""
    own: Literal["gathered", "fused"] = "fused" if fits and device == "cuda" else "gathered"
    if wanted == "fused" and not fits:
        raise UsageError(
            "strategy 'fused' needs Triton, half precision, a learngene rank that 16 divides, at most "
            f"{fused.FEW[-1]} tailor components a sample and one shape of what shares an input; use auto."
        )
    if weights_train and wanted in ("auto", "joined"):
        return Strategy(own, "the gate's weights train, and a mask has no gradient")
    if wanted != "auto":
        return Strategy(wanted, "asked for")
    if mixed:
        if slots <= MIXED_SLOTS.get((device, dtype), 1) * on:
            return Strategy("joined", f"a mixture: each class has {on} of {slots} tailors")
        return Strategy("gathered", f"a mixture: each class has but {on} of {slots} tailors")
    if not training:
        return Strategy(own, "no tailor trains: equal to the bit for any set of classes")
    kernels = dtype in native.PRODUCTS and native.usable() if kernels is None else kernels
    limit = JOINED_COLUMNS.get((device, dtype), UNMEASURED_COLUMNS) * on
    size = f"{slots} slots x {components} components in a step's bank"
    shared, few = slots <= on, narrow.MANY // 3  # q, k and v are together
    if kernels and device == "cpu" and components * on <= (FEW_SHARED if shared else few):
        return Strategy(own, "kernels of our own on a CPU: tailors and learngenes in one pass")
    if shared:
        return Strategy("joined", f"{size}, all on for every sample: no copies for each")
    if own == "fused":
        return Strategy(own, "half precision on a GPU: the tailors ride in the learngenes' products")
    if slots * components <= limit:
        return Strategy("joined", f"{size}, at most {limit}")
    return Strategy("gathered", f"{size}, more than {limit}")


def set_strategy_(model: DiT, wanted: Choice) -> DiT:
    """Overrule the rule in every component matrix of a model, in place; "auto" gives it back."""
    if wanted not in get_args(Choice):
        raise UsageError(f"strategy {wanted!r} is not known; use auto, gathered, fused or joined.")
    for module in model.modules():
        if hasattr(module, "strategy"):
            module.strategy = wanted  # type: ignore[assignment]
    return model


def factored_is_cheaper(config: DiTConfig, rank: int) -> bool:
    """Whether learngenes of this rank are faster as components than folded into dense weights."""
    factored, dense = matrix_macs(config, rank)
    return factored <= FACTORED_SHARE * dense


def matrix_macs(config: DiTConfig, rank: int) -> tuple[int, int]:
    """Multiply-accumulates of one token in the matrices of a block: as components of a rank, and dense."""
    shapes = [config.matrix_shape(matrix) for matrix in MATRICES]
    return rank * sum(o + i for o, i in shapes), sum(o * i for o, i in shapes)


def slots_of_a_step(gate: str, slots: int, on: int, images: int) -> int:
    """Slots that a training step's products see: under a table those of its classes at the most, which stand apart from
    their bank (`kindiff.train.apart`), and else the whole bank."""
    return min(slots, images * on) if gate == "table" else slots


def explain(model: DiT, images: int) -> list[str]:
    """What the rule decides on this machine for a model and a batch of images, and why: a line a decision."""
    structure, device = model.structure, "cuda" if torch.cuda.is_available() else "cpu"
    kernels, where = compiled.found()
    between = [f"between the products, on a CPU: {'kernels of our own' if kernels else 'torch'} ({where})"]
    if structure is None:
        return ["dense matrices: nothing to choose", *between]
    rank, soft = structure["rank"], structure["gate"] == "soft"
    on = structure["slots"] if soft else structure["gate_width"]
    full = min(min(model.config.matrix_shape(matrix)) for matrix in MATRICES)
    factored, dense = matrix_macs(model.config, rank or full)
    if rank is None:
        lines = ["learngenes: dense, as the model was recombined"]
    else:
        lines = [
            f"learngenes: components of rank {rank}, {factored / dense:.2f} of the dense matrices' multiplications "
            f"({'faster' if factored_is_cheaper(model.config, rank) else 'slower'} than dense: the limit is "
            f"{FACTORED_SHARE})"
        ]
    if not structure["slots"] * structure["tailor_rank"]:
        return [*lines, "tailors: none", *between]
    slots = {
        "sampling": structure["slots"],
        "training": slots_of_a_step(structure["gate"], structure["slots"], on, images),
    }
    for purpose, count in slots.items():
        for dtype in (torch.float32, torch.bfloat16):
            found = choose(
                "auto", slots=count, components=structure["tailor_rank"], on=on, device=device, dtype=dtype,
                training=purpose == "training" and rank is not None, weights_train=soft and purpose == "training",
                mixed=purpose == "training" and structure["gate"] == "mixture",
                fits=fused.fits(rank, on * structure["tailor_rank"], dtype),
            )  # fmt: skip
            name = str(dtype).removeprefix("torch.")
            lines.append(f"tailors, {purpose}, {name}, {images} images, {device}: {found.name}: {found.why}")
    return lines + between
