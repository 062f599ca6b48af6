"""What a model costs: parameters, bytes, and multiply-accumulates of one forward pass of one image.

The convention is MACs, named so: one multiplication and its addition count once (the "Gflops" column of the DiT
paper counts MACs too). Attention's two products are included; norms, softmax and activations are not.

B batch, T tokens, D width, R learngene rank, M active tailor components, I/O features in/out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kindiff.components import ComponentLinear
from kindiff.components.build import Structure
from kindiff.config import MATRICES, DiTConfig, from_dict
from kindiff.models.dit import FREQUENCIES, DiT

PARTS = ("learngenes", "tailors", "dense matrices", "modulation", "embeddings", "final layer", "attention")
"""Where parameters and MACs are, the rows of `kindiff inspect`."""


@dataclass(frozen=True)
class Cost:
    """The cost of one part: parameters (how many of them train), bytes in memory, MACs of one image."""

    parameters: int = 0
    trainable: int = 0
    bytes: int = 0
    macs: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters,
            self.trainable + other.trainable,
            self.bytes + other.bytes,
            self.macs + other.macs,
        )


def cost_table(model: DiT) -> dict[str, Cost]:
    """Cost by part of a model as it will run, its tailors on; parameters counted from its tensors, MACs from
    the closed formulas that `counted_macs` checks."""
    matrices = {name for name, _ in model.named_matrices()}
    table = dict.fromkeys(PARTS, Cost())
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        trains = count if parameter.requires_grad else 0
        part = _part_of(name, matrices, factored=model.structure is not None)
        table[part] += Cost(count, trains, count * parameter.element_size())
    for part, macs in closed_macs(model.config, _structure(model)).items():
        table[part] += Cost(macs=macs)
    return {part: cost for part, cost in table.items() if cost != Cost()}


def total(table: Mapping[str, Cost]) -> Cost:
    """The sum of a table's rows."""
    return sum(table.values(), start=Cost())


def closed_macs(config: DiTConfig, structure: Structure | None = None) -> dict[str, int]:
    """MACs of one image by part. structure None: dense matrices."""
    tokens, width = config.tokens, config.width
    shapes = {matrix: config.matrix_shape(matrix) for matrix in MATRICES}
    dense = sum(o * i for o, i in shapes.values())
    macs = dict.fromkeys(PARTS, 0)
    if structure is None or structure.rank is None:
        macs["dense matrices" if structure is None else "learngenes"] = config.depth * tokens * dense
    else:
        macs["learngenes"] = config.depth * tokens * structure.rank * sum(o + i for o, i in shapes.values())
    if structure is not None and structure.slots:
        width_on = structure.slots if structure.gate == "soft" else structure.gate_width
        tailored = sum(sum(shapes[matrix]) for matrix in structure.targets)
        macs["tailors"] = config.depth * tokens * structure.tailor_rank * width_on * tailored
        if structure.gate == "soft":
            macs["embeddings"] += width * (width + structure.slots)
    macs["attention"] = config.depth * 2 * tokens**2 * width
    macs["modulation"] = config.depth * 6 * width**2
    macs["embeddings"] += tokens * config.channels * config.patch**2 * width + FREQUENCIES * width + width**2
    macs["final layer"] = 2 * width**2 + tokens * width * config.patch**2 * config.out_channels
    return macs


def counted_macs(model: DiT) -> int:
    """MACs of one image as torch's own FLOP counter sees the real forward, on the meta device.

    Attention runs as plain products there, so that the counter sees it; products that are added in place are
    counted like those that are not. Component matrices lose their bias, which takes part in a product there.
    """
    twin = copy.deepcopy(model).to("meta")
    for module in twin.modules():
        if isinstance(module, ComponentLinear):
            module.register_parameter("bias", None)
    config = model.config
    x = torch.empty(1, config.channels, config.input_size, config.input_size, device="meta")
    ids = torch.zeros(1, dtype=torch.int64, device="meta")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _counter() as counter:
        twin(x, torch.empty(1, device="meta"), ids)
    return counter.get_total_flops() // 2


def _counter() -> FlopCounterMode:
    def in_place(
        y: Sequence[int],
        a: Sequence[int],
        b: Sequence[int],
        out_shape: Sequence[int] | None = None,
        **_: object,
    ) -> int:
        return 2 * math.prod(a) * b[-1]

    products = (torch.ops.aten.baddbmm_, torch.ops.aten.addmm_)
    return FlopCounterMode(display=False, custom_mapping=dict.fromkeys(products, in_place))


def _structure(model: DiT) -> Structure | None:
    return None if model.structure is None else from_dict(Structure, model.structure)


def _part_of(name: str, matrices: set[str], *, factored: bool) -> str:
    owner, _, leaf = name.rpartition(".")
    if owner in matrices:
        if leaf.startswith("tailor_"):
            return "tailors"
        return "learngenes" if factored else "dense matrices"
    if name.startswith("final."):
        return "final layer"
    return "modulation" if ".modulation." in name else "embeddings"


def tailor_parameters(model: DiT) -> int:
    """Parameters that belong to one class: its tailor and its row of the embedding."""
    bank = sum(p[0].numel() for n, p in model.named_parameters() if ".tailor_" in n)
    return bank + model.config.width
