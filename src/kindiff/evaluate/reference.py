"""Reference statistics: built once from real images, stored with the hash of what they were made from.

Shapes: N reference images, K of them kept, D feature dimensions.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from kindiff.checkpoint import FORMAT, new_directory, read_json, read_tensors, write_json, write_tensors
from kindiff.classes import ClassSet
from kindiff.config import from_dict
from kindiff.data.cache import alone
from kindiff.errors import BadFileError, UsageError
from kindiff.evaluate.features import Features
from kindiff.evaluate.images import Images
from kindiff.evaluate.metrics import frechet_distance
from kindiff.evaluate.moments import Moments, moments
from kindiff.evaluate.probe import Probe, fit_probe
from kindiff.evaluate.store import FeatureSet, Progress, compute, digest, identity, no_progress
from kindiff.randomness import Purpose, stream

KEPT = 20_000
"""Images whose features are kept for precision, recall, KID, the probe and the real/real floor."""
GAUSSIAN_OUTPUTS = ("pool", "spatial")
"""Outputs that a Fréchet distance is computed on."""
PROBE_IMAGES = 100
"""The probe trains on at most this many reference images a class, and is checked on as many others."""


@dataclass(frozen=True, kw_only=True)
class ReferenceInfo:
    """What a reference is, without its arrays."""

    name: str
    """What a person calls it."""
    images_sha256: str
    """Hash of the images."""
    features: str
    """Name of the feature network."""
    features_sha256: str
    """Hash of its weights."""
    resize: str
    """How images became its input."""
    size: tuple[int, ...]
    """Height and width of the images."""
    encoding: str
    """What the pixels went through."""
    count: int
    """N; 0 when a foreign file does not say."""
    kept: int
    """K."""
    classes: tuple[str, ...] = ()
    """Names of the classes, where known."""

    @property
    def sha256(self) -> str:
        """Hash of what the reference was made from and how."""
        fields = asdict(self)
        del fields["name"]
        return digest(fields)


@dataclass(frozen=True)
class Reference:
    """Statistics of real images, and the features of an evenly spaced part of them."""

    info: ReferenceInfo
    """What it was made from."""
    moments: dict[str, Moments]
    """Mean and covariance of all N images, by output."""
    kept: dict[str, np.ndarray]
    """Features of the K kept images by output, float32 (K, D)."""
    labels: np.ndarray | None
    """(K,) class ids, or None."""

    @property
    def classes(self) -> ClassSet | None:
        return ClassSet(self.info.classes) if self.info.classes else None

    @cached_property
    def probe(self) -> tuple[Probe | None, float | None]:
        """The probe trained on every other kept image of each class, and its accuracy on the others."""
        if self.labels is None or self.classes is None or len(self.classes) < 2:
            return None, None
        pool_KD, classes = self.kept["pool"], len(self.classes)
        of_class = [np.flatnonzero(self.labels == i) for i in range(classes)]
        if min(len(rows) for rows in of_class) < 2:
            return None, None
        train = np.concatenate([rows[0::2][:PROBE_IMAGES] for rows in of_class])
        held = np.concatenate([rows[1::2][:PROBE_IMAGES] for rows in of_class])
        probe = fit_probe(pool_KD[train], self.labels[train], classes=classes)
        return probe, probe.accuracy(pool_KD[held], self.labels[held])

    @cached_property
    def floors(self) -> dict[tuple[str, int], Floor | None]:
        """What `real_floor` has found so far, by output and count."""
        return {}


@dataclass(frozen=True)
class Floor:
    """The Fréchet distance between two disjoint sets of real images: what a perfect model would get."""

    value: float
    """The distance."""
    count: int
    """Images in each of the two sets."""
    note: str
    """How the sets were made."""


def real_floor(reference: Reference, output: str, count: int) -> Floor | None:
    """The floor for `count` samples: two random disjoint sets of count kept images each (fixed seed).

    When fewer than 2 x count are kept, the sets are their halves and the note says so: a floor of fewer
    images is higher. None when fewer than 4 images are kept.
    """
    if (output, count) not in reference.floors:
        reference.floors[output, count] = _floor(reference.kept[output], count)
    return reference.floors[output, count]


def _floor(kept: np.ndarray, count: int) -> Floor | None:
    half = min(count, len(kept) // 2)
    if half < 2:
        return None
    order = stream(0, Purpose.FOLD, 0).permutation(len(kept))
    value = frechet_distance(moments(kept[order[:half]]), moments(kept[order[half : 2 * half]]))
    note = f"two disjoint sets of {half} real images"
    if half < count:
        note += f" ({len(kept)} are kept, not the 2 x {count} of the same N: this floor is too high)"
    return Floor(value, half, note)


def build(
    images: Images,
    features: Features,
    folder: Path,
    *,
    keep: int = KEPT,
    batch: int = 64,
    progress: Progress = no_progress,
) -> Reference:
    """The reference of these images, made once and stored under folder by its hash; resumable. Of several processes
    that ask at once one makes it.

    keep: at most this many images, evenly spaced, keep their features. A class subset is a set of images of
    its own, with a reference of its own.
    """
    key = digest([FORMAT, identity(images, features), keep])[:16]
    target, work = folder / key, folder / f"{key}.work"
    if not target.exists():
        with alone(target):
            if not target.exists():
                found = compute(images, features, work, batch=batch, progress=progress)
                reference = from_features(images, features, found, keep)
                save(reference, target)
                shutil.rmtree(work)
                return reference
    return replace_name(load(target), images.name)


def from_features(images: Images, features: Features, found: FeatureSet, keep: int = KEPT) -> Reference:
    """A reference of features that are there already."""
    index = evenly(found.count, keep)
    outputs = [name for name in GAUSSIAN_OUTPUTS if name in found.outputs]
    info = ReferenceInfo(
        name=images.name,
        images_sha256=images.sha256,
        features=features.name,
        features_sha256=features.sha256,
        resize=features.resize,
        size=images.size,
        encoding=images.encoding,
        count=found.count,
        kept=len(index),
        classes=images.classes.names if images.classes else (),
    )
    return Reference(
        info=info,
        moments={name: found.moments(name) for name in outputs},
        kept={name: found.rows(name, index) for name in outputs},
        labels=None if images.labels is None else np.asarray(images.labels)[index],
    )


def evenly(count: int, keep: int) -> np.ndarray:
    """At most keep numbers of 0 .. count-1, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(keep, count)).round().astype(np.int64))


