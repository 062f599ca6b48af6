"""Images and latents as labelled sets, and batches of them (`kindiff.data.batches`, which needs torch)."""

from __future__ import annotations

from pathlib import Path

from kindiff.config import DataConfig
from kindiff.data.manifest import MANIFEST
from kindiff.data.prepared import ImageSet as ImageSet
from kindiff.data.prepared import open_prepared as open_prepared
from kindiff.data.sets import SampleSet as SampleSet
from kindiff.errors import UsageError

__all__ = ["ImageSet", "SampleSet", "open_images", "open_prepared", "open_samples"]


def open_samples(config: DataConfig) -> SampleSet:
    """Images as `open_images` opens them, or the latents of a directory made by `kindiff encode`."""
    from kindiff.data.latents import LATENTS, LatentSet

    if config.groups:
        from kindiff.data.merged import open_merged

        return open_merged(config, open_samples)  # type: ignore[type-var]
    path = Path(config.source).expanduser()
    if not (path / LATENTS).is_file():
        return open_images(config)
    if config.first:
        raise UsageError(
            f"first is {config.first}, but latents are taken from the start; encode the images apart."
        )
    return LatentSet.open(path).select(config.classes, per_class=config.per_class)


def open_images(config: DataConfig) -> ImageSet:
    """The images that a config asks for; drawn, or decoded once, into the cache when they are not there yet.

    Raises UsageError for what cannot be had (an unknown class, another size than a prepared set has, a folder
    of the wrong layout), FileNotFoundError for a missing folder, BadFileError for a damaged file.
    """
    if config.groups:
        from kindiff.data.merged import open_merged

        return open_merged(config, open_images)
    if config.source.startswith("avatars:"):
        from kindiff.data.avatars import open_avatars

        group = config.source.removeprefix("avatars:")
        return open_avatars(
            group, size=config.size, classes=config.classes, per_class=config.per_class, first=config.first
        )
    path = Path(config.source).expanduser()
    if (path / MANIFEST).is_file():
        images = open_prepared(path)
        if images.size != config.size:
            raise UsageError(
                f"{path} was prepared at {images.size} px and size is {config.size}; set size to "
                f"{images.size}, or prepare the images again."
            )
    else:
        from kindiff.data.folder import open_folder

        images = open_folder(path, size=config.size, classes=config.classes, strict=config.strict)
    return images.select(config.classes, per_class=config.per_class, first=config.first)
