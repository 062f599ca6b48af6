"""The GPU kernels of component matrices: against the library's products, and by block shape (needs a GPU).

    python benchmarks/fused.py layers    a block's matrices, bf16, training and sampling: dense, gathered, fused
    python benchmarks/fused.py tiles     each kernel by the shape of its blocks, as one graph each

DiT-B and DiT-L, N_G = width / 4, N_T = 4, images of 256 tokens, a class each. Variants take turns; figures are medians.
The results of `layers` are first compared with fp64 products. Results go to benchmarks/results/fused-<part>-gpu.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from speed import ratios, save
from torch import Tensor

from kindiff import runtime
from kindiff.components import ComponentLinear, operators
from kindiff.models import Gating
from kindiff.models.layers import Linear

TOKENS, TAILOR = 256, 4
TILES: dict[str, tuple[tuple[int, ...], ...]] = {
    "through": ((128, 64, 128, 3, 8, 4), (64, 64, 64, 3, 4, 3), (64, 64, 64, 3, 4, 2), (64, 32, 64, 3, 4, 5)),
    "inward": ((128, 64, 8, 4), (64, 64, 4, 3), (64, 64, 4, 2)),
    "outward": ((128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (64, 256, 64, 4, 2)),
    "weights": ((64, 128, 8, 3), (64, 128, 8, 4), (128, 128, 8, 2)),
}
"""Blocks by kernel, their numbers in the order of `kindiff.components.operators.TILES`."""


@dataclass(frozen=True, kw_only=True)
class Args:
    part: tyro.conf.Positional[Literal["layers", "tiles"]]
    """What to measure."""
    rounds: int = 20
    """Rounds; each runs every variant once."""
    batch: int = 64
    """Images a batch."""
    widths: tuple[int, ...] = (768, 1024)
    """Widths of the model."""
    kernels: tuple[str, ...] = tuple(TILES)
    """Of tiles."""
    out: Path | None = None
    """Where the JSON goes."""


def milliseconds(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Each as one recorded graph, by the device's own clock, round by round; the cache is overwritten before each."""
    variants = {name: captured(run) for name, run in variants.items()}
    found: dict[str, list[float]] = {name: [] for name in variants}
    other = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for i in range(rounds + 3):
        for name, run in variants.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            other.zero_()
            start.record()
            run()
            stop.record()
            torch.cuda.synchronize()
            if i >= 3:
                found[name].append(start.elapsed_time(stop))
    return found


