"""Small helpers for uint8 images: grids, PNG files.

B images, H/W side.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from kindiff.checkpoint import new_directory, write_file


def grid(images_BHWC: np.ndarray, *, columns: int, gap: int = 2) -> np.ndarray:
    """Images in rows of `columns`, on white: one uint8 (H, W, 3) picture."""
    count, height, width, channels = images_BHWC.shape
    rows = -(-count // columns)
    sheet = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, dtype=np.uint8
    )
    for i, image in enumerate(images_BHWC):
        y, x = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        sheet[y : y + height, x : x + width] = image
    return sheet


def enlarged(image_HWC: np.ndarray, times: int) -> np.ndarray:
    """A picture with every pixel as a square of times x times."""
    return image_HWC.repeat(times, axis=0).repeat(times, axis=1)


def png_bytes(image_HWC: np.ndarray) -> bytes:
    """A picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="PNG")
    return buffer.getvalue()


def write_png(path: Path, image_HWC: np.ndarray) -> None:
    """Write a PNG file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, png_bytes(image_HWC))


def write_folder(folder: Path, images_BHWC: np.ndarray, names: Sequence[str]) -> None:
    """<class>/<index>.png for each image; the index counts over the whole folder."""
    with new_directory(folder) as temporary:
        for i, (image, name) in enumerate(zip(images_BHWC, names, strict=True)):
            (temporary / name).mkdir(exist_ok=True)
            (temporary / name / f"{i:06d}.png").write_bytes(png_bytes(image))
