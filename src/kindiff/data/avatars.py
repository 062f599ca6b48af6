"""The embedded image set: drawn avatars, one DiceBear style a class, image k of a class drawn from seed k.

Only styles under CC0 1.0, in fixed lists. Of those, initials and initial-face (they depend on installed
fonts), disco and glass (near constant, slow to draw) are left out.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kindiff.classes import ClassSet, nearest
from kindiff.data.cache import made_once
from kindiff.data.manifest import MANIFEST
from kindiff.data.prepared import ImageSet, open_prepared, write_prepared
from kindiff.data.workers import ordered_map
from kindiff.errors import UsageError
from kindiff.progress import Track
from kindiff.runtime import cache_folder

BASE = (
    "blobs", "cameo", "clay", "constellation", "critters", "gaze", "identicon", "landscape", "line-face",
    "loops", "lorelei", "marbles", "notionists-neutral", "patchwork", "pixel-art", "pixelbot", "rings",
    "shadows", "shape-grid", "shapes", "slice", "squircles", "stack", "stripes", "thumbs", "voxel-art",
    "waves", "weave",
)  # fmt: skip
NOVEL = (
    "cutouts", "lorelei-neutral", "moods", "notionists", "open-peeps", "pixel-art-neutral", "planets",
    "sprouts", "triangles", "voxel-bot",
)  # fmt: skip
GROUPS = {"base": BASE, "novel": NOVEL, "all": BASE + NOVEL}

SUPERCLASSES = {
    "abstract": ("blobs", "rings", "shapes", "squircles", "waves"),
    "creature": ("clay", "critters", "sprouts", "thumbs"),
    "emoticon": ("gaze", "marbles", "moods"),
    "ink": ("line-face", "lorelei", "lorelei-neutral", "notionists", "notionists-neutral", "open-peeps"),
    "pattern": ("loops", "patchwork", "shape-grid", "stripes", "triangles", "weave"),
    "pile": ("slice", "stack"),
    "pixel": ("identicon", "pixel-art", "pixel-art-neutral", "pixelbot"),
    "portrait": ("cameo", "cutouts", "shadows"),
    "sky": ("constellation", "landscape", "planets"),
    "voxel": ("voxel-art", "voxel-bot"),
}
"""Related styles; every class stands in one group, and every novel class beside base classes."""

PER_CLASS = 400
"""Images of a class when nothing else is asked; seeds from here on are held out from the default set."""
MAX_PER_CLASS = 1_000_000

# Content hashes of (group, size, PER_CLASS) as drawn with the versions pinned in the extra `avatars`.
KNOWN_SHA256 = {
    ("base", 32): "49ccf0debd20cddcfd72c379ceb834639a5d97a9b0d2f1c4bd064306040fee4e",
    ("novel", 32): "fd654c1ec60ceeaf93fc5a772e3c6246c2ac904f5c44f9ab9079d7294e93bd3c",
    ("base", 64): "1a426bd3b126dbe7ec4df8256a78d5631ff1a94936bf42b6bffc55a86ad13183",
    ("novel", 64): "3b1e071dc7bb9241aa5ed8ee36d25fbe3877be06ee49984952cf7b2a18cb6836",
}

_PACKAGES = ("dicebear-core", "dicebear-styles", "resvg-py")
_DRAWING = 1  # raise when the way of drawing changes, so that no old cache is taken for new
_CHUNK_BYTES = 16 * 2**20


def open_avatars(
    group: str, *, size: int, classes: Iterable[str] = (), per_class: int = 0, first: int = 0
) -> ImageSet:
    """The avatars of `base`, `novel` or `all`, or the named classes of them, drawn on first use (cached).

    Each class has the seeds first .. first + per_class - 1 (0: PER_CLASS of them); `first=PER_CLASS` gives
    images that the default set has not. Raises UsageError for an unknown group or class, and
    ModuleNotFoundError naming the extra when the drawing packages are missing.
    """
    if group not in GROUPS:
        raise UsageError(
            f"avatars:{group} is unknown{nearest(group, GROUPS)}; use avatars:base, :novel or :all."
        )
    if not 0 <= per_class <= MAX_PER_CLASS or not 0 <= first <= MAX_PER_CLASS:
        raise UsageError(f"per_class is {per_class} and first is {first}; both must be 0 to {MAX_PER_CLASS}.")
    if not 4 <= size <= 1024:
        raise UsageError(f"size is {size}; avatars are drawn at 4 to 1024 pixels.")
    every = ClassSet(GROUPS[group])
    names = tuple(classes) or every.names
    every.ids(names)
    count = per_class or PER_CLASS

    # A drawn default set serves every part of itself; else only what was asked for is drawn.
    default = _directory(group, every.names, size, 0, PER_CLASS)
    if first + count <= PER_CLASS and (default / MANIFEST).is_file():
        whole = _checked(open_prepared(default), group)
        return whole.select(names, per_class=count, first=first)
    label = group if names == every.names else "selection"
    target = _directory(label, names, size, first, count)
    made = made_once(target, lambda path: _draw_set(path, names, size, first, count))
    return _checked(open_prepared(made), group)


def _checked(images: ImageSet, group: str) -> ImageSet:
    known = KNOWN_SHA256.get((group, images.size))
    whole = images.classes.names == GROUPS[group] and set(images.counts()) == {PER_CLASS}
    if known and whole and images.sha256 != known and images.path.name.endswith(f"-0-{PER_CLASS}"):
        _warn_other_drawing(group, images.size)
    return images


@functools.cache
def _warn_other_drawing(group: str, size: int) -> None:
    print(
        f"kindiff: warning: avatars:{group} at {size} px came out other than on the reference machine "
        f"(another processor, or other versions of {', '.join(_PACKAGES)}); results are sound but "
        "not bit-comparable.",
        file=sys.stderr,
    )


def _directory(label: str, names: tuple[str, ...], size: int, first: int, count: int) -> Path:
    described = json.dumps([_DRAWING, [_version(p) for p in _PACKAGES], names, size, first, count])
    key = hashlib.sha256(described.encode()).hexdigest()[:12]
    return cache_folder() / "avatars" / f"{label}-{size}px-{key}-{first}-{count}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"avatars need the package {package}; install it with: pip install 'kindiff[avatars]'"
        ) from None


def _draw_set(target: Path, names: tuple[str, ...], size: int, first: int, count: int) -> None:
    chunk = max(1, min(PER_CLASS, _CHUNK_BYTES // (size * size * 3)))
    tasks: list[tuple[str, int, int, int]] = [
        (name, size, start, min(start + chunk, first + count))
        for name in names
        for start in range(first, first + count, chunk)
    ]

    def images() -> Iterator[tuple[str, np.ndarray]]:
        with Track(f"drawing avatars at {size} px", len(names) * count, unit="images") as track:
            drawn = ordered_map("kindiff.data.avatars:draw_chunk", tasks)
            for (name, _, start, stop), (_, pixels) in zip(tasks, drawn, strict=True):
                yield name, np.frombuffer(pixels, dtype=np.uint8).reshape(stop - start, size, size, 3)
                track.advance(stop - start)

    versions = ", ".join(f"{p} {_version(p)}" for p in _PACKAGES)
    write_prepared(
        target, images(), size=size, source=f"avatars, seeds {first} to {first + count - 1}; {versions}"
    )


def draw_chunk(task: tuple[str, int, int, int]) -> tuple[None, bytes]:
    """[style, size, first seed, last seed + 1] -> the pixels (n, H, W, 3) uint8 as bytes."""
    name, size, start, stop = task
    return None, b"".join(draw(name, seed, size).tobytes() for seed in range(start, stop))


def draw(name: str, seed: int, size: int) -> np.ndarray:
    """One avatar (H, W, 3) uint8 over white."""
    import resvg_py
    from dicebear import Avatar
    from PIL import Image

    # Drawn at twice the size and averaged: half the error of drawing directly, against a 512 px reference.
    svg = Avatar(_style(name), {"seed": str(seed), "size": 2 * size}).to_string()
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    canvas = Image.new("RGBA", drawn.size, "white")
    canvas.alpha_composite(drawn)
    return np.asarray(canvas.convert("RGB").reduce(2))


@functools.cache
def _style(name: str) -> Any:
    from importlib.resources import files

    from dicebear import Style

    return Style(json.loads((files("dicebear_styles") / f"{name}.json").read_text(encoding="utf-8")))
