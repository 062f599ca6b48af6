"""How much memory training takes, from the model's shape: docs/performance.md has the formula and its test.

T tokens, D width, H hidden width of the MLP, R learngene components, M tailor components of a sample.
"""

from __future__ import annotations

from pathlib import Path

import torch

from kindiff.components.build import Structure
from kindiff.config import MATRICES, TrainConfig, from_dict
from kindiff.models.dit import DiT

# Bytes that autograd keeps, counted on small models (tests/train/test_plan.py counts them again): a token of a block
# keeps so many times D and H, a component of a matrix so much a token, a value of a sample's gathered tailors so much.
KEPT = {"bf16": (35, 4, 2, 4), "fp32": (53, 8, 4, 6)}


def memory(model: DiT, config: TrainConfig, images: int, device: torch.device) -> dict[str, int]:
    """Bytes by purpose of one process that trains on `images` at once. Temporaries of single operations, the loader
    and the library are not in it."""
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "weights": 4 * parameters,
        "gradients": 4 * trained,
        "optimiser": 8 * trained,
        "average": 4 * trained,
        "activations": activations(model, config.precision, images, device, recompute=config.recompute),
    }


def activations(
    model: DiT, precision: str, images: int, device: torch.device, *, recompute: bool = False
) -> int:
    """Bytes that the backward pass of `images` at once needs from the forward pass.

    recompute: of every block only its input is kept, and one block's activations at a time.
    """
    config = model.config
    per_width, per_hidden, per_component, per_gathered = KEPT[precision]
    structure = None if model.structure is None else from_dict(Structure, model.structure)
    components = gathered = 0
    if structure is not None:
        on = structure.slots if structure.gate == "soft" else structure.gate_width
        tailors = structure.tailor_rank * on
        components = (structure.rank or 0) * len(MATRICES) + tailors * len(structure.targets)
        gathered = tailors * sum(sum(config.matrix_shape(matrix)) for matrix in structure.targets)
    token = per_width * config.width + per_hidden * config.hidden + per_component * components
    if precision == "bf16" and device.type == "cpu":
        token += 2 * config.heads * config.tokens  # attention in plain operations keeps its scores
    block = config.tokens * token + per_gathered * gathered
    sample = block + config.depth * config.tokens * config.width * 4 if recompute else config.depth * block
    return images * sample + _casts(model, precision, structure)


def free(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**62
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _casts(model: DiT, precision: str, structure: Structure | None) -> int:
    """Copies of the weights in the arithmetic of the products, and of u times sigma."""
    config = model.config
    dense = sum(o * i for o, i in map(config.matrix_shape, MATRICES))
    scaled = rank = 0
    if structure is not None and structure.rank is not None:
        rank = structure.rank * sum(sum(config.matrix_shape(matrix)) for matrix in MATRICES)
        scaled = 4 * structure.rank * sum(config.matrix_shape(matrix)[0] for matrix in MATRICES)
    if precision == "fp32":
        return config.depth * scaled
    matrices = rank if rank else dense
    return config.depth * 2 * (matrices + 6 * config.width**2)
