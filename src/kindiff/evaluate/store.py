"""Features of a set of images, kept in shards on disk: an interrupted evaluation goes on where it stopped.

Shapes: N images, B batch, D feature dimensions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from kindiff.checkpoint import open_tensors, read_json, write_file, write_json
from kindiff.errors import UsageError
from kindiff.evaluate.features import Features, extract
from kindiff.evaluate.images import Images
from kindiff.evaluate.moments import Moments, MomentsBuilder
from kindiff.parallel import ALONE, Ranks

SHARD = 512
"""Images a shard: what an interruption can cost."""

Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""


def no_progress(done: int, total: int) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class FeatureSet:
    """The features of N images, in the order of the images."""

    shards: tuple[Path, ...]
    """Their files."""
    count: int
    """N."""
    dims: tuple[tuple[str, int], ...]
    """Outputs and their D."""

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.dims)

    def parts(self, output: str) -> Iterator[np.ndarray]:
        """One output, shard by shard, float32 (B, D)."""
        for path in self.shards:
            with open_tensors(path) as file:
                yield file.get_tensor(output).numpy()

    def rows(self, output: str, index: np.ndarray | None = None) -> np.ndarray:
        """One output of all images, or of those in index (ascending), float32 (N, D)."""
        picked, start = [], 0
        for part in self.parts(output):
            inside = (
                slice(None)
                if index is None
                else index[(index >= start) & (index < start + len(part))] - start
            )
            picked.append(part[inside])
            start += len(part)
        return np.concatenate(picked)

    def moments(self, output: str) -> Moments:
        """Mean and covariance of one output."""
        builder = MomentsBuilder(dict(self.dims)[output])
        for part in self.parts(output):
            builder.add(part)
        return builder.build()


EXTRACTION = 2
"""Raised when the same image and network give other features, so that no old ones are taken for new."""


def identity(images: Images, features: Features) -> dict[str, object]:
    """What the features depend on: the images, the network, its input."""
    return {
        "extraction": EXTRACTION,
        "images": images.sha256,
        "count": len(images),
        "features": features.name,
        "features_sha256": features.sha256,
        "resize": features.resize,
    }


def digest(value: object) -> str:
    """SHA-256 of plain values, as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def compute(
    images: Images,
    features: Features,
    folder: Path,
    *,
    batch: int = 64,
    progress: Progress = no_progress,
    ranks: Ranks = ALONE,
) -> FeatureSet:
    """Features of all images, in shards under folder; shards that are there already are not computed again.

    batch: images at once; the shards do not depend on it beyond float32 rounding (docs/numerics.md). Of several
    ranks each computes a shard in turn. Raises
    UsageError when the folder holds features of other images or of another network.
    """
    whose = identity(images, features)
    record = folder / "features.json"
    if record.exists() and (other := read_json(record)) != whose:
        fields = [name for name in whose if other.get(name) != whose[name]]
        raise UsageError(
            f"{folder} holds features of something else ({', '.join(fields)} differ); choose another output "
            "folder or delete this one."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, whose)
    count, starts = len(images), range(0, len(images), SHARD)
    shards = [_shard(folder, start) for start in starts]
    mine = starts[ranks.rank :: ranks.count]
    total = sum(min(SHARD, count - start) for start in mine)
    done = sum(min(SHARD, count - start) for start in mine if _shard(folder, start).exists())
    progress(done, total)
    for start in mine:
        stop = min(start + SHARD, count)
        path = _shard(folder, start)
        if not path.exists():
            parts = []
            for at in range(start, stop, batch):
                end = min(at + batch, stop)
                parts.append(extract(features, images.read(at, end), first=at))
                done += end - at
                progress(done, total)
            write_file(
                path, save({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
            )
    ranks.wait()
    with open_tensors(shards[0]) as file:
        dims = tuple((name, file.get_slice(name).get_shape()[1]) for name in sorted(file.keys()))
    return FeatureSet(tuple(shards), count, dims)


def _shard(folder: Path, start: int) -> Path:
    return folder / f"{start:08d}.safetensors"
