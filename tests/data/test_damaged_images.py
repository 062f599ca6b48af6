"""Image folders with damaged files: named, counted and skipped, or refused."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kindiff.config import DataConfig
from kindiff.data import ImageSet, open_images
from kindiff.errors import BadFileError, UsageError

SIZE = 16
GREEN = (0, 255, 0)


def read(folder: Path, *, size: int = SIZE, classes: tuple[str, ...] = (), strict: bool = False) -> ImageSet:
    return open_images(DataConfig(source=str(folder), size=size, classes=classes, strict=strict))


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def whole_jpeg() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format="JPEG")
    return buffer.getvalue()


BAD = {
    "corrupt.jpg": b"\xff\xd8\xff" + b"noise" * 100,
    "truncated.jpg": whole_jpeg()[:-1500],
    "zero.png": b"",
    "text.png": b"this is not a picture",
    "bomb.png": png_claiming(30_000, 30_000),
    "half_a_bomb.png": png_claiming(10_000, 10_000),
    "empty_inside.png": png_claiming(8, 8),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_file_is_named_and_skipped(
    folder: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "owl" / name).write_bytes(BAD[name])
    images = read(folder)
    assert images.counts() == [3, 2]
    assert [s.file for s in images.skipped] == [f"owl/{name}"]
    assert images.skipped[0].reason
    err = capfd.readouterr().err
    assert f"skipped {folder / 'owl' / name}: " in err
    assert "Traceback" not in err
    if "bomb" in name:
        assert "pixels" in images.skipped[0].reason
    manifest = json.loads((images.path / "manifest.json").read_text())
    assert manifest["skipped"] == [{"file": f"owl/{name}", "reason": images.skipped[0].reason}]


def test_many_damaged_files_are_counted(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for i in range(25):
        (folder / "owl" / f"bad{i:02d}.png").write_bytes(b"")
    images = read(folder)
    assert len(images.skipped) == 25
    err = capfd.readouterr().err
    assert err.count(": skipped ") == 10
    assert "25 files skipped in all" in err
    assert "manifest.json" in err


def test_strict(folder: Path, cache: Path) -> None:
    (folder / "owl" / "bad.png").write_bytes(b"")
    with pytest.raises(BadFileError, match=r"owl/bad\.png is no readable image"):
        read(folder, strict=True)
    assert not list(cache.rglob("manifest.json"))
    assert not list(cache.rglob("*.tmp"))
    assert len(read(folder)) == 5
    with pytest.raises(BadFileError, match=r"owl/bad\.png"):  # from the cache, too
        read(folder, strict=True)


def test_dangling_link_is_named_and_a_link_to_a_file_is_followed(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), GREEN).save(tmp_path / "elsewhere.png")
    (folder / "owl" / "link.png").symlink_to(tmp_path / "elsewhere.png")
    (folder / "owl" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    images = read(folder)
    assert images.counts() == [3, 3]
    assert (images.images[-1] == GREEN).all()
    assert [s.file for s in images.skipped] == ["owl/dangling.png"]


@pytest.mark.parametrize("name", ["ant", "kea", "yak"])  # first, middle, last
def test_class_without_a_readable_image(folder: Path, cache: Path, name: str) -> None:
    (folder / name).mkdir()
    (folder / name / "bad.png").write_bytes(b"")
    with pytest.raises(UsageError, match=f"photos/{name} has no readable image"):
        read(folder)
    assert not list(cache.rglob("manifest.json"))
