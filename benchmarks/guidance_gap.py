"""What merging one class changes under guidance: our null pass has the tailor off, an exported pipeline's has it on.

    python benchmarks/guidance_gap.py runs/guidance-gap

Trains a small model of drawn avatars (minutes on two cores; run again to resume), then draws the same images with
both null passes. Writes benchmarks/results/guidance_gap.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from kindiff import DataConfig, DiTPipeline, KindConfig, PretrainConfig, SampleConfig, TrainConfig, checkpoint
from kindiff.bridges.diffusers_pipeline import guidance_gap
from kindiff.components import Components, decompose
from kindiff.config import BackboneConfig
from kindiff.train import pretrain

SCALES = (1.0, 1.5, 4.0)
CLASSES = ("loops", "rings", "shapes", "thumbs", "waves", "weave")
RESULT = Path(__file__).parent / "results" / "guidance_gap.json"


def drawn(parts: Components, name: str, layers: str, scale: float) -> np.ndarray:
    model = parts.recombine([name], layers=layers)  # type: ignore[arg-type]
    sample = SampleConfig(steps=25, guidance=scale, device="cpu")
    return DiTPipeline(model).sample([0] * 8, sample).astype(np.float64) / 127.5 - 1


def rms(difference: np.ndarray) -> float:
    return float(np.sqrt(np.mean(difference**2)))


def main(out: Path) -> None:
    config = PretrainConfig(
        data=DataConfig(source="avatars:base", size=16, per_class=100),
        model=BackboneConfig(width=96, depth=4, heads=3, patch=2),
        kind=KindConfig(learngene_rank=44, tailor_rank=2),
        train=TrainConfig(steps=1500, batch=32, lr=2e-3, device="cpu", precision="fp32"),
    )
    parts = decompose(pretrain(config, out).model)
    rows = {}
    for scale in SCALES:
        pairs = [
            (drawn(parts, name, "factored", scale), drawn(parts, name, "merged", scale)) for name in CLASSES
        ]
        images = float(np.mean([rms(a - b) for a, b in pairs]))
        spread = float(np.mean([rms(a - a.mean(axis=0)) for a, _ in pairs]))
        guided = float(np.mean([guidance_gap(parts, name, scale=scale)["guided"] for name in CLASSES]))
        rows[str(scale)] = {"predictions": guided, "images": images, "spread of images of a class": spread}
        print(f"guidance {scale}: predictions differ by {guided:.1%}, images by {images:.3f} (RMS, range -1 to 1; "
              f"images of one class among themselves {spread:.3f})")  # fmt: skip
    RESULT.parent.mkdir(exist_ok=True)
    checkpoint.write_json(RESULT, {"classes": list(CLASSES), "steps": config.train.steps, "scales": rows})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/guidance-gap"))
