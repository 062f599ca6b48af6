"""One image file -> a square RGB picture, or the reason why not. Runs in child processes: no torch here."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


class UnreadableError(ValueError):
    """Why a file is no readable image, as the end of a sentence."""


def decode_chunk(task: tuple[str, str, int, list[str]]) -> tuple[list[tuple[str, str]], bytes]:
    """[class, folder, side, files] -> ([(file, reason) of the unreadable], pixels (n, H, W, 3) uint8)."""
    _, folder, size, files = task
    faults, pixels = [], []
    for file in files:
        try:
            pixels.append(decode(Path(folder, file), size).tobytes())
        except UnreadableError as error:
            faults.append((file, str(error)))
    return faults, b"".join(pixels)


def check_chunk(task: tuple[str, int, list[str]]) -> tuple[list[tuple[str, str, str]], bytes]:
    """[folder, side, files] -> (file, SHA-256 of its bytes, the fault or nothing) of each; no pixels."""
    folder, size, files = task
    return [(file, *_checked(Path(folder, file), size)) for file in files], b""


def _checked(path: Path, size: int) -> tuple[str, str]:
    try:
        if path.stat().st_size == 0:
            return "", "the file is empty"
        decode(path, size)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), ""
    except (UnreadableError, OSError) as error:
        return "", str(error)


def decode(path: Path | BinaryIO, size: int) -> np.ndarray:
    """The picture (H, W, 3) uint8 with H = W = size: upright, RGB over white, shorter side scaled to `size`
    (antialiased), centre kept. Raises UnreadableError."""
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        # Pillow warns about much that it can still read (odd EXIF, palettes); a file is good or it is not.
        warnings.simplefilter("ignore")
        image = _load(path, size)
    rgb = over_white(image)
    square = ImageOps.fit(rgb, (size, size), method=Image.Resampling.LANCZOS)
    return np.asarray(square)


def _load(path: Path | BinaryIO, size: int) -> Image.Image:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and opened.width * opened.height > limit:
                raise UnreadableError(
                    f"it claims {opened.width} x {opened.height} pixels, above the limit of {limit}"
                )
            # A JPEG can be decoded at 1/2, 1/4, 1/8 of its size; twice the target is left for the filter.
            opened.draft(None, (2 * size, 2 * size))
            opened.load()
            return ImageOps.exif_transpose(opened)
    except UnreadableError:
        raise
    # Pillow's decoders raise nearly any type on foreign bytes: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        reason = " ".join(str(error).split()).replace(repr(str(path)), "the file") or "unknown fault"
        raise UnreadableError(f"{reason} ({type(error).__name__})") from None


def over_white(image: Image.Image) -> Image.Image:
    """RGB of 8 bits, what is transparent white; UnreadableError for pixels without a defined range."""
    from PIL import Image

    if image.mode.startswith("I;16"):  # Pillow clips 16 bits at 255 instead of scaling them
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnreadableError(f"its pixels are of mode {image.mode}, which has no defined range")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    canvas = Image.new("RGBA", layer.size, "white")
    canvas.alpha_composite(layer)
    return canvas.convert("RGB")
