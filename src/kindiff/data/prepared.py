"""Prepared sets: a directory with `manifest.json` and `images.npy`, opened memory-mapped.

Shape letters: N images of the set, B batch, C channels, H W height and width. `images.npy` is (N, H, W, 3)
uint8, the images of a class side by side, the classes in the manifest's order.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kindiff.classes import ClassSet
from kindiff.data.manifest import MANIFEST, Manifest, Skipped, content_hash
from kindiff.errors import BadFileError, UsageError
from kindiff.headers import sha256

IMAGES = "images.npy"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled square RGB images, or a selection of them; nothing is copied until samples are fetched.

    Pickling one passes its path, not its pixels (for loader processes).
    """

    path: Path
    """Directory of the prepared set."""
    classes: ClassSet
    """The classes; labels are their ids."""
    labels: np.ndarray
    """(N,) int64 class ids."""
    rows: np.ndarray
    """(N,) int64 row of each image in `images.npy`."""
    size: int
    """Side in pixels."""
    sha256: str
    """Hash of size, class names and pixels: the same for equal content, however it was selected."""
    class_sha256: tuple[str, ...]
    """Hash of each class's pixels."""
    skipped: tuple[Skipped, ...]
    """Files that were left out when the set was prepared, and why."""

    @property
    def channels(self) -> int:
        return 3

    @property
    def autoencoder_hash(self) -> str:
        return ""

    def autoencoder(self) -> None:
        return None

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "stored"}

    @functools.cached_property
    def stored(self) -> np.ndarray:
        """The whole prepared set, mapped into memory; `rows` are the images of this selection."""
        return np.load(self.path / IMAGES, mmap_mode="r", allow_pickle=False)

    @property
    def images(self) -> np.ndarray:
        """(N, H, W, 3) uint8: the memory map itself when everything is selected, else a copy of the rows."""
        whole = len(self.rows) == len(self.stored) and np.array_equal(self.rows, np.arange(len(self.rows)))
        return self.stored if whole else self.stored[self.rows]

    def counts(self) -> list[int]:
        """Images of each class."""
        return np.bincount(self.labels, minlength=len(self.classes)).tolist()

    def fetch(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        """Images (B, 3, H, W) float32 in [-1, 1] at `indices` (B,), mirrored where `flips` (B,) is true."""
        x_BHWC = self.stored[self.rows[indices]]
        flips = np.asarray(flips, dtype=bool)
        x_BHWC[flips] = x_BHWC[flips, :, ::-1]
        return as_input(x_BHWC)

    def deviations(self, indices: np.ndarray, flips: np.ndarray) -> None:
        return None

    def select(self, classes: Iterable[str] = (), *, per_class: int = 0, first: int = 0) -> ImageSet:
        """Some of the images: these classes in this order (empty: all), of each the images
        first .. first + per_class - 1 (per_class 0: all from `first` on), fewer where a class has fewer.

        Raises UsageError for an unknown class, a class twice, or a class of which nothing is left.
        """
        if per_class < 0 or first < 0:
            raise UsageError(f"per_class is {per_class} and first is {first}; both must be 0 or more.")
        names = tuple(classes) or self.classes.names
        labels, rows, hashes = [], [], []
        for new_id, old_id in enumerate(self.classes.ids(names)):
            of_class = self.rows[self.labels == old_id]
            chosen = of_class[first : first + per_class] if per_class else of_class[first:]
            if not len(chosen):
                raise UsageError(
                    f"class {names[new_id]!r} has {len(of_class)} images, none from image {first} on; "
                    "ask for earlier images or leave the class out."
                )
            labels.append(np.full(len(chosen), new_id, dtype=np.int64))
            rows.append(chosen)
            all_of_it = len(chosen) == len(of_class)
            hashes.append(self.class_sha256[old_id] if all_of_it else _hash_rows(self.stored, chosen))
        counts = [len(r) for r in rows]
        return ImageSet(
            path=self.path, classes=ClassSet(names), labels=np.concatenate(labels), rows=np.concatenate(rows),
            size=self.size, sha256=content_hash(self.size, names, counts, hashes), class_sha256=tuple(hashes),
            skipped=self.skipped,
        )  # fmt: skip


def as_input(x_BHWC: np.ndarray) -> np.ndarray:
    """uint8 images (B, H, W, 3) as models take them: (B, 3, H, W) float32 in [-1, 1]."""
    x_BCHW = np.ascontiguousarray(x_BHWC.transpose(0, 3, 1, 2), dtype=np.float32)
    return x_BCHW / np.float32(127.5) - np.float32(1)


def write_prepared(
    target: Path,
    images: Iterable[tuple[str, np.ndarray]],
    *,
    size: int,
    source: str,
    skipped: Sequence[Skipped] = (),
) -> None:
    """Write a prepared set, whole or not at all, in memory independent of its length.

    `images` yields (class name, chunk (n, H, W, 3) uint8), all chunks of a class in a row. `skipped` is read
    after `images` ends, so that making the images may fill it. `source` says where they came from. Raises
    UsageError when there are no images.
    """
    from kindiff.checkpoint import new_directory, write_json

    names: list[str] = []
    counts: list[int] = []
    hashes: list[Any] = []
    with new_directory(target) as temporary:
        with (temporary / IMAGES).open("wb") as file:
            header_bytes = _write_header(file, 0, size)
            for name, chunk in images:
                if chunk.dtype != np.uint8 or chunk.shape[1:] != (size, size, 3):
                    raise ValueError(
                        f"a chunk is {chunk.dtype} {chunk.shape}, not uint8 (n, {size}, {size}, 3)."
                    )
                if not names or names[-1] != name:
                    names.append(name)
                    counts.append(0)
                    hashes.append(hashlib.sha256())
                pixels = np.ascontiguousarray(chunk)
                file.write(pixels.data)
                hashes[-1].update(pixels.data)
                counts[-1] += len(chunk)
            if not names:
                raise UsageError(f"{source} has no images.")
            file.seek(0)
            if _write_header(file, sum(counts), size) != header_bytes:
                raise ValueError("the header of images.npy outgrew its place.")
        digests = [h.hexdigest() for h in hashes]
        manifest = Manifest(
            size=size, classes=ClassSet(tuple(names)), counts=tuple(counts), class_sha256=tuple(digests),
            images_sha256=sha256(temporary / IMAGES), images_bytes=(temporary / IMAGES).stat().st_size,
            sha256=content_hash(size, names, counts, digests), source=source, skipped=tuple(skipped),
        )  # fmt: skip
        write_json(temporary / MANIFEST, manifest.to_json())


def open_prepared(path: Path, *, verify: bool = True) -> ImageSet:
    """Open a prepared set. Sizes are always checked; the SHA-256 of the pixels once per process and file.

    verify=False leaves the SHA-256 out, for sets so large that reading them through takes minutes. Raises
    FileNotFoundError when there is none, BadFileError naming the file that is damaged.
    """
    path = Path(path).absolute()
    manifest = Manifest.read(path)
    file = path / IMAGES
    if not file.is_file():
        raise BadFileError(
            f"{file} is missing although {path / MANIFEST} describes it; prepare the set again."
        )
    stat = file.stat()
    if stat.st_size != manifest.images_bytes:
        raise BadFileError(
            f"{file} has {stat.st_size} bytes, not the {manifest.images_bytes} its manifest says; it is "
            f"truncated or foreign. Delete {path} and prepare the set again."
        )
    shape = (sum(manifest.counts), manifest.size, manifest.size, 3)
    try:
        stored = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, SyntaxError) as error:
        raise BadFileError(f"{file} is not a NumPy array file ({error}); prepare the set again.") from None
    if stored.shape != shape or stored.dtype != np.uint8 or not stored.flags.c_contiguous:
        raise BadFileError(
            f"{file} holds {stored.dtype} {stored.shape}, not uint8 {shape} as its manifest says."
        )
    if verify and hash_once(file, stat.st_size, stat.st_mtime_ns, stat.st_ino) != manifest.images_sha256:
        raise BadFileError(
            f"{file} has another SHA-256 than its manifest says; it is damaged. Delete {path} and prepare "
            "the set again."
        )
    labels = np.repeat(np.arange(len(manifest.counts), dtype=np.int64), manifest.counts)
    return ImageSet(
        path=path, classes=manifest.classes, rows=np.arange(shape[0]), labels=labels, size=manifest.size,
        sha256=manifest.sha256, class_sha256=manifest.class_sha256, skipped=manifest.skipped,
    )  # fmt: skip


def _write_header(file: Any, count: int, size: int) -> int:
    # NumPy leaves room in the header for the first axis to grow, so a later count fits in the same bytes.
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


@functools.lru_cache(maxsize=65536)
def hash_once(file: Path, _bytes: int, _mtime_ns: int, _inode: int) -> str:
    """SHA-256 of a file, read once per process as long as its length, time of change and inode are the same."""
    return sha256(file)


def _hash_rows(stored: np.ndarray, rows: np.ndarray) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(rows), 256):
        digest.update(np.ascontiguousarray(stored[rows[start : start + 256]]).data)
    return digest.hexdigest()
