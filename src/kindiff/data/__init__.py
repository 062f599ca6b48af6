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
    """Images as `open_images` opens them, or the latents of a directory made by `kindiff encode`.

    UsageError when they are not of config.latent_shape, where that is given.
    """
    from kindiff.data.latents import LatentSet, is_latents

    if config.groups:
        from kindiff.data.merged import open_merged

        return open_merged(config, open_samples)  # type: ignore[type-var]
    path = Path(config.source).expanduser()
    if not is_latents(path):
        if config.latent_shape and not path.exists():
            raise FileNotFoundError(f"latents {path} do not exist; make them with `kindiff encode`.")
        if config.latent_shape:
            raise UsageError(
                f"{config.source} holds images and latent_shape asks for latents; encode them first (`kindiff encode`)."
            )
        return open_images(config)
    if config.first:
        raise UsageError(
            f"first is {config.first}, but latents are taken from the start; encode the images apart."
        )
    latents = LatentSet.open(path)
    shape = (latents.channels, latents.size)
    if config.latent_shape not in ((), shape):
        raise UsageError(
            f"{path} holds latents of {shape[0]} channels and side {shape[1]} and latent_shape is "
            f"{config.latent_shape}; encode with the autoencoder and at the size that the recipe is for."
        )
    return latents.select(config.classes, per_class=config.per_class)


def open_images(config: DataConfig) -> ImageSet:
    """The images that a config asks for; drawn, or decoded once, into the cache when they are not there yet.

    Raises UsageError for what cannot be had (an unknown class, another size than a prepared set has, a folder
    of the wrong layout), FileNotFoundError for a missing folder, BadFileError for a damaged file.
    """
    from kindiff.data.hub import open_hub_images
    from kindiff.data.hub_rows import is_hub
    from kindiff.data.latents import is_latents

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
    if is_latents(path):
        raise UsageError(
            f"{path} holds latents and images are wanted here; give the images that they were made of."
        )
    if is_hub(config.source):
        return open_hub_images(config)
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
