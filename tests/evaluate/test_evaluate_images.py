"""Folders and .npz files as samples: what is read, and what is refused in one sentence."""

from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kindiff.data.folder import open_folder
from kindiff.errors import BadFileError, UsageError
from kindiff.evaluate.images import ArrayImages, FolderImages, NpzImages
from kindiff.evaluate.sources import open_samples


def pictures(count: int, side: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def write(folder: Path, names: list[str], images: np.ndarray) -> Path:
    for name, image in zip(names, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return folder


def test_a_folder_with_classes(tmp_path: Path) -> None:
    x = pictures(4)
    write(tmp_path, ["owl/1.png", "fox/b.png", "fox/a.png", "owl/0.bmp"], x)
    (tmp_path / ".hidden").write_text("no image")
    (tmp_path / "score.json").write_text("{}")
    images = FolderImages(tmp_path)
    assert images.classes is not None
    assert images.classes.names == ("fox", "owl")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(images.read(0, 4), x[[2, 1, 3, 0]])
    np.testing.assert_array_equal(images.read(1, 3), x[[1, 3]])
    assert (len(images), images.size, images.encoding) == (4, (6, 6), "lossless")
    picked = FolderImages(tmp_path, classes=("owl",))
    np.testing.assert_array_equal(picked.read(0, 2), x[[3, 0]])
    assert picked.labels is not None
    assert picked.labels.tolist() == [0, 0]
    with pytest.raises(UsageError, match="did you mean 'owl'"):
        FolderImages(tmp_path, classes=("owll",))


def test_the_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    folder = write(tmp_path, ["a.png", "b.png"], pictures(2))
    first = FolderImages(folder).sha256
    assert FolderImages(folder).sha256 == first
    write(folder, ["b.png"], pictures(1, seed=1))
    second = FolderImages(folder).sha256
    (folder / "b.png").rename(folder / "c.png")
    assert len({first, second, FolderImages(folder).sha256}) == 3


def test_lossy_and_mixed_encodings_are_recorded(tmp_path: Path) -> None:
    assert FolderImages(write(tmp_path / "j", ["a.jpg", "b.jpeg"], pictures(2))).encoding == "jpeg"
    assert FolderImages(write(tmp_path / "m", ["a.jpg", "b.png"], pictures(2))).encoding == "mixed"


def empty(folder: Path) -> None:
    folder.mkdir()


def foreign(folder: Path) -> None:
    write(folder, ["a.png"], pictures(1))
    (folder / "movie.mp4").write_bytes(b"x")


def broken(folder: Path) -> None:
    write(folder, ["a.png"], pictures(1))
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])


def text(folder: Path) -> None:
    write(folder, ["b.png"], pictures(1))
    (folder / "a.png").write_text("this is text")


def sizes(folder: Path) -> None:
    write(folder, ["a.png"], pictures(1))
    write(folder, ["b.png"], pictures(1, side=7))


