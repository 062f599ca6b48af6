"""A trained rival as a small directory: config.json and the tensors that trained, to be put on its base again."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kindiff import checkpoint
from kindiff.classes import ClassSet
from kindiff.config import RivalConfig, from_dict, to_dict
from kindiff.errors import BadFileError, UsageError
from kindiff.models.dit import DiT
from kindiff.rivals.registry import start

TENSORS = "adapter.safetensors"


def save_adapter(model: DiT, base: DiT, config: RivalConfig, directory: str | Path, *, seed: int) -> None:
    """Write what trains in `model`, which `start(base, model.classes, config, seed=seed)` began."""
    tensors = _trained(model)
    with checkpoint.new_directory(Path(directory)) as folder:
        description = {
            "format": checkpoint.FORMAT,
            "kind": "adapter",
            "rival": to_dict(config),
            "seed": seed,
            "classes": list(model.classes.names),
            "base": checkpoint.hash_tensors(base.state_dict()),
            "weights": checkpoint.hash_tensors(tensors),
        }
        checkpoint.write_json(folder / "config.json", description)
        checkpoint.write_tensors(folder / TENSORS, tensors)


@torch.no_grad()
def load_adapter(base: DiT, directory: str | Path) -> DiT:
    """The trained model again: started on the base as it was, then its trained tensors put in.

    Raises FileNotFoundError, BadFileError for a damaged directory, UsageError for another base than it was trained on.
    """
    folder = Path(directory)
    description = checkpoint.read_description(
        folder, "adapter", wanted=f"an adapter of format {checkpoint.FORMAT} is wanted"
    )
    try:
        config = from_dict(RivalConfig, description.get("rival"))
        classes = ClassSet(tuple(description.get("classes") or ()))
        seed = int(description["seed"])
    except (UsageError, KeyError, TypeError, ValueError) as error:
        raise BadFileError(f"{folder / 'config.json'} is damaged: {error}") from None
    if description.get("base") != checkpoint.hash_tensors(base.state_dict()):
        raise UsageError(
            f"the adapter {folder} was trained on another base; give the model that it stands on."
        )
    model = start(base, classes, config, seed=seed)
    tensors = checkpoint.read_tensors(folder / TENSORS)
    wanted = _trained(model)
    checkpoint.check_tensors(folder / TENSORS, tensors, wanted)
    checkpoint.check_hash(folder / TENSORS, tensors, description.get("weights"))
    for name, parameter in wanted.items():
        parameter.copy_(tensors[name])
    return model


def _trained(model: DiT) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
