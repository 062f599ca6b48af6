"""torch's fused attention against three plain operations at a DiT's lengths, in training and in sampling.

    python benchmarks/attention.py

Each line is the ratio fused / plain of the fastest of several alternating runs: above 1 the plain one is faster.
"""

from __future__ import annotations

import itertools
import time

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = ((64, 3, 64, 64), (8, 6, 256, 64), (8, 12, 256, 64))
"""(batch, heads, tokens, width of a head)."""
REPEATS = 9


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1) @ v


def seconds(function, inputs: list[Tensor], gradient: Tensor, *, training: bool) -> float:  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    with torch.set_grad_enabled(training):
        y = function(*inputs)
    if training:
        y.backward(gradient)
    return time.perf_counter() - start


def main() -> None:
    for shape, dtype, training in itertools.product(SHAPES, (torch.bfloat16, torch.float32), (True, False)):
        inputs = [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(3)]
        gradient = torch.randn(shape, dtype=dtype)
        best = {"fused": float("inf"), "plain": float("inf")}
        for _ in range(REPEATS):
            for name, function in (("fused", F.scaled_dot_product_attention), ("plain", plain)):
                best[name] = min(best[name], seconds(function, inputs, gradient, training=training))
        ratio = best["fused"] / best["plain"]
        mode = "training" if training else "sampling"
        print(f"{shape!s:<20}{str(dtype).removeprefix('torch.'):<10}{mode:<10}fused / plain {ratio:.2f}")


if __name__ == "__main__":
    main()
