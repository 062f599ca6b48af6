"""torch's operations against what the model has in their place on a CPU, at a DiT's shapes, training and sampling.

    python benchmarks/operations.py [fp32] [bf16]

Attention against three plain operations, GELU by the hyperbolic tangent against ours by the sigmoid. Each line is the
ratio torch's / ours of the fastest of several alternating runs: above 1 ours is faster.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kindiff.allocator import keep_memory
from kindiff.models.activation import gelu
from kindiff.train.memory import DTYPES

HEADS = ((64, 3, 64, 64), (8, 6, 256, 64), (8, 12, 256, 64))
"""(batch, heads, tokens, width of a head)."""
HIDDEN = ((32, 64, 512), (8, 256, 1536), (8, 256, 3072))
"""(batch, tokens, width of the MLP)."""
REPEATS = 9


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1) @ v


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def seconds(
    function: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor, *, training: bool
) -> float:
    start = time.perf_counter()
    with torch.set_grad_enabled(training):
        y = function(*inputs)
    if training:
        y.backward(gradient)
    return time.perf_counter() - start


def main() -> None:
    keep_memory()
    dtypes = [DTYPES[name] for name in sys.argv[1:] or DTYPES]
    operations = (
        ("attention", HEADS, 3, F.scaled_dot_product_attention, plain_attention),
        ("GELU", HIDDEN, 1, tanh_gelu, gelu),
    )
    for name, shapes, count, theirs, ours in operations:
        for shape, dtype, training in itertools.product(shapes, dtypes, (True, False)):
            inputs = [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(count)]
            gradient = torch.randn(shape, dtype=dtype)
            rounds = [
                [seconds(function, inputs, gradient, training=training) for function in (theirs, ours)]
                for _ in range(REPEATS)
            ]
            best, our_best = (min(times) for times in zip(*rounds, strict=True))
            mode = "training" if training else "sampling"
            print(
                f"{name:<11}{shape!s:<20}{str(dtype).removeprefix('torch.'):<10}{mode:<10}{best / our_best:.2f}"
            )


if __name__ == "__main__":
    main()