def deep(folder: Path) -> None:
    folder.mkdir()
    Image.fromarray(np.arange(36, dtype=np.uint16).reshape(6, 6)).save(folder / "a.png")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (empty, UsageError, "has no images"),
        (foreign, UsageError, r"movie.mp4 is no image file"),
        (broken, BadFileError, r"b.png cannot be read as an image"),
        (text, BadFileError, r"a.png cannot be read as an image"),
        (sizes, UsageError, r"b.png is 7 x 7 pixels, a.png is 6 x 6"),
        (deep, BadFileError, r"more than 8 bits a channel"),
    ],
)
def test_bad_folders(
    tmp_path: Path, make: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    make(tmp_path / "folder")

    def read() -> None:
        images = FolderImages(tmp_path / "folder")
        images.read(0, len(images))

    with pytest.raises(error, match=message) as caught:
        read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_streamed_in_any_order(tmp_path: Path, save: Callable[..., None]) -> None:
    x, labels = pictures(10), np.arange(10) % 3
    path = tmp_path / "x.npz"
    save(path, x, labels)
    images = NpzImages(path)
    assert (len(images), images.size) == (10, (6, 6))
    assert images.labels is not None
    assert images.labels.tolist() == labels.tolist()
    np.testing.assert_array_equal(images.read(0, 4), x[:4])
    np.testing.assert_array_equal(images.read(7, 9), x[7:9])
    np.testing.assert_array_equal(images.read(2, 30), x[2:])


def test_bad_npz_files(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        NpzImages(path)
    path.write_bytes(b"no archive")
    with pytest.raises(BadFileError, match=r"no .npz file"):
        NpzImages(path)
    for arrays, error, message in (
        ({"mu": np.zeros(3)}, BadFileError, "arr_0 is missing"),
        ({"arr_0": pictures(2).astype(np.float32)}, BadFileError, "float32"),
        ({"arr_0": pictures(2)[..., 0]}, BadFileError, r"expected: uint8 \(N, H, W, 3\)"),
        ({"arr_0": pictures(0)}, UsageError, "arr_0 is empty"),
        ({"arr_0": pictures(2), "arr_1": np.zeros(3, int)}, BadFileError, "2 images but labels"),
        (
            {"arr_0": pictures(2), "arr_1": np.array([{}, {}])},
            BadFileError,
            "arr_1 cannot be read",
        ),  # pickled
    ):
        np.savez(path, **arrays)
        with pytest.raises(error, match=message):
            NpzImages(path)


def test_a_truncated_array_inside_an_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", pictures(4))
    with zipfile.ZipFile(tmp_path / "whole.npz") as archive:
        data = archive.read("arr_0.npy")
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive:
        archive.writestr("arr_0.npy", data[:-150])
    images = NpzImages(tmp_path / "cut.npz")
    images.read(0, 2)
    with pytest.raises(BadFileError, match="ends inside image 2"):
        images.read(2, 4)


def test_damage_inside_a_compressed_array_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, pictures(400))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    path.write_bytes(content)
    images = NpzImages(path)
    with pytest.raises(BadFileError, match="is damaged"):
        images.read(0, 400)


def test_what_lies_before_the_wanted_images_of_an_npz_takes_no_memory(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", np.zeros((4000, 40, 40, 3), np.uint8))
    images = NpzImages(tmp_path / "x.npz")
    tracemalloc.start()
    images.read(3990, 4000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6  # of 19.2e6 bytes


def test_transparent_places_are_white_as_in_training(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KINDIFF_CACHE", str(tmp_path / "cache"))
    for i, alpha in enumerate((0, 255)):
        (tmp_path / "x" / "ant").mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (8, 8), (200, 10, 10, alpha)).save(tmp_path / "x" / "ant" / f"{i}.png")
    ours = FolderImages(tmp_path / "x").read(0, 2)
    assert (ours[0] == 255).all()
    np.testing.assert_array_equal(ours, open_folder(tmp_path / "x", size=8).images)


def test_arrays_are_checked() -> None:
    with pytest.raises(UsageError, match="expected: uint8"):
        ArrayImages(name="x", array=pictures(2).astype(float), sha256="0")
    with pytest.raises(UsageError, match="no images"):
        ArrayImages(name="x", array=pictures(0), sha256="0")


def test_samples_that_are_not_there_or_cannot_be_picked_from(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; give a folder"):
        open_samples(tmp_path / "none")
    folder = write(tmp_path / "flat", ["a.png"], pictures(1))
    with pytest.raises(UsageError, match=r"no model directory"):
        open_samples(folder, count=5)
    with pytest.raises(UsageError, match="has no sub-folders"):
        open_samples(folder, classes=("owl",))
    with pytest.raises(UsageError, match=r"neither a folder nor an .npz"):
        open_samples(folder / "a.png")
    np.savez(tmp_path / "x.npz", pictures(2))
    with pytest.raises(UsageError, match="no class names"):
        open_samples(tmp_path / "x.npz", classes=("owl",))
