"""Which start of the components trains best: SVD of the dense initialisation, the same rescaled, or random factors.

    python benchmarks/initialisation.py --out benchmarks/results/initialisation.json

Trains the same small model from each start at several learning rates and prints the mean loss of the last fifth of
the steps, beside the dense model's. Runs are kept under --work, so an interrupted call goes on where it was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import tyro

from kindiff import runtime
from kindiff.checkpoint import write_json
from kindiff.config import BackboneConfig, KindConfig, PretrainConfig, TrainConfig, to_dict
from kindiff.train import pretrain

Start = Literal["dense", "svd", "svd-rescaled", "per-factor"]


@dataclass(frozen=True, kw_only=True)
class Args:
    out: Path = Path("benchmarks/results/initialisation.json")
    """Where the figures go."""
    work: Path = Path("runs/initialisation")
    """Where the runs are kept."""
    steps: int = 400
    """Steps of each run."""
    lrs: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """Peak learning rates."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds."""


def main(args: Args) -> None:
    base = PretrainConfig(
        model=BackboneConfig(width=128, depth=3, heads=4, patch=4),
        kind=KindConfig(learngene_rank=44, tailor_rank=2),
        train=TrainConfig(steps=args.steps, log_every=args.steps // 20, save_every=args.steps),
    )
    rows = []
    for start in get_args(Start):
        for lr in args.lrs:
            for seed in args.seeds:
                config = replace(base, train=replace(base.train, lr=lr, seed=seed))
                if start == "dense":
                    config = replace(config, method="dense")
                else:
                    config = replace(config, kind=replace(config.kind, init=start))
                folder = args.work / f"{start}-{lr}-{seed}-{args.steps}"
                pretrain(config, folder)
                lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                last = [line["loss"] for line in lines[-4:]]
                rows.append({"start": start, "lr": lr, "seed": seed, "loss": sum(last) / len(last)})
                facts = {
                    "config": to_dict(base),
                    "versions": runtime.versions(),
                    "hardware": runtime.hardware(),
                }
                args.out.parent.mkdir(parents=True, exist_ok=True)
                write_json(args.out, facts | {"rows": rows})
    print(f"{'start':<14}" + "".join(f"{'lr ' + str(lr):>12}" for lr in args.lrs))
    for start in get_args(Start):
        means = [
            sum(r["loss"] for r in rows if (r["start"], r["lr"]) == (start, lr)) / len(args.seeds)
            for lr in args.lrs
        ]
        print(f"{start:<14}" + "".join(f"{mean:>12.4f}" for mean in means))


if __name__ == "__main__":
    main(tyro.cli(Args))
