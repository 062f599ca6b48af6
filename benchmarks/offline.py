"""The offline protocol on avatars: FD (Lite0) as images get worse, its real/real floor, the probe's accuracy.

    python benchmarks/offline.py --out benchmarks/results/offline.json

Reference: images of each base style. Samples: half as many others, untouched, with noise, blurred, or with styles
left out (more of the others stand in for them: the number of images stays).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageFilter

from kindiff import runtime
from kindiff.checkpoint import write_json
from kindiff.data.avatars import BASE, open_avatars
from kindiff.evaluate.images import ArrayImages
from kindiff.evaluate.lite0 import Lite0Features
from kindiff.evaluate.reference import build
from kindiff.evaluate.run import evaluate
from kindiff.evaluate.sources import from_set


@dataclass(frozen=True, kw_only=True)
class Args:
    out: Path = Path("benchmarks/results/offline.json")
    """Where the figures go."""
    work: Path = Path("runs/offline")
    """Where features are kept, so that an interrupted call goes on where it was."""
    per_class: int = 20
    """Images of each style in the samples; the reference has twice as many."""
    size: int = 32
    """Side in pixels."""


def noisy(images: np.ndarray, deviation: float) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(images.shape) * deviation
    return (images + noise).round().clip(0, 255).astype(np.uint8)


def blurred(images: np.ndarray, radius: float) -> np.ndarray:
    soft = ImageFilter.GaussianBlur(radius)
    return np.stack([np.asarray(Image.fromarray(image).filter(soft)) for image in images])


def variants(args: Args) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, images, labels."""

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
        share = -(-len(BASE) * args.per_class // count)
        held = open_avatars("base", size=args.size, classes=BASE[:count], per_class=share, first=400)
        index = np.unique(np.linspace(0, len(held) - 1, len(BASE) * args.per_class).round().astype(int))
        return np.asarray(held.images)[index], held.labels[index]

    images, labels = drawn(len(BASE))
    yield "untouched", images, labels
    for deviation in (5, 10, 20):
        yield f"noise {deviation}", noisy(images, deviation), labels
    for radius in (0.5, 0.8, 1.2):
        yield f"blur {radius}", blurred(images, radius), labels
    for gone in (3, 7, 14):
        yield (f"without {gone} styles", *drawn(len(BASE) - gone))


def main(args: Args) -> None:
    network = Lite0Features.load()
    real = from_set(
        open_avatars("base", size=args.size, classes=BASE, per_class=2 * args.per_class), "avatars:base"
    )
    reference = build(real, network, args.work / "reference")
    rows = []
    for name, images, labels in variants(args):
        samples = ArrayImages(
            name=name, array=images, sha256=f"{name} {args.per_class}", labels=labels, classes=real.classes
        )
        score = evaluate(samples, reference, network, work=args.work / name.replace(" ", "-"))
        rows.append({"samples": name, "score": score.to_json()})
        print(
            f"{name:<18} FD (Lite0) {score.distance:8.2f}  floor {score.floor:.2f} ({score.floor_note})  precision "
            f"{score.precision:.3f}  recall {score.recall:.3f}  KID {score.kid:.4f} ± {score.kid_error:.4f}  "
            f"accuracy {score.accuracy:.4f} (real {score.real_accuracy:.4f})",
            flush=True,
        )
        write_json(args.out, {"rows": rows, "versions": runtime.versions(), "hardware": runtime.hardware()})


if __name__ == "__main__":
    main(tyro.cli(Args))
