"""kindiff inspect"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from kindiff.models import DiT


@dataclass(frozen=True, kw_only=True)
class Args:
    """Where the parameters, bytes and GMACs of a model or a parts directory are; per class too."""

    path: tyro.conf.Positional[Path]
    """Model directory or components directory."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a JSON object."""


def run(args: Args) -> None:
    """Print the table."""
    facts = report(args.path)
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    print(f"{facts['kind']} {args.path}: {facts['summary']}\n")
    print(f"{'part':<16}{'parameters':>12}{'MiB':>9}{'GMACs':>9}")
    for name, cost in [*facts["parts"].items(), ("total", facts["total"])]:
        print(f"{name:<16}{cost['parameters']:>12,}{cost['bytes'] / 2**20:>9.2f}{cost['macs'] / 1e9:>9.4f}")
    print(
        f"\none class: {facts['per_class']['parameters']:,} parameters, "
        f"{facts['per_class']['bytes'] / 2**20:.3f} MiB. The dense model of this shape: "
        f"{facts['dense']['parameters']:,} parameters, {facts['dense']['macs'] / 1e9:.4f} GMACs."
    )
    print("GMACs: multiply-accumulates of one forward pass of one image, attention included.")


def report(path: Path) -> dict[str, Any]:
    """The figures of a model or parts directory, as plain values."""
    from kindiff import checkpoint
    from kindiff.components import load_components
    from kindiff.models import DiT

    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} is neither a model nor a components directory: it has no config.json."
        )
    kind = checkpoint.read_json(path / "config.json").get("kind")
    if kind == "components":
        return _figures(load_components(path).recombine(layers="factored"), "components")
    return _figures(DiT.from_pretrained(path), "model")


def _figures(model: DiT, kind: str) -> dict[str, Any]:
    import torch

    from kindiff.evaluate.cost import closed_macs, cost_table, tailor_parameters, total
    from kindiff.models import DiT

    table = cost_table(model)
    with torch.device("meta"):
        dense = sum(p.numel() for p in DiT(model.config).parameters())
    structure = model.structure or {}
    config = model.config
    split = (
        f"learngene rank {structure['rank'] or 'dense'}, tailor rank {structure['tailor_rank']}, "
        f"{structure['slots']} slots"
        if structure
        else "dense matrices"
    )
    own = tailor_parameters(model) if structure else config.width
    return {
        "kind": kind,
        "summary": f"width {config.width}, depth {config.depth}, {config.tokens} tokens, "
        f"{len(model.classes)} classes, {split}, {config.objective} objective",
        "classes": list(model.classes.names),
        "parts": {name: dataclasses.asdict(cost) for name, cost in table.items()},
        "total": dataclasses.asdict(total(table)),
        "per_class": {"parameters": own, "bytes": own * 4},
        "dense": {"parameters": dense, "macs": sum(closed_macs(config).values())},
    }
