"""torch's operations against what the model has in their place on a CPU, at a DiT's shapes, training and sampling.

    python benchmarks/operations.py [fp32] [bf16]

Attention (also against torch's fused one), GELU, norm with modulation, gated residual and a layer of components (an
MLP's first, a class for each image): with the kernels of kindiff.native against the same without them. Each line is the
ratio torch's / ours of the fastest of several alternating runs: above 1 ours is faster.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kindiff import native
from kindiff.allocator import keep_memory
from kindiff.components import ComponentLinear
from kindiff.models import Gating
from kindiff.models.activation import gelu
from kindiff.models.layers import add_gated, attend, modulate
from kindiff.train.memory import DTYPES

HEADS = ((64, 64, 192, 3), (8, 256, 384, 6), (8, 256, 768, 12))
"""(batch, tokens, width, heads)."""
WIDTHS = ((32, 64, 128), (8, 256, 384), (8, 256, 768))
"""(batch, tokens, width); the MLP is four times as wide."""
REPEATS = 9

Run = Callable[..., Tensor]


def fused_attention(*parts: Tensor, heads: int) -> Tensor:
    by_head = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in parts)
    return F.scaled_dot_product_attention(*by_head).transpose(1, 2).flatten(2)


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    kernels, native.calls.kernels = native.calls.kernels, lambda: None
    try:
        yield
    finally:
        native.calls.kernels = kernels


def layer_of(width: int, batch: int) -> Run:
    """The first layer of a MLP, N_G = width / 4, N_T = 4, a class for each image."""
    layer = ComponentLinear(width, 4 * width, rank=width // 4, slots=batch, tailor_rank=4)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    gating = Gating(torch.arange(batch).unsqueeze(1), torch.ones(batch, 1))
    return lambda x: layer(x, gating)


def cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[int, ...], list[Tensor], Run, Run]]:
    """Name, shape, inputs, torch's way (which will have no kernels) and ours."""
    for *shape, heads in HEADS:
        inputs = [torch.randn(shape, dtype=dtype) for _ in range(3)]
        ours = functools.partial(attend, heads=heads)
        yield "attention", (*shape, heads), inputs, ours, ours
        yield "its fused", (*shape, heads), inputs, functools.partial(fused_attention, heads=heads), ours
    for shape in WIDTHS:
        batch, tokens, width = shape
        x, hidden = torch.randn(shape), torch.randn(batch, tokens, 4 * width, dtype=dtype)
        y, rows = torch.randn(shape, dtype=dtype), [torch.randn(batch, width) for _ in range(2)]
        norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        functions: tuple[tuple[str, list[Tensor], Run], ...] = (
            ("GELU", [hidden], gelu),
            ("norm", [x, *rows], lambda *inputs, norm=norm: modulate(norm, *inputs).to(dtype)),
            ("residual", [x, rows[0], y], add_gated),
            ("components", [x.to(dtype)], layer_of(width, batch)),
        )
        for name, inputs, ours in functions:
            yield name, shape, inputs, ours, ours


def seconds(function: Run, inputs: list[Tensor], *, training: bool) -> float:
    inputs = [tensor.detach().requires_grad_(training) for tensor in inputs]
    start = time.perf_counter()
    with torch.set_grad_enabled(training):
        y = function(*inputs)
    if not training:
        return time.perf_counter() - start
    forward, gradient = time.perf_counter() - start, torch.ones_like(y)
    start = time.perf_counter()
    y.backward(gradient)
    return forward + time.perf_counter() - start


def main() -> None:
    keep_memory()
    for dtype in [DTYPES[name] for name in sys.argv[1:] or DTYPES]:
        for (name, shape, inputs, theirs, ours), training in itertools.product(cases(dtype), (True, False)):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                rounds = []
                for _ in range(REPEATS):
                    with without_kernels():
                        plain = seconds(theirs, inputs, training=training)
                    rounds.append((plain, seconds(ours, inputs, training=training)))
            best, our_best = (min(times) for times in zip(*rounds, strict=True))
            mode = "training" if training else "sampling"
            print(
                f"{name:<11}{shape!s:<20}{str(dtype).removeprefix('torch.'):<10}{mode:<10}{best / our_best:.2f}"
            )


if __name__ == "__main__":
    main()
