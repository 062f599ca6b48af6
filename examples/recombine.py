"""Pre-train a toy, take it apart, put smaller models together, draw from them.

    python examples/recombine.py runs/recombine-example

Seconds on two cores; the pictures are as rough as a toy's. Run it again: it goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kindiff import DiTPipeline, KindConfig, PretrainConfig, SampleConfig
from kindiff.components import decompose, load_components, save_components
from kindiff.config import BackboneConfig, DataConfig, TrainConfig
from kindiff.images import grid, write_png
from kindiff.train import pretrain


def main(out: Path) -> None:
    config = PretrainConfig(
        data=DataConfig(source="avatars:base", size=16, classes=("rings", "loops", "waves"), per_class=16),
        model=BackboneConfig(width=64, depth=2, heads=2, patch=4),
        kind=KindConfig(learngene_rank=24, tailor_rank=2),
        train=TrainConfig(steps=60, batch=32, lr=4e-3, warmup=10),
    )
    full = pretrain(config, out / "run")

    # Learngenes and one tailor file for each class; a model of two classes needs only their files.
    save_components(decompose(full.model), out / "parts")
    parts = load_components(out / "parts", classes=["waves", "rings"])
    small = DiTPipeline(parts.recombine(learngene_rank=12))
    small.save_pretrained(out / "small")
    for name, pipeline in (("full", full), ("small", small)):
        count = sum(p.numel() for p in pipeline.model.parameters())
        print(f"{name}: {count:,} parameters, classes {', '.join(pipeline.model.classes.names)}")

    # Classes are mixed freely in a batch; picture i depends on the seed, on i and on its class only.
    pictures = small.sample([0, 0, 0, 0, 1, 1, 1, 1], SampleConfig(steps=10, seed=3))
    write_png(out / "small.png", grid(pictures, columns=4))
    print(out / "small.png")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/recombine-example"))
