"""Teach a pre-trained model a class from an image folder of one's own: only a fresh tailor trains.

    python examples/new_class.py runs/new-class-example

Seconds on two cores; the pictures are as rough as a toy's. Run it again: it goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from kindiff import KindConfig, PretrainConfig, SampleConfig, TransferConfig
from kindiff.components import decompose, save_components
from kindiff.config import BackboneConfig, DataConfig, TrainConfig
from kindiff.images import grid, write_png
from kindiff.train import pretrain, transfer


def make_flags(folder: Path, count: int = 12) -> None:
    """An image folder: one sub-folder a class, here two kinds of flag."""
    if folder.exists():
        return
    colours = np.random.default_rng(0).integers(0, 256, (count, 3, 3), dtype=np.uint8)
    for k, three in enumerate(colours):
        stripes = np.repeat(three[:, None], 16, axis=1)  # (3, 16, RGB)
        for name, flag in (("rows", stripes), ("columns", stripes.transpose(1, 0, 2))):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(flag).resize((48, 48), Image.Resampling.NEAREST).save(folder / name / f"{k}.png")


def main(out: Path) -> None:
    loop = TrainConfig(steps=60, batch=32, lr=4e-3, warmup=10)
    base = PretrainConfig(
        data=DataConfig(source="avatars:base", size=16, classes=("rings", "loops", "waves"), per_class=16),
        model=BackboneConfig(width=64, depth=2, heads=2, patch=4),
        kind=KindConfig(learngene_rank=24, tailor_rank=2),
        train=loop,
    )
    save_components(decompose(pretrain(base, out / "run").model), out / "parts")

    make_flags(out / "flags")
    config = TransferConfig(data=DataConfig(source=str(out / "flags"), size=16), rank=4, train=loop)
    taught = transfer(out / "parts", config, out / "transfer")
    names = taught.model.classes.names
    trained = sum(p.numel() for n, p in taught.model.named_parameters() if ".tailor_" in n)
    print(f"learned {', '.join(names)} by training {trained:,} numbers; the learngenes are as they were")

    pictures = taught.sample([i for i in range(len(names)) for _ in range(6)], SampleConfig(steps=10))
    write_png(out / "flags.png", grid(pictures, columns=6))
    print(out / "flags.png")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/new-class-example"))
