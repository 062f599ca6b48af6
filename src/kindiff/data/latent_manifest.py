"""The manifest of latents: what it must hold, checked before anything of that size is allocated."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kindiff.classes import ClassSet
from kindiff.config import from_dict, to_dict
from kindiff.data.manifest import MANIFEST, MAX_IMAGES, MAX_SIDE, Skipped
from kindiff.errors import BadFileError, UsageError

FORMAT = 2
HALF = "half-encoded.json"
"""In a directory that is not whole yet: what is being encoded. The manifest takes its place at the end."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of latents."""

    rows: int
    """Samples in it."""
    bytes: int
    """Its length."""
    sha256: str
    """Of its bytes."""


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    """A class and its samples, which stand side by side."""

    name: str
    count: int


@dataclass(frozen=True, kw_only=True)
class CodecFacts:
    """The autoencoder: a copy of it lies beside the latents."""

    sha256: str
    """Of its weights and normalisation; a model trained on the latents records it."""
    scale: tuple[float, ...]
    """Of each channel: latents are (z - shift) * scale."""
    shift: tuple[float, ...]
    factor: int
    """Image side over latent side."""


@dataclass(frozen=True, kw_only=True)
class LatentManifest:
    """The content of `manifest.json`; UsageError, as the end of a sentence, where it contradicts itself."""

    kind: Literal["latents"] = "latents"
    format: Literal[2] = 2
    classes: tuple[ClassCount, ...]
    shards: tuple[Shard, ...]
    channels: int
    side: int
    dtype: Literal["float32", "float16"]
    autoencoder: CodecFacts
    images: str
    """SHA-256 of the pixels that were encoded."""
    skipped: tuple[Skipped, ...]
    config: dict
    """The settings of `kindiff encode`."""
    sha256: str = ""
    """Of classes, counts, shape, shards and autoencoder: equal for equal content; empty to be filled in."""

    def __post_init__(self) -> None:
        ClassSet(tuple(entry.name for entry in self.classes))
        numbers = [
            *((entry.count, 1, MAX_IMAGES) for entry in self.classes),
            *((shard.rows, 0, MAX_IMAGES) for shard in self.shards),
            (self.channels, 1, 2**10), (self.side, 1, MAX_SIDE),
        ]  # fmt: skip
        if bad := [n for n, low, high in numbers if not low <= n <= high]:
            raise UsageError(f"the number {bad[0]} in it is impossible.")
        counted, held = sum(e.count for e in self.classes), sum(s.rows for s in self.shards)
        if counted != held:
            raise UsageError(f"its classes count {counted} samples and its shards hold {held}.")
        if not self.sha256:
            object.__setattr__(self, "sha256", self.content_hash())
        if self.sha256 != self.content_hash():
            raise UsageError("its sha256 does not follow from the rest of it.")

    @staticmethod
    def read(directory: Path) -> LatentManifest:
        """The manifest of a directory; UsageError for a half-encoded one, FileNotFoundError without any, BadFileError
        for a wrong one."""
        from kindiff.checkpoint import read_json

        file = directory / MANIFEST
        if not file.is_file() and (directory / HALF).is_file():
            raise UsageError(
                f"{directory} is half encoded; run the same `kindiff encode` command again, it goes on where it was."
            )
        if not file.is_file():
            raise FileNotFoundError(f"{directory} holds no latents: it has no {MANIFEST}.")
        values = read_json(file)
        if values.get("kind") != "latents" or values.get("format") != FORMAT:
            raise BadFileError(f"{file} does not describe latents of format {FORMAT}; encode again.")
        try:
            return from_dict(LatentManifest, values)
        except UsageError as error:
            raise BadFileError(f"{file} is damaged: {error}") from None

    def content_hash(self) -> str:
        """SHA-256 of what the latents are."""
        classes = [[entry.name, entry.count] for entry in self.classes]
        shape = [self.channels, self.side, self.dtype]
        content = [classes, shape, [shard.sha256 for shard in self.shards], self.autoencoder.sha256]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain values for `manifest.json`."""
        return to_dict(self)


def shard_file(number: int) -> str:
    """Name of a shard."""
    return f"shard-{number:05d}.npy"
