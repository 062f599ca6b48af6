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
    """Where the parameters, bytes and GMACs of a model, a parts directory or a described design are."""

    path: tyro.conf.Positional[Path]
    """Model directory, components directory, or a design (recipes/designs/*.toml)."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a JSON object."""
    explain_cost: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Say in which of several equal ways the matrices will be computed, and why."""
    images: int = 8
    """Images of the batch that --explain-cost speaks of."""


def run(args: Args) -> None:
    """Print the table."""
    facts = report(args.path, images=args.images)
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    print(f"{facts['kind']} {args.path}: {facts['summary']}\n")
    print(f"{'part':<16}{'parameters':>13}{'trainable':>13}{'MiB':>10}{'GMACs':>10}")
    for name, cost in [*facts["parts"].items(), ("total", facts["total"])]:
        print(
            f"{name:<16}{cost['parameters']:>13,}{cost['trainable']:>13,}{cost['bytes'] / 2**20:>10.2f}"
            f"{cost['macs'] / 1e9:>10.4f}"
        )
    if facts["disk_bytes"]:
        print(f"\non disk: {facts['disk_bytes'] / 2**20:.2f} MiB", end="")
    own, dense = facts["per_class"], facts["dense"]
    saved = (dense["macs"] - facts["total"]["macs"]) / 1e9
    print(
        f"\none class: {own['parameters']:,} parameters, {own['bytes'] / 2**20:.3f} MiB\n"
        f"the dense model of this shape: {dense['parameters']:,} parameters, {dense['macs'] / 1e9:.4f} GMACs; "
        f"this one saves {saved:.4f} GMACs\n"
        "GMACs: multiply-accumulates of one forward pass of one image, attention included"
    )
    if args.explain_cost:
        print("\nhow it is computed:", *facts["how"], sep="\n  ")


def report(path: Path, images: int = 8) -> dict[str, Any]:
    """The figures of a model, parts directory or design, as plain values."""
    from kindiff import checkpoint
    from kindiff.components import load_components
    from kindiff.config import DesignConfig, load_recipe
    from kindiff.evaluate.design import design
    from kindiff.models import DiT

    if path.suffix == ".toml":
        return _figures(design(load_recipe(path, DesignConfig)), "design", 0, images)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} is neither a model nor a components directory: it has no config.json."
        )
    kind = checkpoint.read_json(path / "config.json").get("kind")
    disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if kind == "components":
        return _figures(load_components(path).recombine(layers="factored"), "components", disk, images)
    return _figures(DiT.from_pretrained(path), "model", disk, images)


def _figures(model: DiT, kind: str, disk: int, images: int) -> dict[str, Any]:
    import torch

    from kindiff.components.strategy import explain
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
        "disk_bytes": disk,
        "how": explain(model, images),
    }
