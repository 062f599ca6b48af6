"""Speed and agreement of the evaluation: our Fréchet distance beside SciPy's matrix square root, and features.

    python benchmarks/frechet.py --out benchmarks/results/frechet.json

Everything is timed in one run, turn by turn, so that a busy machine slows both sides alike. Torch's threads are
set inside the run; those of the linear algebra are what OPENBLAS_NUM_THREADS says, the same for both sides.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import tyro

from kindiff import runtime
from kindiff.checkpoint import write_json
from kindiff.evaluate.inception import FIDInception, InceptionFeatures
from kindiff.evaluate.lite0 import Lite0, Lite0Features
from kindiff.evaluate.metrics import frechet_distance
from kindiff.evaluate.moments import Moments, moments


@dataclass(frozen=True, kw_only=True)
class Args:
    out: Path = Path("benchmarks/results/frechet.json")
    """Where the figures go."""
    dims: int = 2048
    """Feature dimensions of the Fréchet distance."""
    count: int = 5000
    """Images of each set."""
    images: int = 32
    """Images of a timed pass through a feature network."""
    rounds: int = 5
    """Turns; the best one counts: what other work on the machine does not slow down."""


def by_square_root(a: Moments, b: Moments) -> float:
    """The same distance as the published evaluators compute it."""
    root = scipy.linalg.sqrtm(a.cov @ b.cov).real
    return float(((a.mean - b.mean) ** 2).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * np.trace(root))


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - clock, time.process_time() - processor


def published(net: torch.nn.Module, side: int, count: int) -> Callable[[object], None]:
    """A pass of `count` images of the input's size through a network as it was published, whole."""
    net.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(count, 3, side, side).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run(_: object) -> None:
        net(x)

    return run


def features_like(count: int, dims: int, seed: int) -> Moments:
    """Moments of features whose spectrum falls as that of real ones does."""
    draw = np.random.default_rng(seed)
    scale = (1 + np.arange(dims)) ** -0.7
    basis = np.linalg.qr(np.random.default_rng(99).standard_normal((dims, dims)))[0]
    return moments((draw.standard_normal((count, dims)) * scale + 0.01 * seed) @ basis)


def main(args: Args) -> None:
    a, b = (features_like(args.count, args.dims, seed) for seed in (0, 1))
    ours, theirs = [], []
    for _ in range(args.rounds):
        ours.append(timed(lambda: frechet_distance(a, b)))
        theirs.append(timed(lambda: by_square_root(a, b)))
    (clock, processor), (their_clock, their_processor) = np.min(ours, axis=0), np.min(theirs, axis=0)
    distance, reference = frechet_distance(a, b), by_square_root(a, b)
    facts: dict[str, object] = {
        "frechet": {
            "dims": args.dims,
            "ours_s": float(clock),
            "sqrtm_s": float(their_clock),
            "ratio": float(their_clock / clock),
            "ours_processor_s": float(processor),
            "sqrtm_processor_s": float(their_processor),
            "processor_ratio": float(their_processor / processor),
            "relative_difference": abs(distance - reference) / reference,
            "self_ours": frechet_distance(a, a) / float(np.trace(a.cov)),
            "self_sqrtm": by_square_root(a, a) / float(np.trace(a.cov)),
        }
    }
    images = np.random.default_rng(0).integers(0, 256, (args.images, 256, 256, 3), dtype=np.uint8)
    small = np.ascontiguousarray(images[:, :32, :32])
    networks: dict[str, tuple[Callable[[np.ndarray], object], np.ndarray]] = {
        "lite0, 32 px": (Lite0Features.load(), small),
        "lite0 as published": (published(Lite0(), 224, len(small)), small),
        "inception, 256 px": (InceptionFeatures(FIDInception(), sha256="random weights"), images),
        "inception as published": (published(FIDInception(), 299, len(images)), images),
    }
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in networks}
    for _ in range(args.rounds):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for name, (network, batch) in networks.items():
                seconds, _ = timed(lambda network=network, batch=batch: network(batch))  # type: ignore[misc]
                rates[name].setdefault(f"{threads} threads", []).append(len(batch) / seconds)
    facts["images_per_s"] = {
        name: {threads: max(values) for threads, values in of.items()} for name, of in rates.items()
    }
    facts["load_average"] = os.getloadavg()[0]
    facts |= {"versions": runtime.versions(), "hardware": runtime.hardware()}
    write_json(args.out, facts)
    frechet = facts["frechet"]
    assert isinstance(frechet, dict)
    print(
        f"Fréchet, {args.dims} dimensions: {frechet['ours_s']:.2f} s, sqrtm {frechet['sqrtm_s']:.2f} s: "
        f"{frechet['ratio']:.1f} times faster ({frechet['processor_ratio']:.1f} in processor time); "
        f"relative difference {frechet['relative_difference']:.1e}; of a set "
        f"with itself, over the trace: {frechet['self_ours']:.1e}, sqrtm {frechet['self_sqrtm']:.1e}"
    )
    for name, of in rates.items():
        one, two = (max(of[f"{threads} threads"]) for threads in (1, 2))
        print(f"{name}: {one:.1f} images/s with 1 thread, {two:.1f} with 2 ({two / one:.2f} times)")


if __name__ == "__main__":
    main(tyro.cli(Args))
