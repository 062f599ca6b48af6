"""A learngene of TLEG, FINE or WAVE as a directory: config.json and the constrained model's tensors."""

from __future__ import annotations

from pathlib import Path

import torch

from kindiff import checkpoint
from kindiff.classes import ClassSet
from kindiff.config import DiTConfig, from_dict, to_dict
from kindiff.errors import BadFileError, UsageError
from kindiff.models.dit import DiT
from kindiff.rivals.base import densified
from kindiff.rivals.learngenes import BANKS, constrained, stretched, with_tensors

TENSORS = "learngene.safetensors"
LEARNGENE = "learngene"
"""Where a pre-training run keeps it, beside its model."""


def save_learngene(model: DiT, method: str, directory: str | Path) -> None:
    """Write a constrained model."""
    tensors = model.state_dict()
    with checkpoint.new_directory(Path(directory)) as folder:
        description = {
            "format": checkpoint.FORMAT,
            "kind": "learngene",
            "method": method,
            "model": to_dict(model.config),
            "classes": list(model.classes.names),
            "weights": checkpoint.hash_tensors(tensors),
        }
        checkpoint.write_json(folder / "config.json", description)
        checkpoint.write_tensors(folder / TENSORS, tensors)


def load_learngene(directory: str | Path, *, method: str | None = None, depth: int | None = None) -> DiT:
    """The constrained model again, at its own depth or another one: what blocks have of their own is interpolated.

    Raises FileNotFoundError, BadFileError for a damaged directory, UsageError where it is not of the wanted method.
    """
    folder = Path(directory)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no learngene directory: it has no config.json (pre-train with method tleg, fine or wave)."
        )
    description = checkpoint.read_json(path)
    found = description.get("method")
    if (
        description.get("kind") != "learngene"
        or description.get("format") != checkpoint.FORMAT
        or found not in BANKS
    ):
        raise BadFileError(f"{path} does not describe a learngene of format {checkpoint.FORMAT}.")
    if method not in (None, found):
        raise UsageError(f"{folder} is a learngene of method {found!r}; {method!r} is wanted.")
    try:
        config = from_dict(DiTConfig, description.get("model"))
        classes = ClassSet(tuple(description.get("classes") or ()))
        with torch.device("meta"):
            wanted = constrained(config, classes, found).state_dict()
    except (UsageError, TypeError) as error:
        raise BadFileError(f"{path} is damaged: {error}") from None
    tensors = checkpoint.read_tensors(folder / TENSORS)
    checkpoint.check_tensors(folder / TENSORS, tensors, wanted)
    checkpoint.check_hash(folder / TENSORS, tensors, description.get("weights"))
    model = with_tensors(config, classes, found, tensors)
    return model if depth in (None, config.depth) else stretched(model, found, depth)


def expand(directory: str | Path, *, depth: int | None = None) -> DiT:
    """A plain dense model from a learngene directory, at its own depth or another one."""
    return densified(load_learngene(directory, depth=depth))
