"""torch's fused attention against three plain operations, forward and backward, at a DiT's lengths.

    python benchmarks/attention.py

Each line is the ratio fused / plain of the fastest of several alternating runs: above 1 the plain one is faster.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = ((64, 3, 64, 64), (8, 6, 256, 64), (8, 12, 256, 64))
"""(batch, heads, tokens, width of a head)."""
REPEATS = 9


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1) @ v


def seconds(function, inputs: list[Tensor], gradient: Tensor) -> float:  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    function(*inputs).backward(gradient)
    return time.perf_counter() - start


def main() -> None:
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            inputs = [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(3)]
            gradient = torch.randn(shape, dtype=dtype)
            best = {"fused": float("inf"), "plain": float("inf")}
            for _ in range(REPEATS):
                for name, function in (("fused", F.scaled_dot_product_attention), ("plain", plain)):
                    best[name] = min(best[name], seconds(function, inputs, gradient))
            ratio = best["fused"] / best["plain"]
            print(f"{shape!s:<20}{str(dtype).removeprefix('torch.'):<10} fused / plain {ratio:.2f}")


if __name__ == "__main__":
    main()