def replace_name(reference: Reference, name: str) -> Reference:
    """The same reference under the name that it is asked for by now."""
    return replace(reference, info=replace(reference.info, name=name))


def save(reference: Reference, target: Path) -> None:
    """A directory: reference.json and reference.safetensors. It appears whole or not at all."""
    arrays = {f"kept.{name}": value for name, value in reference.kept.items()}
    for name, value in reference.moments.items():
        arrays |= {f"mean.{name}": value.mean, f"cov.{name}": value.cov}
    if reference.labels is not None:
        arrays["labels"] = reference.labels.astype(np.int64)
    with new_directory(target) as folder:
        write_json(folder / "reference.json", {"format": FORMAT, **asdict(reference.info)})
        write_tensors(
            folder / "reference.safetensors", {key: torch.from_numpy(value) for key, value in arrays.items()}
        )


def load(folder: Path) -> Reference:
    """A stored reference; BadFileError when its files are damaged or of another format."""
    fields = read_json(folder / "reference.json")
    if fields.pop("format", None) != FORMAT:
        raise BadFileError(f"{folder} is a reference of another format; delete it, it is made again.")
    arrays = {key: value.numpy() for key, value in read_tensors(folder / "reference.safetensors").items()}
    try:
        info = from_dict(ReferenceInfo, fields)
        outputs = [name for name in GAUSSIAN_OUTPUTS if f"mean.{name}" in arrays]
        return Reference(
            info=info,
            moments={n: Moments(info.count, arrays[f"mean.{n}"], arrays[f"cov.{n}"]) for n in outputs},
            kept={name: arrays[f"kept.{name}"] for name in outputs},
            labels=arrays.get("labels"),
        )
    except (KeyError, UsageError) as error:
        raise BadFileError(f"{folder} is no whole reference ({error}); delete it.") from None


def check_features(reference: Reference, features: Features) -> None:
    """UsageError when the samples' network is not the reference's."""
    for field in ("features", "features_sha256", "resize"):
        own = features.name if field == "features" else getattr(features, field.removeprefix("features_"))
        if (other := getattr(reference.info, field)) != own:
            raise UsageError(
                f"the reference's {field} is {other!r}, the samples' {own!r}; build the reference with the "
                "same feature network."
            )
