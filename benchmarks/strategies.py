"""Where one way of computing component matrices becomes faster than another: the crossovers of the cost rule.

    python benchmarks/strategies.py      -> benchmarks/results/strategies.json

Forward and backward of the q, k, v and MLP matrices of a DiT-B, N_G = 192, N_T = 4, every variant in turn, medians of
ratios within a round. `joined` against `gathered` by the number of slots in the batch's bank; of one slot that all
samples share, by its components; and for mixtures of 8 tailors (N_T = 13, weights train) by the number of tailors that
are known; `sorted` (one product for
each class's samples, as grouped products would do it) against both by the classes in a batch; `merged` (one dense
weight for the class that fills a batch) against components by the learngene rank, in sampling.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from speed import alternate, dtypes, ratios, save
from torch import Tensor

from kindiff import runtime
from kindiff.allocator import keep_memory
from kindiff.components import ComponentLinear
from kindiff.models import Gating

WIDTH, HIDDEN, RANK, TAILOR = 768, 3072, 192, 4
SLOTS = (1, 2, 4, 6, 8, 12, 16, 24, 32)
SHARED = (4, 8, 12, 16, 32)
CLASSES = (1, 2, 4, 8)
RANKS = (128, 192, 256, 320, 384, 512)
MIXED, MIXED_TAILOR = 8, 13
KNOWN = (8, 12, 16, 20, 24, 32)


@dataclass(frozen=True, kw_only=True)
class Args:
    rounds: int = 9
    """Rounds; each runs every variant once."""
    images: int = 32
    """Images a batch."""
    tokens: int = 64
    """Tokens an image."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: Literal["", "fp32", "bf16"] = ""
    """One arithmetic only."""
    out: Path | None = None
    """Where the JSON goes."""


def matrices(
    rank: int, slots: int, device: torch.device, mixing_classes: int = 0, components: int = TAILOR
) -> list[list[ComponentLinear]]:
    """q, k and v together, the MLP's two. mixing_classes: their weights train, and nothing else."""
    size = {"rank": rank, "slots": slots, "tailor_rank": MIXED_TAILOR if mixing_classes else components}
    mix = (mixing_classes, MIXED) if mixing_classes else None
    shapes = [[(WIDTH, WIDTH)] * 3, [(WIDTH, HIDDEN)], [(HIDDEN, WIDTH)]]
    groups = [[ComponentLinear(i, o, **size, mix=mix) for i, o in group] for group in shapes]
    for group in groups:
        for layer in group:
            for name, parameter in layer.to(device).named_parameters():
                torch.nn.init.normal_(parameter, std=0.02)
                parameter.requires_grad_(not mixing_classes or name == "tailor_mix")
    return groups


