"""Image folders: decoded once, right side up, damaged files named and counted."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kindiff.config import DataConfig
from kindiff.data import ImageSet, open_images
from kindiff.errors import BadFileError, UsageError

SIZE = 16
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def read(folder: Path, *, size: int = SIZE, classes: tuple[str, ...] = (), strict: bool = False) -> ImageSet:
    return open_images(DataConfig(source=str(folder), size=size, classes=classes, strict=strict))


def one(
    folder: Path, picture: Image.Image, name: str = "x.png", *, exif: Image.Exif | None = None
) -> np.ndarray:
    """The picture as it comes out of a folder that holds nothing else."""
    (folder / "only").mkdir(parents=True)
    if exif is None:
        picture.save(folder / "only" / name)
    else:
        picture.save(folder / "only" / name, exif=exif, quality=100, subsampling=0)
    images = read(folder)
    assert len(images) == 1
    return images.images[0]


def test_classes_and_colours(folder: Path) -> None:
    images = read(folder)
    assert images.classes.names == ("fox", "owl")
    assert images.counts() == [3, 2]
    assert (images.images[:3] == RED).all()
    assert (images.images[3:] == BLUE).all()


def test_sorted_by_name_and_recursive(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name, level in (
        ("b.png", 20),
        ("a/z.png", 10),
        ("c.jpg", 30),
        (".hidden.png", 40),
        (".dir/d.png", 50),
    ):
        file = folder / "only" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (level,) * 3).save(file)
    (folder / ".git").mkdir()
    (folder / "README.md").write_text("files beside the class folders are no classes")
    assert [int(p.mean()) for p in read(folder).images] == [10, 20, 30]


def test_more_files_than_one_task(folder: Path) -> None:
    for i in range(150):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(folder / "owl" / f"n{i:03d}.png")
    images = read(folder)
    assert images.counts() == [3, 152]
    assert images.images[5:, 0, 0, 0].tolist() == list(range(150))


def test_classes_in_the_order_asked(folder: Path) -> None:
    images = read(folder, classes=("owl",))
    assert (images.classes.names, len(images)) == (("owl",), 2)
    images = read(folder, classes=("owl", "fox"))
    assert (images.images[0] == BLUE).all()
    few = open_images(DataConfig(source=str(folder), size=SIZE, per_class=1))
    assert few.counts() == [1, 1]


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
def test_centre_is_kept(tmp_path: Path, shape: tuple[int, int]) -> None:
    picture = Image.new("RGB", shape, RED)
    picture.paste(
        GREEN, ((shape[0] - 16) // 2, (shape[1] - 16) // 2, (shape[0] + 16) // 2, (shape[1] + 16) // 2)
    )
    assert (one(tmp_path / "photos", picture) == GREEN).all()


def test_shrinking_averages(tmp_path: Path) -> None:
    checks = np.indices((128, 128)).sum(0) % 2 * 255
    out = one(tmp_path / "photos", Image.fromarray(checks.astype(np.uint8)).convert("RGB"))
    assert abs(out.astype(int) - 127).max() <= 2, "every other pixel white must become grey, not stripes"


def test_small_pictures_grow(tmp_path: Path) -> None:
    assert (one(tmp_path / "photos", Image.new("RGB", (1, 1), GREEN)) == GREEN).all()


@pytest.mark.parametrize("side", [16, 200])  # 200: decoded at a fraction of the size
def test_exif_orientation(tmp_path: Path, side: int) -> None:
    upright = Image.new("RGB", (side, side), RED)
    upright.paste(BLUE, (0, side // 2, side, side))  # red above, blue below
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn clockwise to show
    out = one(tmp_path / "photos", upright.transpose(Image.Transpose.ROTATE_90), "x.jpg", exif=exif).astype(
        int
    )
    assert abs(out[:6] - RED).max() < 12
    assert abs(out[10:] - BLUE).max() < 12


def test_alpha_becomes_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (16, 16), (*RED, 0))
    picture.paste((*GREEN, 255), (0, 0, 16, 8))
    out = one(tmp_path / "photos", picture)
    assert (out[:7] == GREEN).all()
    assert (out[9:] == WHITE).all()


def test_palette_with_transparency(tmp_path: Path) -> None:
    picture = Image.new("P", (16, 16), 1)
    picture.putpalette([*RED, *GREEN, *BLUE])
    picture.info["transparency"] = 1
    (tmp_path / "photos" / "only").mkdir(parents=True)
    picture.save(tmp_path / "photos" / "only" / "x.png", transparency=1)
    assert (read(tmp_path / "photos").images[0] == WHITE).all()


@pytest.mark.parametrize(("mode", "colour"), [("L", 90), ("LA", (90, 255)), ("1", 1), ("CMYK", (0, 0, 0, 0))])
def test_other_modes(tmp_path: Path, mode: str, colour: object) -> None:
    picture = Image.new(mode, (20, 20), colour)  # type: ignore[arg-type]
    out = one(tmp_path / "photos", picture, "x.tiff")
    assert (out == (90 if mode in ("L", "LA") else 255)).all()


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    picture = Image.fromarray(np.full((16, 16), 100 * 257, dtype=np.uint16))
    assert (one(tmp_path / "photos", picture) == 100).all()


def test_empty_class(folder: Path) -> None:
    (folder / "yak").mkdir()
    with pytest.raises(UsageError, match="photos/yak has no images"):
        read(folder)
    assert len(read(folder, classes=("owl",))) == 2, "a class that is not asked for does not matter"


def test_wrong_layouts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read(tmp_path / "nowhere")
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (8, 8)).save(flat / "1.png")
    with pytest.raises(UsageError, match=r"no sub-folders; the layout is <folder>/<class>/<image>"):
        read(flat)
    with pytest.raises(FileNotFoundError, match="is a file"):
        read(flat / "1.png")


def test_unknown_class_and_size(folder: Path, cache: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'owl'"):
        read(folder, classes=("owls",))
    with pytest.raises(UsageError, match="twice"):
        read(folder, classes=("owl", "owl"))
    with pytest.raises(UsageError, match="size is 0"):
        read(folder, size=0)
    assert not cache.exists()


def test_decoded_once_and_again_after_a_change(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def decodes() -> int:
        return capfd.readouterr().err.count("decoding photos")

    first = read(folder)
    assert decodes() == 1
    assert read(folder).sha256 == first.sha256
    assert decodes() == 0
    assert read(folder, size=8).size == 8
    assert decodes() == 1
    Image.new("RGB", (40, 30), GREEN).save(folder / "owl" / "0.png")
    os.utime(folder / "owl" / "0.png", ns=(5, 5))
    changed = read(folder)
    assert decodes() == 1
    assert changed.sha256 != first.sha256
    (folder / "owl" / "0.png").unlink()
    assert len(read(folder)) == 4


def test_damaged_cache_is_named(folder: Path) -> None:
    images = read(folder)
    file = images.path / "images.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BadFileError, match=r"images\.npy has another SHA-256.*Delete"):
        read(folder)
