"""Latents: a directory of shards (memory-mapped), a manifest, and the autoencoder that made them.

N samples of the set, B batch, C channels, h w latent side. A shard is (n, 2, 2, C, h, w): sample; image as it is or
mirrored; mean or log-variance.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kindiff.classes import ClassSet
from kindiff.data.latent_manifest import HALF, LatentManifest, Shard, shard_file
from kindiff.data.manifest import MANIFEST
from kindiff.data.prepared import hash_once
from kindiff.errors import BadFileError
from kindiff.progress import Track

if TYPE_CHECKING:
    from kindiff.models.codec import Codec

VERIFIED = 2**30
"""Latents up to this many bytes are read through and compared with their hashes when they are opened, once a
process; larger ones by `kindiff data check`."""
_AGAIN = "remove it and run `kindiff encode` again: only that shard is made anew"


@dataclass(frozen=True, eq=False)
class LatentSet:
    """Labelled latents of images and of their mirror images, or a selection of them.

    Pickling one passes its path, not its latents (for loader processes).
    """

    path: Path
    """Directory of the latents."""
    classes: ClassSet
    """The classes; labels are their ids."""
    labels: np.ndarray
    """(N,) int64 class ids."""
    rows: np.ndarray
    """(N,) int64 row of each sample, counted through the shards."""
    channels: int
    """Latent channels."""
    size: int
    """Latent side."""
    sha256: str
    """Hash of the latents and the selection."""
    autoencoder_hash: str
    """SHA-256 of the autoencoder."""
    dtype: str
    """Type of the numbers in the shards."""
    shards: tuple[Shard, ...]
    """The shards, in order."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_opened", "_ends")}

    def autoencoder(self) -> Codec:
        """The autoencoder that made the latents."""
        from kindiff.models.codec import open_codec

        return open_codec(self.path / "autoencoder")

    def fetch(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        """Latent means (B, C, h, w) float32 at `indices` (B,), of the mirror image where `flips` is true."""
        return self._read(indices, flips, 0)

    def deviations(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        """Standard deviations (B, C, h, w) float32 of the same latents: exp(log-variance / 2)."""
        return np.exp(self._read(indices, flips, 1) / np.float32(2))

    def select(self, classes: Iterable[str] = (), *, per_class: int = 0) -> LatentSet:
        """Some classes, in this order (empty: all), and of each the first per_class samples (0: all)."""
        names = tuple(classes) or self.classes.names
        ids = self.classes.ids(names)
        chosen = [self.rows[self.labels == i][: per_class or None] for i in ids]
        return dataclasses.replace(
            self, classes=ClassSet(names), rows=np.concatenate(chosen),
            labels=np.repeat(np.arange(len(ids), dtype=np.int64), [len(c) for c in chosen]),
            sha256=f"{self.sha256}/{','.join(names)}/{per_class}",
        )  # fmt: skip

    @staticmethod
    def open(path: Path, *, verify: bool | None = None) -> LatentSet:
        """Open latents; the lengths of all shards are checked.

        verify: compare the shards with their hashes too, once per process and file (None: where they are small,
        see VERIFIED). UsageError for half-encoded ones, BadFileError names what is damaged.
        """
        path = Path(path).absolute()
        manifest = LatentManifest.read(path)
        for number, shard in enumerate(manifest.shards):
            _check_length(path / shard_file(number), shard)
        small = sum(shard.bytes for shard in manifest.shards) <= VERIFIED
        checked = verify or (verify is None and small)
        if checked and (bad := damaged_shards(path, manifest.shards, quiet=small)):
            raise BadFileError(bad[0])
        counts = [entry.count for entry in manifest.classes]
        return LatentSet(
            path=path, classes=ClassSet(tuple(entry.name for entry in manifest.classes)),
            rows=np.arange(sum(counts), dtype=np.int64),
            labels=np.repeat(np.arange(len(counts), dtype=np.int64), counts), channels=manifest.channels,
            size=manifest.side, sha256=manifest.sha256, autoencoder_hash=manifest.autoencoder.sha256,
            dtype=manifest.dtype, shards=manifest.shards,
        )  # fmt: skip

    def _read(self, indices: np.ndarray, flips: np.ndarray, moment: int) -> np.ndarray:
        rows = self.rows[indices]
        numbers = np.searchsorted(self._ends, rows, side="right")
        out = np.empty((len(rows), self.channels, self.size, self.size), np.float32)
        for place, (row, number, flip) in enumerate(zip(rows, numbers, flips, strict=True)):
            first = self._ends[number] - self.shards[number].rows
            out[place] = self._shard(int(number))[row - first, int(flip), moment]
        return out

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([shard.rows for shard in self.shards])

    @functools.cached_property
    def _opened(self) -> dict[int, np.ndarray]:
        return {}

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._opened:
            file = self.path / shard_file(number)
            shape = (self.shards[number].rows, 2, 2, self.channels, self.size, self.size)
            try:
                stored = np.load(file, mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError, SyntaxError) as error:
                raise BadFileError(f"{file} is no NumPy array file ({error}); {_AGAIN}.") from None
            if stored.shape != shape or stored.dtype != self.dtype:
                raise BadFileError(
                    f"{file} holds {stored.dtype} {stored.shape}, not {self.dtype} {shape} as its manifest says; "
                    f"{_AGAIN}."
                )
            self._opened[number] = stored
        return self._opened[number]


def is_latents(path: Path) -> bool:
    """Whether a directory holds latents, whole or half encoded."""
    from kindiff.checkpoint import read_json

    if not (path / MANIFEST).is_file():
        return (path / HALF).is_file()
    return read_json(path / MANIFEST).get("kind") == "latents"


def damaged_shards(path: Path, shards: tuple[Shard, ...], *, quiet: bool = False) -> list[str]:
    """Read every shard and compare it with its hash, once per process and file: what is wrong, a sentence each."""
    bad = []
    with Track(f"checking {path.name}", 0 if quiet else len(shards), unit="shards") as track:
        for number, shard in enumerate(shards):
            file = path / shard_file(number)
            try:
                _check_length(file, shard)
                stat = file.stat()
                if hash_once(file, stat.st_size, stat.st_mtime_ns, stat.st_ino) != shard.sha256:
                    raise BadFileError(f"{file} is damaged: its SHA-256 is not the recorded one; {_AGAIN}.")
            except BadFileError as error:
                bad.append(str(error))
            if not quiet:
                track.advance(1)
    return bad


def _check_length(file: Path, shard: Shard) -> None:
    found = file.stat().st_size if file.is_file() else None
    if found != shard.bytes:
        what = "is missing" if found is None else f"has {found} bytes, not the recorded {shard.bytes}"
        raise BadFileError(f"{file} {what}; {_AGAIN}.")
