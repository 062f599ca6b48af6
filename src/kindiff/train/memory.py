"""How much memory training takes, from the model's shape: docs/performance.md has the formula and its test.

T tokens, D width, H hidden width of the MLP, R learngene components, M tailor components of a sample.
"""

from __future__ import annotations

from pathlib import Path

import torch

from kindiff import native
from kindiff.components import fused, narrow
from kindiff.components.build import Structure
from kindiff.components.gates import TableGate
from kindiff.components.strategy import choose, slots_of_a_step
from kindiff.config import MATRICES, TrainConfig, from_dict
from kindiff.models.dit import DiT
from kindiff.models.layers import keeps_scores
from kindiff.runtime import precision_on

SIZE = {"bf16": 2, "fp32": 4}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Bytes that autograd keeps, counted on small models (tests/train/test_plan.py counts them again): a token of a block
# keeps so many times D and H, a value of a sample's gathered tailors so much.
KEPT = {"bf16": (35, 4), "fp32": (53, 8)}
PER_GATHERED = {"bf16": 4, "fp32": 6}
# The same where kindiff.native computes what is between the products.
KEPT_BY_KERNELS = {"bf16": (26, 4), "fp32": (42, 8)}


def memory(model: DiT, config: TrainConfig, images: int, device: torch.device) -> dict[str, int]:
    """Bytes by purpose of one process, alone, that trains on `images` at once. Temporaries of single operations, the
    loader and the library are not in it."""
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with_gradient = trained
    if type(model.gate) is TableGate:  # of the banks, a step's slots alone have gradients, and are copied
        banks = [p for n, p in model.named_parameters() if ".tailor_" in n and p.requires_grad]
        most = images * model.gate.slots_CK.shape[1]
        with_gradient += sum(2 * min(len(p), most) * p[0].numel() - p.numel() for p in banks)
    return {
        "weights": 4 * parameters,
        "gradients": 4 * with_gradient,
        "optimiser": 8 * trained,
        "average": 4 * trained,
        "activations": activations(
            model,
            precision_on(device, config.precision),
            images,
            device,
            recompute=config.recompute,
            compiled=config.compile,
        ),
    }


def activations(
    model: DiT,
    precision: str,
    images: int,
    device: torch.device,
    *,
    recompute: bool = False,
    compiled: bool = False,
) -> int:
    """Bytes that the backward pass of `images` at once needs from the forward pass.

    compiled: as a graph, which has none of the kernels for the CPU.
    recompute: of every block only its input is kept, and one block's activations at a time.
    """
    config = model.config
    kernels = device.type == "cpu" and native.usable() and not compiled
    multiplies = kernels and DTYPES[precision] in native.PRODUCTS
    size, (per_width, per_hidden) = SIZE[precision], (KEPT_BY_KERNELS if kernels else KEPT)[precision]
    shapes = [config.matrix_shape(matrix) for matrix in MATRICES]
    # Products with V that a token keeps; bytes of an image's own tailors, and of a step's.
    columns = gathered = rows = 0
    copies = sum(o * i for o, i in shapes) if precision == "bf16" else 0  # weights as the products take them
    if model.structure is not None:
        structure = from_dict(Structure, model.structure)
        rank, sides = structure.rank or 0, sum(o + i for o, i in shapes)
        tailored = sum(sum(config.matrix_shape(matrix)) for matrix in structure.targets)
        on = structure.slots if structure.gate == "soft" else structure.gate_width
        slots = slots_of_a_step(structure.gate, structure.slots, on, images)
        strategy = choose(
            "auto",
            slots=slots, components=structure.tailor_rank, on=on, device=device.type,
            dtype=DTYPES[precision], training=rank > 0, weights_train=structure.gate == "soft",
            mixed=structure.gate == "mixture",
            fits=fused.fits(structure.rank, on * structure.tailor_rank, DTYPES[precision]), kernels=multiplies,
        ).name if structure.tailor_rank else "gathered"  # fmt: skip
        tailors = structure.tailor_rank * (slots if strategy == "joined" else on)
        columns = rank * len(MATRICES) + tailors * len(structure.targets)
        if strategy == "joined":
            copies = rank * sides + tailors * tailored
            # u, for the gradient of sigma
            rows = 4 * tailors * sum(config.matrix_shape(matrix)[0] for matrix in structure.targets)
        else:
            # fp32: u times sigma, and the stacked V of q, k and v; the other V are the parameters themselves.
            sides = sides if precision == "bf16" else sum(o for o, _ in shapes) + 3 * config.width
            copies = rank * sides if rank else copies
            gathered = PER_GATHERED[precision] * tailors * tailored
            if multiplies and structure.gate == "table" and rank > 0 and 0 < 3 * tailors <= narrow.MANY:
                # A layer's pass is one kernel, which makes them again for the backward pass.
                copies, gathered = copies * (len(MATRICES) - len(structure.targets)) // len(MATRICES), 0
    copies += 6 * config.width**2 if precision == "bf16" else 0  # the modulation
    token = per_width * config.width + per_hidden * config.hidden + size * columns
    if (
        device.type == "cpu"
        and (multiplies or precision == "bf16")
        and keeps_scores(DTYPES[precision], config.tokens)
    ):
        token += size * config.heads * config.tokens
    block = config.tokens * token + gathered
    inputs = config.depth * config.tokens * config.width * 4 if recompute else 0
    blocks = 1 if recompute else config.depth
    return images * (inputs + blocks * block) + blocks * (size * copies + rows)


def free(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**62
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
