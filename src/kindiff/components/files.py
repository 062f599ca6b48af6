"""A components directory: config.json, learngenes.safetensors, tailors/<class>.safetensors.

One class can be shipped alone, and reading some classes does not read the others. Each tailor file carries the
hash of the learngenes that it fits. docs/formats.md describes the files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kindiff import checkpoint
from kindiff.classes import ClassSet
from kindiff.components.build import Structure, empty
from kindiff.components.parts import EMBEDDING, GATE, NULL_EMBEDDING, Components
from kindiff.components.swap import Tailor
from kindiff.config import MATRICES, DiTConfig, from_dict, to_dict
from kindiff.errors import BadFileError, UsageError
from kindiff.models.codec import Codec, open_codec


def save_components(parts: Components, directory: str | Path, *, autoencoder: Codec | None = None) -> None:
    """Write a components directory; it appears whole or not at all. Parts of a latent model need its autoencoder."""
    if (autoencoder.fingerprint() if autoencoder else "") != parts.config.autoencoder:
        raise UsageError(
            "parts of a latent model are saved with its own autoencoder, those of a pixel model with none."
        )
    fingerprint = parts.learngene_hash
    with checkpoint.new_directory(Path(directory)) as folder:
        description = {
            "format": checkpoint.FORMAT,
            "kind": "components",
            "model": to_dict(parts.config),
            "targets": list(parts.targets),
            "learngene_rank": parts.learngene_rank,
            "learngenes": fingerprint,
            "classes": list(parts.classes),
        }
        checkpoint.write_json(folder / "config.json", description)
        checkpoint.write_tensors(folder / "learngenes.safetensors", parts.learngenes)
        if autoencoder is not None:
            (folder / "autoencoder").mkdir()
            autoencoder.write_files(folder / "autoencoder")
        (folder / "tailors").mkdir()
        for name, tensors in parts.tailors.items():
            content = checkpoint.hash_tensors(tensors)
            metadata = {"class": name, "learngenes": fingerprint, "sha256": content}
            checkpoint.write_tensors(folder / "tailors" / f"{name}.safetensors", tensors, metadata)


def load_components(directory: str | Path, classes: Iterable[str] | None = None) -> Components:
    """Read a components directory; of the tailors only those of `classes` (None: all) are opened.

    Raises FileNotFoundError, UsageError for a class it does not list, or BadFileError naming the file that is
    damaged, of other shapes, or a tailor of other learngenes.
    """
    folder = Path(directory)
    description = _description(folder)
    listed = ClassSet(tuple(description["classes"]))
    # `classes` says which there are: a tailor shipped alone is added by its name there
    config = replace(from_dict(DiTConfig, description["model"]), num_classes=len(listed))
    wanted = listed.names if classes is None else tuple(classes)
    listed.ids(wanted)
    targets = tuple(description["targets"])

    path = folder / "learngenes.safetensors"
    checkpoint.check_depth(path, config.depth)
    learngenes = checkpoint.read_tensors(path)
    checkpoint.check_tensors(
        path, learngenes, _learngenes_wanted(config, description["learngene_rank"], listed)
    )
    tailors = {name: _read_tailor(folder, name, config, description) for name in wanted}
    checkpoint.check_hash(path, learngenes, description["learngenes"])
    return Components(config, targets, learngenes, tailors)


def load_tailor(directory: str | Path, name: str) -> Tailor:
    """One class of a components directory, for `swap_tailor_`: only its file is read, not the learngenes.

    Raises FileNotFoundError, UsageError for a class it does not list, or BadFileError as `load_components` does.
    """
    folder = Path(directory)
    description = _description(folder)
    ClassSet(tuple(description["classes"])).id(name)
    config = from_dict(DiTConfig, description["model"])
    tensors = _read_tailor(folder, name, config, description)
    return Tailor(name, tensors, description["learngenes"])


def load_autoencoder(directory: str | Path) -> Codec | None:
    """The autoencoder of a components directory, where its parts are a latent model's."""
    folder = Path(directory) / "autoencoder"
    return open_codec(folder) if folder.is_dir() else None


def _description(folder: Path) -> dict[str, Any]:
    description = checkpoint.read_description(
        folder,
        "components",
        wanted=f"components of format {checkpoint.FORMAT} are wanted (make them with `kindiff decompose`)",
    )
    try:
        from_dict(DiTConfig, description.get("model"))
        ClassSet(tuple(description.get("classes") or ()))
        rank, targets = description["learngene_rank"], description["targets"]
        sound = type(rank) is int and 0 < rank < 2**20 and isinstance(description["learngenes"], str)
        if not sound or not isinstance(targets, list) or not set(targets) <= set(MATRICES):
            raise UsageError("learngene_rank, learngenes or targets is not what it should be")
    except (UsageError, TypeError, KeyError) as error:
        raise BadFileError(f"{folder / 'config.json'} is damaged: {error}") from None
    return description


def _learngenes_wanted(config: DiTConfig, rank: int, classes: ClassSet) -> dict[str, Tensor]:
    """Names, shapes and dtypes of the learngenes, on the meta device."""
    with torch.device("meta"):
        model = empty(config, classes, Structure(rank=rank, tailor_rank=0, slots=0))
        wanted = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name != "class_embed.weight" and not name.startswith(GATE)
        }
        wanted[NULL_EMBEDDING] = torch.empty(config.width)
    return wanted


def _read_tailor(
    folder: Path, name: str, config: DiTConfig, description: dict[str, Any]
) -> dict[str, Tensor]:
    learngenes = description["learngenes"]
    path = folder / "tailors" / f"{name}.safetensors"
    with checkpoint.open_tensors(path) as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if metadata.get("class") != name or metadata.get("learngenes") != learngenes:
        raise BadFileError(
            f"{path} is the tailor of class {metadata.get('class')!r} for other learngenes; a tailor only fits "
            "the learngenes that it was trained with."
        )
    wanted = {EMBEDDING: torch.empty(config.width, device="meta")}
    for i in range(config.depth):
        for matrix in description["targets"]:
            key, (features_out, features_in) = f"blocks.{i}.{matrix}", config.matrix_shape(matrix)
            rank = tensors.get(f"{key}.sigma", torch.empty(0)).numel()
            shapes = {"u": (rank, features_out), "sigma": (rank,), "v": (rank, features_in)}
            # A tailor may stand in some of the targets.
            if any(f"{key}.{leaf}" in tensors for leaf in shapes):
                for leaf, shape in shapes.items():
                    wanted[f"{key}.{leaf}"] = torch.empty(shape, device="meta")
    checkpoint.check_tensors(path, tensors, wanted)
    checkpoint.check_hash(path, tensors, metadata.get("sha256"))
    return tensors
