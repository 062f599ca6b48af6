"""Latents: a directory with manifest.json, latents.npy (memory-mapped) and the autoencoder that made them.

N samples of the set, B batch, C channels, h w latent side.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kindiff import checkpoint
from kindiff.classes import ClassSet
from kindiff.data.manifest import MANIFEST
from kindiff.data.sets import SampleSet
from kindiff.errors import BadFileError, UsageError
from kindiff.models.autoencoder import Autoencoder

LATENTS = "latents.npy"
FORMAT = 1


@dataclass(frozen=True, eq=False)
class LatentSet:
    """Labelled latents of images and of their mirror images, or a selection of them."""

    path: Path
    """Directory of the latents."""
    classes: ClassSet
    """The classes; labels are their ids."""
    labels: np.ndarray
    """(N,) int64 class ids."""
    rows: np.ndarray
    """(N,) int64 row of each sample in latents.npy."""
    channels: int
    """Latent channels."""
    size: int
    """Latent side."""
    sha256: str
    """Hash of the latents' file and the selection."""
    autoencoder_hash: str
    """SHA-256 of the autoencoder."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_stored"}

    @functools.cached_property
    def _stored(self) -> np.ndarray:
        return np.load(self.path / LATENTS, mmap_mode="r", allow_pickle=False)

    def autoencoder(self) -> Autoencoder:
        """The autoencoder that made the latents."""
        return Autoencoder.from_pretrained(self.path / "autoencoder")

    def fetch(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        """Latent means (B, C, h, w) float32 at `indices` (B,), of the mirror image where `flips` is true."""
        return self._stored[self.rows[indices], np.asarray(flips, dtype=np.int64)]

    def select(self, classes: Iterable[str] = (), *, per_class: int = 0) -> LatentSet:
        """Some classes, in this order (empty: all), and of each the first per_class samples (0: all)."""
        names = tuple(classes) or self.classes.names
        ids = self.classes.ids(names)
        chosen = [self.rows[self.labels == i][: per_class or None] for i in ids]
        return LatentSet(
            path=self.path, classes=ClassSet(names), rows=np.concatenate(chosen),
            labels=np.repeat(np.arange(len(ids), dtype=np.int64), [len(c) for c in chosen]),
            channels=self.channels, size=self.size, autoencoder_hash=self.autoencoder_hash,
            sha256=f"{self.sha256}/{','.join(names)}/{per_class}",
        )  # fmt: skip

    @staticmethod
    def open(path: Path) -> LatentSet:
        """Open latents and check them against their manifest; BadFileError names what is damaged."""
        path = Path(path).absolute()
        manifest = checkpoint.read_json(path / MANIFEST)
        if manifest.get("kind") != "latents" or manifest.get("format") != FORMAT:
            raise BadFileError(
                f"{path / MANIFEST} does not describe latents of format {FORMAT}; encode again."
            )
        file = path / LATENTS
        if not file.is_file() or checkpoint.sha256(file) != manifest.get("sha256"):
            raise BadFileError(
                f"{file} is missing or damaged (its hash is not the recorded one); encode again."
            )
        stored = np.load(file, mmap_mode="r", allow_pickle=False)
        counts: Any = manifest.get("counts")
        names: Any = manifest.get("classes")
        sound = isinstance(counts, list) and isinstance(names, list) and len(counts) == len(names)
        if not sound or not all(type(n) is int and n > 0 for n in counts):
            raise BadFileError(
                f"{path / MANIFEST} is damaged: its classes do not have a count each; encode again."
            )
        if not isinstance(manifest.get("autoencoder"), str):
            raise BadFileError(f"{path / MANIFEST} is damaged: it names no autoencoder; encode again.")
        try:
            classes = ClassSet(tuple(names))
        except UsageError as error:
            raise BadFileError(f"{path / MANIFEST} is damaged: {error}") from None
        if stored.ndim != 5 or stored.shape[0] != sum(counts) or stored.shape[1] != 2:
            raise BadFileError(f"{file} holds {stored.shape}, not what its manifest says; encode again.")
        return LatentSet(
            path=path, classes=classes, rows=np.arange(len(stored), dtype=np.int64),
            labels=np.repeat(np.arange(len(counts), dtype=np.int64), counts), channels=stored.shape[2],
            size=stored.shape[3], sha256=manifest["sha256"], autoencoder_hash=manifest["autoencoder"],
        )  # fmt: skip


def write_latents(
    target: Path, samples: SampleSet, autoencoder: Autoencoder, latents_N2Chw: np.ndarray
) -> None:
    """Write the latents of a set, its samples sorted by class; whole or not at all."""
    if (np.diff(samples.labels) < 0).any():
        raise UsageError("the samples are not sorted by class.")
    with checkpoint.new_directory(target) as folder:
        np.save(folder / LATENTS, latents_N2Chw, allow_pickle=False)
        (folder / "autoencoder").mkdir()
        autoencoder.write_files(folder / "autoencoder")
        manifest = {
            "format": FORMAT,
            "kind": "latents",
            "classes": list(samples.classes.names),
            "counts": np.bincount(samples.labels, minlength=len(samples.classes)).tolist(),
            "sha256": checkpoint.sha256(folder / LATENTS),
            "autoencoder": autoencoder.fingerprint(),
            "images": samples.sha256,
        }
        checkpoint.write_json(folder / MANIFEST, manifest)
