"""What every method trains and costs on the paper's backbones: parameters and MACs, counted, nothing trained.

    python benchmarks/accounting.py --out benchmarks/results/accounting.json

Rivals are set up for real on models of one and of two blocks; what they train is a + b depth, so the published depth
follows exactly (a third model of three blocks is checked). KIND's rows are counts of a described design. GMACs
are of one forward pass of one image at inference, attention included; rivals are merged, so they cost the dense model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from kindiff import runtime
from kindiff.checkpoint import write_json
from kindiff.classes import numbered
from kindiff.config import BackboneConfig, DesignConfig, DiTConfig, RivalConfig
from kindiff.evaluate.cost import closed_macs, cost_table, total
from kindiff.evaluate.design import design
from kindiff.models import DiT
from kindiff.rivals import start

CLASSES = 10
RIVALS = {
    "full fine-tuning": RivalConfig(method="full"),
    "LoRA, rank {r}": RivalConfig(method="lora", rank=102),
    "DoRA, rank {r}": RivalConfig(method="dora", rank=102),
    "PiSSA, rank {r}": RivalConfig(method="pissa", rank=102),
    "OFT, blocks of {r}": RivalConfig(method="oft", rank=256),
    "BOFT, blocks of {r}": RivalConfig(method="boft", rank=256),
    "LoHa, rank {r}": RivalConfig(method="loha", rank=51),
    "LoKr, rank {r}": RivalConfig(method="lokr", rank=102),
    "VeRA, rank {r}": RivalConfig(method="vera", rank=1024),
    "HRA, {r} reflections": RivalConfig(method="hra", rank=204),
    "class embedding alone": RivalConfig(method="embedding"),
    "SVDiff": RivalConfig(method="svdiff"),
    "Heur-LG, Auto-LG, TLEG, FINE, WAVE": RivalConfig(method="heur-lg", inherit=1),
}
"""Ranks near the headline's 45.4M on DiT-L/2."""


@dataclass(frozen=True, kw_only=True)
class Args:
    out: Path = Path("benchmarks/results/accounting.json")
    """Where the figures go."""
    presets: tuple[str, ...] = ("DiT-B/2", "DiT-L/2")
    """Backbones."""


def trained(shape: DiTConfig, rival: RivalConfig, depth: int) -> int:
    """Numbers that a rival trains on a backbone of this width and so many blocks."""
    torch.manual_seed(0)
    base = DiT(dataclasses.replace(shape, depth=depth))
    model = start(base, numbered(CLASSES), rival, seed=0)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def main(args: Args) -> None:
    rows = []
    for preset in args.presets:
        shape = DiTConfig.preset(preset, num_classes=CLASSES, objective="epsilon")
        dense = sum(closed_macs(shape).values())
        for label, rival in RIVALS.items():
            one, two, three = (trained(shape, rival, depth) for depth in (1, 2, 3))
            if three - two != two - one:
                raise SystemExit(f"{label}: {one}, {two}, {three} do not grow evenly with the depth")
            count = one + (two - one) * (shape.depth - 1)
            name = label.format(r=rival.rank)
            rows.append({"backbone": preset, "method": name, "trainable": count, "macs": dense, "saved": 0})
        quarter = shape.width // 4
        for label, config in {
            "KIND, N_G {g}, a class a mixture of 8 tailors, cut to rank 13": DesignConfig(
                model=BackboneConfig(preset=preset), classes=CLASSES, learngene_rank=quarter, tailor_rank=13,
                trains="tailors", mixes=8,
            ),
            "KIND, N_G {g}, rank 1 a class": DesignConfig(
                model=BackboneConfig(preset=preset), classes=CLASSES, learngene_rank=quarter, tailor_rank=1,
                trains="tailors",
            ),
            "KIND, N_G {g}, one tailor of rank 102 and biases": DesignConfig(
                model=BackboneConfig(preset=preset), classes=CLASSES, learngene_rank=quarter, tailor_rank=102,
                share="task", trains="tailors", train_also=("bias",),
            ),
        }.items():  # fmt: skip
            trainable = total(cost_table(design(config))).trainable
            macs = total(cost_table(design(dataclasses.replace(config, mixes=0)))).macs
            rows.append(
                {
                    "backbone": preset, "method": label.format(g=quarter), "trainable": trainable,
                    "macs": macs, "saved": dense - macs,
                }
            )  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {"classes": CLASSES, "rows": rows, "versions": runtime.versions()})
    print("| backbone | method | trainable | GMACs | saved |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['backbone']} | {row['method']} | {row['trainable'] / 1e6:.2f}M | {row['macs'] / 1e9:.2f} | "
            f"{row['saved'] / 1e9:.2f} |"
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