def groups(width: int, how: str, images: int) -> list[list[torch.nn.Module]]:
    """q, k and v together, o, the MLP's two."""
    made = []
    for shapes in ([(width, width)] * 3, [(width, width)], [(width, 4 * width)], [(4 * width, width)]):
        layers: list[torch.nn.Module] = []
        for i, o in shapes:
            if how == "dense":
                layers.append(Linear(i, o))
            else:
                layers.append(ComponentLinear(i, o, rank=width // 4, slots=images, tailor_rank=TAILOR))
                layers[-1].strategy = how  # type: ignore[assignment]
            for parameter in layers[-1].parameters():
                torch.nn.init.normal_(parameter, std=0.05)
        made.append([layer.cuda() for layer in layers])
    return made


def run_of(layers: list[torch.nn.Module], x: Tensor, gating: Gating, *, backward: bool) -> Callable[[], Any]:
    parameters = [p for layer in layers for p in layer.parameters()]
    dys = None

    def run() -> list[Tensor]:
        nonlocal dys
        with torch.set_grad_enabled(backward), torch.autocast("cuda", torch.bfloat16):
            ys = type(layers[0]).together(layers, x, gating)
        if backward:
            dys = dys or [torch.randn_like(y) for y in ys]
            return [*ys, *torch.autograd.grad(ys, [x, *parameters], dys)]
        return ys

    return run


def layers(args: Args) -> list[dict[str, Any]]:
    rows = []
    for width in args.widths:
        slots = torch.arange(args.batch, device="cuda").unsqueeze(1)
        gating = Gating(slots, torch.ones_like(slots, dtype=torch.float32))
        made = {how: groups(width, how, args.batch) for how in ("dense", "gathered", "fused")}
        for name, i in (("q, k, v", 0), ("o", 1), ("MLP in", 2), ("MLP out", 3)):
            x = torch.randn(args.batch, TOKENS, 4 * width if i == 3 else width, device="cuda").bfloat16()
            for mine, its in zip(made["gathered"][i], made["fused"][i], strict=True):
                its.load_state_dict(mine.state_dict())
            errors = difference(made["gathered"][i], made["fused"][i], x, gating)
            for backward in (True, False):
                x.requires_grad_(backward)
                variants = {how: run_of(m[i], x, gating, backward=backward) for how, m in made.items()}
                times = milliseconds(variants, args.rounds)
                row = {
                    "width": width, "what": name, "mode": "train" if backward else "sample",
                    "ratio": ratios(times, "dense"), "error": errors,
                    "milliseconds": {k: statistics.median(v) for k, v in times.items()},
                }  # fmt: skip
                rows.append(row)
                print(row, flush=True)
    return rows


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same as one recorded graph, so that the host's time is not in it."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> object:
        graph.replay()
        return run  # whose tensors the graph reads: it must outlive this function

    return replay


def difference(plain: list[Any], ours: list[Any], x: Tensor, gating: Gating) -> dict[str, float]:
    """Largest relative error over outputs and gradients against fp64, of the library's products and of the kernels."""
    x = x.detach()
    torch.manual_seed(0)
    dys = [torch.randn(*x.shape[:2], layer.u.shape[1], device="cuda") for layer in plain]

    def outcome(layers: list[Any], dtype: torch.dtype) -> list[Tensor]:
        its = x.to(dtype, copy=True).requires_grad_()
        ys = ComponentLinear.together(
            layers, its, Gating(gating.slots_BK, gating.weights_BK.to(layers[0].u.dtype))
        )
        leaves = [its, *(p for layer in layers for p in layer.parameters())]
        return [
            *ys,
            *torch.autograd.grad(ys, leaves, [dy.to(y.dtype) for dy, y in zip(dys, ys, strict=True)]),
        ]

    want = outcome([layer.double() for layer in plain], torch.float64)
    found = {
        "library": outcome([layer.float() for layer in plain], torch.bfloat16),
        "kernels": outcome(ours, torch.bfloat16),
    }
    return {
        how: max(float((a.double() - b).norm() / b.norm()) for a, b in zip(them, want, strict=True))
        for how, them in found.items()
    }


def tiles(args: Args) -> list[dict[str, Any]]:
    """Each kernel on a block's shapes: q, k and v together, o, the MLP's two; beside the library's products of the
    learngenes alone."""
    rows = []
    for width in args.widths:
        shapes = ((width, width, 3), (width, width, 1), (width, 4 * width, 1), (4 * width, width, 1))
        for name in args.kernels:
            for inputs, out, layers in shapes:
                made = KERNELS[name](width // 4, inputs, out, layers, args)
                if made is None:
                    continue
                library, ours = made
                rule = operators.through_tile(width // 4, inputs, out) if name == "through" else name
                variants = {"library, learngenes alone": library} | {
                    str(block): with_tile(rule, dict(zip(operators.TILES[rule], block, strict=True)), ours)
                    for block in TILES[name]
                }
                found = medians(variants, args.rounds)
                row = {"width": width, "kernel": name, "in": inputs, "out": out, "layers": layers}
                rows.append(row | {"milliseconds": found})
                print(row, {n: round(t * 1e3) for n, t in found.items()}, "us", flush=True)
    return rows


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


Pair = tuple[Callable[[], Any], Callable[[], Any]]


def through(rank: int, wide: int, out: int, layers: int, args: Args) -> Pair | None:
    x, v, u = random(args.batch, TOKENS, wide), random(layers * rank, wide), random(layers * rank, out)
    v_own, u_own = random(args.batch, layers * TAILOR, wide), random(args.batch, layers * TAILOR, out)
    bias, flat = random(layers, out), x.flatten(0, 1)

    def library() -> list[Tensor]:
        parts = (flat @ v.T).split(rank, dim=1)
        return [torch.addmm(b, part, each) for b, part, each in zip(bias, parts, u.split(rank), strict=True)]

    return library, lambda: operators.through(x, v, v_own, u, u_own, bias, layers, True)


def inward(rank: int, wide: int, out: int, layers: int, args: Args) -> Pair | None:
    """Backward, towards dh; alone only where layers share an input."""
    if layers == 1:
        return None
    dys = [random(args.batch, TOKENS, out) for _ in range(layers)]
    u, own = random(layers * rank, out), random(args.batch, layers * TAILOR, out)
    parts = u.split(rank)
    return (
        lambda: [dy.flatten(0, 1) @ part.T for dy, part in zip(dys, parts, strict=True)],
        lambda: operators.inward(dys, u, own),
    )


def outward(rank: int, wide: int, out: int, layers: int, args: Args) -> Pair | None:
    if layers == 1:
        return None
    h = random(args.batch * TOKENS, layers * (rank + operators.columns_of(TAILOR)))
    v, own = random(layers * rank, wide), random(args.batch, layers * TAILOR, wide)
    return lambda: h[:, : len(v)] @ v, lambda: operators.outward(h, v, own, layers)


def weights(rank: int, wide: int, out: int, layers: int, args: Args) -> Pair | None:
    """The gradients of V of all layers."""
    h = random(args.batch * TOKENS, layers * (rank + operators.columns_of(TAILOR)))
    x = random(args.batch, TOKENS, wide)

    def ours() -> Any:
        parts, own = operators.weights(h, x, rank, layers, 0, layers)
        return parts.sum(dim=0).bfloat16(), own

    return lambda: h[:, : layers * rank].T @ x.flatten(0, 1), ours


KERNELS = {"through": through, "inward": inward, "outward": outward, "weights": weights}


def medians(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in milliseconds(variants, rounds).items()}


def with_tile(rule: str, tile: dict[str, int], run: Callable[[], Any]) -> Callable[[], Any]:
    def other() -> Any:
        usual, operators.TILES[rule] = operators.TILES[rule], tile
        try:
            return run()
        finally:
            operators.TILES[rule] = usual

    return other


def main(args: Args) -> None:
    device = runtime.device_of("cuda")
    rows = {"layers": layers, "tiles": tiles}[args.part](args)
    save(f"fused-{args.part}", device, args.out, rows=rows, batch=args.batch, rounds=args.rounds)


if __name__ == "__main__":
    main(tyro.cli(Args))