class Sorted:
    """Samples sorted by class, a product of all components for each class that is there."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = counts

    def __call__(self, layers: list[ComponentLinear], x_BTI: Tensor, gating: Gating) -> list[Tensor]:
        dtype = (
            torch.get_autocast_dtype(x_BTI.device.type)
            if torch.is_autocast_enabled(x_BTI.device.type)
            else x_BTI.dtype
        )
        ys = []
        for layer in layers:
            pieces = []
            for slot, x in enumerate(x_BTI.split(self.counts)):
                v = torch.cat([layer.v, layer.tailor_v[slot]])
                u = torch.cat(
                    [layer.u * layer.sigma[:, None], layer.tailor_u[slot] * layer.tailor_sigma[slot][:, None]]
                )
                pieces.append(
                    torch.addmm(layer.bias.to(dtype), x.flatten(0, 1).to(dtype) @ v.to(dtype).T, u.to(dtype))
                )
            ys.append(torch.cat(pieces).view(*x_BTI.shape[:2], -1))
        return ys


def training(
    args: Args,
    dtype: torch.dtype,
    device: torch.device,
    slots: int,
    how: str,
    classes: int,
    *,
    mixes: bool = False,
    components: int = TAILOR,
) -> Callable[[], None]:
    groups = matrices(RANK, slots, device, classes if mixes else 0, components)
    inputs = [
        torch.randn(args.images, args.tokens, g[0].v.shape[1], device=device, requires_grad=True)
        for g in groups
    ]
    ids = (torch.arange(args.images, device=device) * classes // args.images).unsqueeze(1)
    on = (3 * ids + torch.arange(MIXED, device=device)) % slots if mixes else ids
    gating = Gating(on, torch.ones_like(on, dtype=torch.float32), ids[:, 0])
    call: Any = ComponentLinear.together if how != "sorted" else Sorted(torch.bincount(ids[:, 0]).tolist())
    for layer in (layer for group in groups for layer in group):
        layer.strategy = "gathered" if how == "sorted" else how  # type: ignore[assignment]
    upstream = [
        [torch.randn(args.images, args.tokens, layer.u.shape[1], device=device) for layer in g]
        for g in groups
    ]

    def run() -> None:
        for group, x, gradients in zip(groups, inputs, upstream, strict=True):
            for parameter in (p for layer in group for p in layer.parameters()):
                parameter.grad = None
            x.grad = None
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                ys = call(group, x, gating)
            torch.autograd.backward(ys, [g.to(y.dtype) for g, y in zip(gradients, ys, strict=True)])

    return run


def sampling(args: Args, dtype: torch.dtype, device: torch.device, rank: int | None) -> Callable[[], None]:
    """One class: as components, or (rank None) merged into dense weights before."""
    x = {n: torch.randn(args.images, args.tokens, n, device=device, dtype=dtype) for n in (WIDTH, HIDDEN)}
    if rank is None:
        linears = [
            torch.nn.Linear(i, o, device=device, dtype=dtype)
            for i, o in [(WIDTH, WIDTH)] * 3 + [(WIDTH, HIDDEN), (HIDDEN, WIDTH)]
        ]

        def dense() -> None:
            for linear in linears:
                linear(x[linear.in_features])

        return torch.no_grad()(dense)
    groups = matrices(rank, 1, device)
    for layer in (layer for group in groups for layer in group):
        layer.to(dtype)
    ids = torch.zeros(args.images, 1, dtype=torch.int64, device=device)
    gating = Gating(ids, torch.ones_like(ids, dtype=dtype))

    def factored() -> None:
        for group in groups:
            ComponentLinear.together(group, x[group[0].v.shape[1]], gating)

    return torch.no_grad()(factored)


def main(args: Args) -> None:
    keep_memory()
    device = runtime.device_of(args.device)
    rows = []
    for dtype in dtypes(args.precision):
        row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
        variants = {f"joined, {s}": training(args, dtype, device, s, "joined", s) for s in SLOTS}
        variants["gathered"] = training(args, dtype, device, 32, "gathered", 32)
        row["gathered / joined, by slots"] = ratios(alternate(variants, args.rounds, device), "gathered")
        row["joined is faster up to"] = max(
            (s for s in SLOTS if row["gathered / joined, by slots"][f"joined, {s}"] > 1), default=0
        )
        row["gathered / joined, one slot for all, by components"] = {}
        for count in SHARED:
            variants = {
                how: training(args, dtype, device, 1, how, 1, components=count)
                for how in ("joined", "gathered")
            }
            found = ratios(alternate(variants, args.rounds, device), "gathered")["joined"]
            row["gathered / joined, one slot for all, by components"][count] = found
        variants = {f"joined, {s}": training(args, dtype, device, s, "joined", 10, mixes=True) for s in KNOWN}
        variants["gathered"] = training(args, dtype, device, KNOWN[-1], "gathered", 10, mixes=True)
        row[f"gathered / joined, mixtures of {MIXED}, by known tailors"] = ratios(
            alternate(variants, args.rounds, device), "gathered"
        )
        variants = {}
        for count in CLASSES:
            for how in ("gathered", "joined", "sorted"):
                variants[f"{how}, {count}"] = training(args, dtype, device, count, how, count)
        seconds = alternate(variants, args.rounds, device)
        row["gathered / other, by classes in a batch"] = {
            f"{how}, {count}": ratios(seconds, f"gathered, {count}")[f"{how}, {count}"]
            for count in CLASSES
            for how in ("joined", "sorted")
        }
        variants = {f"rank {rank}": sampling(args, dtype, device, rank) for rank in RANKS}
        variants["merged"] = sampling(args, dtype, device, None)
        row["merged / components, by learngene rank"] = ratios(
            alternate(variants, args.rounds, device), "merged"
        )
        rows.append(row)
        print(json.dumps(row, indent=1), flush=True)
    save(
        "strategies", device, args.out,
        rows=rows, images=args.images, tokens=args.tokens, rounds=args.rounds,
    )  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Args))
