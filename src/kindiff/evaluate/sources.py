"""What a person names on the command line, as samples or as a reference."""

from __future__ import annotations

from pathlib import Path

from kindiff.checkpoint import read_json
from kindiff.config import DataConfig, SampleConfig
from kindiff.data import ImageSet, open_images, open_prepared
from kindiff.data.hub_rows import is_hub
from kindiff.errors import UsageError
from kindiff.evaluate import adm
from kindiff.evaluate import reference as references
from kindiff.evaluate.features import Features
from kindiff.evaluate.generated import GeneratedImages
from kindiff.evaluate.images import ArrayImages, FolderImages, Images, NpzImages
from kindiff.evaluate.reference import Reference
from kindiff.evaluate.store import Progress, no_progress

PER_CLASS = 50
"""Samples of each class that a model draws when no count is asked for."""


def from_set(images: ImageSet, name: str) -> ArrayImages:
    """A labelled set as images to evaluate, or to make a reference of; they are read as they are needed."""
    return ArrayImages(
        name=name, array=images.stored, rows=images.rows, sha256=images.sha256, labels=images.labels,
        classes=images.classes,
    )  # fmt: skip


def open_samples(
    path: Path, *, count: int = 0, classes: tuple[str, ...] = (), sampling: SampleConfig | None = None
) -> Images:
    """Samples: an .npz file, a model directory (drawn on the way), a prepared set, or a folder of images.

    count: how many a model draws, 0 for PER_CLASS of each class; only for models. classes: only these. Raises
    UsageError for a combination that makes no sense, FileNotFoundError when there is nothing at path.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; give a folder of images, an .npz file or a model directory."
        )
    kind = read_json(path / "config.json").get("kind") if (path / "config.json").is_file() else None
    # Parts and a run, when they are read as a model, say what they are.
    if kind in ("model", "components") or (path / "run.json").is_file():
        return GeneratedImages(path, count, sampling or SampleConfig(), classes=classes, per_class=PER_CLASS)
    if count:
        raise UsageError(
            f"count is {count}, but {path} is no model directory: all of its images are evaluated."
        )
    if path.is_file():
        if path.suffix != ".npz":
            raise UsageError(f"{path} is neither a folder nor an .npz file.")
        if classes:
            raise UsageError(f"{path} has no class names, so classes {classes} cannot be picked from it.")
        return NpzImages(path)
    if (path / "manifest.json").is_file():
        return from_set(open_prepared(path).select(classes), str(path))
    return FolderImages(path, classes=classes)


def open_reference(
    source: str,
    features: Features,
    folder: Path,
    *,
    size: tuple[int, ...],
    classes: tuple[str, ...] = (),
    per_class: int = 0,
    groups: str = "",
    split: str = "",
    batch: int = 64,
    progress: Progress = no_progress,
) -> Reference:
    """A reference: avatars:base|novel|all, a prepared set, a folder, an .npz file or a stored reference.

    Images of a folder with class sub-folders are scaled and centre-cropped to size, as for training; those of
    a flat folder are taken as they are. folder: where built references are kept. classes, per_class, groups, split:
    as in DataConfig.
    """
    path = Path(source).expanduser()
    picks = bool(classes or per_class or groups or split)
    if path.suffix == ".npz" or (path / "reference.json").is_file():
        if picks:
            raise UsageError(f"{source} is whole; classes or images cannot be picked from it.")
        if path.suffix == ".npz":
            return adm.read_reference(path, features, folder, batch=batch, progress=progress)
        return references.load(path)
    images: Images
    if (
        path.is_dir()
        and not any(child.is_dir() and child.name[0] != "." for child in path.iterdir())
        and not (path / "manifest.json").is_file()
        and not is_hub(source)
    ):
        if picks:
            raise UsageError(f"{source} has no sub-folders, so no classes to pick from.")
        images = FolderImages(path)
    else:
        if size[0] != size[1]:
            raise UsageError(
                f"samples are {size[1]} x {size[0]} pixels; {source} gives square references only: use a flat "
                "folder of images of the samples' size."
            )
        config = DataConfig(
            source=source, size=size[0], classes=classes, per_class=per_class, groups=groups, split=split
        )
        images = from_set(open_images(config), source)
    return references.build(images, features, folder, batch=batch, progress=progress)
