"""Time of component matrices against dense ones, side by side in one run, and against what the operations allow.

    python benchmarks/speed.py blocks      one block, forward + backward and forward: DiT-B and DiT-L shapes
    python benchmarks/speed.py classes     the same block with 10 to 10,000 classes, and with one class in a batch
    python benchmarks/speed.py products    the matrix products of a block alone: what the library makes possible
    python benchmarks/speed.py sweep       a training block by learngene rank, tailor rank, width and batch

Variants take turns, round by round; a figure is the median of the ratios dense / variant within a round, so a drift
of the machine touches both. `allowed` is the ratio of multiply-accumulates (attention included), `share` the measured
ratio over it. Results go to benchmarks/results/speed-<part>.json.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from kindiff import native, runtime
from kindiff.allocator import keep_memory
from kindiff.checkpoint import write_json
from kindiff.classes import numbered
from kindiff.components import factorize
from kindiff.components.build import Structure
from kindiff.config import MATRICES, DiTConfig, KindConfig
from kindiff.evaluate.cost import closed_macs
from kindiff.models import DiT, Gating
from kindiff.train.apart import Apart
from kindiff.train.memory import DTYPES
from kindiff.train.step import WARM

TOKEN_SIDE = 16
SWEEP = {"width": (384, 768, 1024), "rank": (96, 192, 288, 384), "tailor": (1, 4, 16), "batch": (1, 2, 8, 32)}
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Args:
    part: tyro.conf.Positional[Literal["blocks", "products", "classes", "sweep"]]
    """What to measure."""
    rounds: int = 12
    """Rounds; each runs every variant once."""
    batch: int = 8
    """Images a batch (256 tokens each)."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: Literal["", "fp32", "bf16"] = ""
    """One arithmetic only."""
    out: Path | None = None
    """Where the JSON goes."""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The smallest shapes only."""


def dtypes(precision: str) -> list[torch.dtype]:
    """The one asked for, or both."""
    return [DTYPES[name] for name in ([precision] if precision else ["fp32", "bf16"])]


class RankMask(nn.Module):
    """What not to do: all components of all classes, masked (the comparison's lower end)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.cat([layer.u, layer.tailor_u.flatten(0, 1)]).detach().clone())
        self.sigma = nn.Parameter(torch.cat([layer.sigma, layer.tailor_sigma.flatten()]).detach().clone())
        self.v = nn.Parameter(torch.cat([layer.v, layer.tailor_v.flatten(0, 1)]).detach().clone())
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.rank, self.own = layer.rank, layer.tailor_sigma.shape[1]

    def forward(self, x: Tensor, gating: Gating) -> Tensor:
        on = torch.zeros(len(x), len(self.sigma), device=x.device)
        on[:, : self.rank] = 1
        columns = self.rank + gating.slots_BK * self.own + torch.arange(self.own, device=x.device)
        on.scatter_(1, columns, 1.0)
        h = (x @ self.v.T) * (self.sigma * on).unsqueeze(1)
        return h @ self.u + self.bias


def model_pair(name: str, classes: int, *, depth: int | None = None) -> tuple[DiT, DiT]:
    """A dense DiT and the same factorised at N_G = width / 4, N_T = 4, with random weights."""
    config = DiTConfig.preset(f"{name}/2", num_classes=classes)
    if depth is not None:
        config = DiTConfig(**{**vars(config), "depth": depth})
    torch.manual_seed(0)
    dense = DiT(config, classes=numbered(classes))
    kind = KindConfig(learngene_rank=config.width // 4, tailor_rank=4, init="per-factor")
    return dense, factorize(dense, kind)


def allowed(model: DiT, *, whole: bool) -> float:
    """Ratio of the operations, dense over factorised; of a block's matrices and attention, or of the model."""
    parts = ("learngenes", "tailors", "dense matrices", "attention", "modulation")
    pair = (closed_macs(model.config), closed_macs(model.config, Structure(**model.structure)))
    a, b = (sum(v for k, v in macs.items() if whole or k in parts) for macs in pair)
    return a / b


def alternate(
    variants: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each variant, round by round, after some that warm up (and on a GPU record)."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    warm = WARM + 2 if device.type == "cuda" else 2
    for i in range(rounds + warm):
        for name, run in variants.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= warm:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], base: str) -> dict[str, float]:
    """Median over the rounds of base / variant."""
    return {
        name: statistics.median(b / t for b, t in zip(seconds[base], times, strict=True))
        for name, times in seconds.items()
    }


def block_run(
    model: DiT,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    backward: bool,
    one_class: bool = False,
) -> Callable[[], None]:
    """One block, as in training (with gradients of inputs and weights) or as in a sampler's steps (`sampler`)."""
    model.to(device)
    block = model.blocks[0]
    torch.nn.init.normal_(block.modulation.weight, std=0.02)  # at zero, all gradients would be
    x = torch.randn(batch, TOKEN_SIDE**2, model.config.width, device=device, requires_grad=backward)
    c = torch.randn(batch, model.config.width, device=device)
    gradient = torch.randn_like(x)
    ids = torch.arange(batch, device=device) % len(model.classes)
    ids = torch.zeros_like(ids) if one_class else ids
    has_banks = any(".tailor_" in name for name, _ in model.named_parameters())
    apart = Apart(model) if backward and has_banks else None
    places = apart.places(model.gate.slots_on(ids)) if apart else ()
    shared = None if backward else model.gating(ids)

    def run() -> None:
        for parameter in block.parameters():
            parameter.grad = None
        with (
            apart.at(*places) if apart else contextlib.nullcontext(),
            torch.set_grad_enabled(backward),
            torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            y = block(x, c, model.gate(ids, None) if model.gate and shared is None else shared)
        if backward:
            y.backward(gradient)

    return run


@contextlib.contextmanager
def sampler(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """As around the steps of a sampler: weights are rounded once for all of them."""
    with (
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        yield


def blocks(args: Args, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for name in ("DiT-B",) if args.quick else ("DiT-B", "DiT-L"):
        dense, kind = model_pair(name, 150, depth=1)
        masked = model_pair(name, 150, depth=1)[1]
        for matrix in ("q", "k", "v", "o", "mlp_in", "mlp_out"):
            setattr(masked.blocks[0], matrix, RankMask(getattr(masked.blocks[0], matrix)))
        for dtype in dtypes(args.precision):
            for backward in (True, False):
                variants = {
                    label: block_run(model, args.batch, dtype, device, backward=backward)
                    for label, model in (("dense", dense), ("kind", kind), ("rank mask", masked))
                }
                with contextlib.nullcontext() if backward else sampler(dtype, device):
                    seconds = alternate(variants, args.rounds, device)
                rows.append(
                    row(
                        f"{name} block",
                        dtype,
                        "train" if backward else "sample",
                        seconds,
                        allowed(kind, whole=False),
                    )
                )
    return rows


def row(
    what: str, dtype: torch.dtype, mode: str, seconds: dict[str, list[float]], limit: float
) -> dict[str, Any]:
    measured = ratios(seconds, "dense")
    found = {
        "what": what, "dtype": str(dtype).removeprefix("torch."), "mode": mode, "allowed": limit,
        "ratio": measured, "share": measured["kind"] / limit,
        "milliseconds": {k: statistics.median(v) * 1e3 for k, v in seconds.items()},
    }  # fmt: skip
    others = "  ".join(f"{k} {v:.2f}" for k, v in measured.items() if k not in ("dense", "kind"))
    print(
        f"{what:<16}{found['dtype']:<10}{mode:<8}kind {measured['kind']:.2f}x dense, allowed {limit:.2f}x, "
        f"share {found['share']:.2f}   {others}",
        flush=True,
    )
    return found


def classes(args: Args, device: torch.device) -> list[dict[str, Any]]:
    """Time against 10 classes, all different in a batch, in sampling and training; and one class that fills it."""
    counts = (10, 100, 1000) if args.quick else (10, 100, 1000, 10_000)
    rows = []
    for dtype in dtypes(args.precision):
        found: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
        for mode in ("sampling", "training"):
            variants: dict[str, Callable[[], None]] = {}
            for count in counts:
                _, model = model_pair("DiT-T" if args.quick else "DiT-B", count, depth=1)
                backward = mode == "training"
                variants[f"{count} classes"] = block_run(model, args.batch, dtype, device, backward=backward)
                if count == counts[1]:
                    variants["one class"] = block_run(
                        model, args.batch, dtype, device, backward=backward, one_class=True
                    )
            with contextlib.nullcontext() if mode == "training" else sampler(dtype, device):
                seconds = alternate(variants, args.rounds, device)
            times = {k: 1 / v for k, v in ratios(seconds, f"{counts[0]} classes").items()}
            times["all different / one class"] = 1 / ratios(seconds, "one class")[f"{counts[1]} classes"]
            found[mode] = times
            print(
                f"{found['dtype']} {mode}: " + "  ".join(f"{k} {v:.3f}" for k, v in times.items()), flush=True
            )
        rows.append(found)
    return rows


def products(args: Args, device: torch.device) -> list[dict[str, Any]]:
    """The matrix products of a block alone, dense against thin: what the library leaves of the operations' ratio."""
    rows = []
    for name in ("DiT-B",) if args.quick else ("DiT-S", "DiT-B", "DiT-L"):
        config = DiTConfig.preset(f"{name}/2", num_classes=10)
        shapes = [config.matrix_shape(matrix) for matrix in MATRICES]
        for dtype in dtypes(args.precision):
            inner = {"dense": 0, "kind": config.width // 4}
            variants = {
                label: product_run(shapes, rank, args.batch * TOKEN_SIDE**2, dtype, device)
                for label, rank in inner.items()
            }
            limit = sum(o * i for o, i in shapes) / sum((config.width // 4) * (o + i) for o, i in shapes)
            rows.append(
                row(f"{name} products", dtype, "train", alternate(variants, args.rounds, device), limit)
            )
    return rows


def product_run(
    shapes: list[tuple[int, int]], rank: int, count: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """Forward and both backward products of matrices of these (O, I), dense (rank 0) or as two thin ones."""
    pairs = []
    for o, i in shapes:
        for a, b in [(i, o)] if not rank else [(i, rank), (rank, o)]:
            sizes = ((count, a), (a, b), (count, b))
            pairs.append([torch.randn(*size, device=device, dtype=dtype) for size in sizes])

    def run() -> None:
        for x, w, y in pairs:
            torch.mm(x, w, out=y)
            y @ w.T
            x.T @ y

    return run


def sweep(args: Args, device: torch.device) -> list[dict[str, Any]]:
    """A training block against dense, one thing varied at a time from DiT-B, N_G 192, N_T 4, 8 images."""
    usual = {"width": 768, "rank": 192, "tailor": 4, "batch": args.batch}
    rows = []
    for key, values in SWEEP.items():
        for value in values[: 1 if args.quick else None]:
            shape = usual | {key: value} | ({"rank": value // 4} if key == "width" else {})
            config = DiTConfig(
                input_size=32, channels=4, num_classes=150, width=shape["width"], depth=1,
                heads=shape["width"] // 64, patch=2,
            )  # fmt: skip
            dense = DiT(config)
            kind = factorize(
                dense,
                KindConfig(learngene_rank=shape["rank"], tailor_rank=shape["tailor"], init="per-factor"),
            )
            for dtype in dtypes(args.precision):
                variants = {
                    label: block_run(model, shape["batch"], dtype, device, backward=True)
                    for label, model in (("dense", dense), ("kind", kind))
                }
                seconds = alternate(variants, args.rounds, device)
                rows.append(
                    row(f"{key} {value}", dtype, "train", seconds, allowed(kind, whole=False)) | shape
                )
    return rows


def main(args: Args) -> None:
    keep_memory()
    device = runtime.device_of(args.device)
    rows = {"blocks": blocks, "products": products, "classes": classes, "sweep": sweep}[args.part](
        args, device
    )
    save(f"speed-{args.part}", device, args.out, rows=rows, batch=args.batch, rounds=args.rounds)


def save(name: str, device: torch.device, out: Path | None, **facts: Any) -> None:
    """Write a benchmark's facts with versions and hardware, to `out` or to the results folder by name and device."""
    facts |= {"versions": runtime.versions(), "hardware": runtime.hardware() | {"kernels": native.usable()}}
    out = out or RESULTS / f"{name}{'-gpu' if device.type == 'cuda' else ''}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, json.loads(json.dumps(facts)))


if __name__ == "__main__":
    main(tyro.cli(Args))
