"""Prepared sets: written whole, opened checked, selected without copying."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kindiff.config import DataConfig
from kindiff.data import ImageSet, open_images, open_prepared
from kindiff.data.prepared import write_prepared
from kindiff.errors import BadFileError, UsageError

SIZE = 4
COUNTS = {"ant": 5, "bee": 3, "cat": 4}


def pixels(name: str, count: int) -> np.ndarray:
    random = np.random.default_rng(sorted(COUNTS).index(name))
    return random.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    target = tmp_path / "set"
    write_prepared(target, ((n, pixels(n, c)) for n, c in COUNTS.items()), size=SIZE, source="a test")
    return target


@pytest.fixture
def images(directory: Path) -> ImageSet:
    return open_prepared(directory)


def test_written_then_opened(images: ImageSet) -> None:
    assert len(images) == 12
    assert images.classes.names == tuple(COUNTS)
    assert images.counts() == list(COUNTS.values())
    assert images.labels.tolist() == [0] * 5 + [1] * 3 + [2] * 4
    assert (images.size, images.channels, images.skipped) == (SIZE, 3, ())
    for label, name in enumerate(COUNTS):
        np.testing.assert_array_equal(images.images[images.labels == label], pixels(name, COUNTS[name]))


def test_chunks_do_not_matter(tmp_path: Path, images: ImageSet) -> None:
    in_pieces = ((n, pixels(n, c)[i : i + 1]) for n, c in COUNTS.items() for i in range(c))
    write_prepared(tmp_path / "again", in_pieces, size=SIZE, source="elsewhere")
    again = open_prepared(tmp_path / "again")
    assert again.sha256 == images.sha256
    assert (again.path / "images.npy").read_bytes() == (images.path / "images.npy").read_bytes()


def test_fetch_is_scaled_and_mirrored(images: ImageSet) -> None:
    index = np.array([7, 0, 7])
    x_BCHW = images.fetch(index, np.array([False, True, True]))
    assert x_BCHW.dtype == np.float32
    assert x_BCHW.shape == (3, 3, SIZE, SIZE)
    expected = pixels("bee", 3)[2].transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(x_BCHW[0], expected, atol=1e-6)
    np.testing.assert_array_equal(x_BCHW[2], x_BCHW[0][:, :, ::-1])
    assert not np.array_equal(x_BCHW[2], x_BCHW[0])
    assert x_BCHW.min() >= -1
    assert x_BCHW.max() <= 1


def test_fetch_reaches_both_ends_of_the_range(tmp_path: Path) -> None:
    black_white = np.stack([np.zeros((SIZE, SIZE, 3)), np.full((SIZE, SIZE, 3), 255)]).astype(np.uint8)
    write_prepared(tmp_path / "set", [("a", black_white)], size=SIZE, source="a test")
    x_BCHW = open_prepared(tmp_path / "set").fetch(np.array([0, 1]), np.zeros(2, bool))
    assert x_BCHW[0].max() == -1
    assert x_BCHW[1].min() == 1


def test_select(images: ImageSet) -> None:
    part = images.select(("cat", "ant"), per_class=2)
    assert part.classes.names == ("cat", "ant")
    assert part.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(part.images, np.concatenate([pixels("cat", 4)[:2], pixels("ant", 5)[:2]]))
    fetched = part.fetch(np.array([3]), np.array([False]))
    np.testing.assert_array_equal(fetched, images.fetch(np.array([1]), np.array([False])))
    rest = images.select(("ant",), per_class=9, first=2)
    np.testing.assert_array_equal(rest.images, pixels("ant", 5)[2:])
    np.testing.assert_array_equal(part.select(("ant",), first=1).images, pixels("ant", 5)[1:2])


def test_select_does_not_copy(images: ImageSet) -> None:
    whole = images.select()
    assert isinstance(whole.images, np.memmap)
    assert whole.sha256 == images.sha256


def test_sha256_is_of_the_content(tmp_path: Path, images: ImageSet) -> None:
    part = images.select(("cat", "ant"), per_class=2)
    copied = [("cat", pixels("cat", 4)[:2]), ("ant", pixels("ant", 5)[:2])]
    write_prepared(tmp_path / "same", copied, size=SIZE, source="a copy")
    assert open_prepared(tmp_path / "same").sha256 == part.sha256
    others = {
        images.sha256,
        part.sha256,
        images.select(("ant", "cat"), per_class=2).sha256,
        images.select(("cat", "ant"), per_class=3).sha256,
        images.select(("cat", "ant"), per_class=2, first=1).sha256,
    }
    assert len(others) == 5


@pytest.mark.parametrize(
    ("classes", "per_class", "first", "said"),
    [
        (("cta",), 0, 0, "did you mean 'cat'"),
        (("ant", "ant"), 0, 0, "twice"),
        (("bee",), 1, 3, "has 3 images, none from image 3"),
        ((), -1, 0, "0 or more"),
    ],
)
def test_select_refuses(
    images: ImageSet, classes: tuple[str, ...], per_class: int, first: int, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        images.select(classes, per_class=per_class, first=first)


def test_pickled_as_a_path(images: ImageSet) -> None:
    part = images.select(("bee",))
    part.fetch(np.array([0]), np.array([False]))
    content = pickle.dumps(part)
    assert pixels("bee", 3)[0].tobytes() not in content
    np.testing.assert_array_equal(pickle.loads(content).images, pixels("bee", 3))


@pytest.mark.parametrize("offset", [-1, 200])
def test_flipped_bit(directory: Path, offset: int) -> None:
    file = directory / "images.npy"
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)
    with pytest.raises(BadFileError, match=r"images\.npy has another SHA-256"):
        open_prepared(directory)
    assert len(open_prepared(directory, verify=False)) == 12


def test_flipped_bit_after_a_first_open(directory: Path, images: ImageSet) -> None:
    file = directory / "images.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    with pytest.raises(BadFileError, match="SHA-256"):
        open_prepared(directory)


@pytest.mark.parametrize("verify", [True, False])
def test_truncated_or_missing_array(directory: Path, verify: bool) -> None:
    file = directory / "images.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BadFileError, match=r"images\.npy has \d+ bytes, not"):
        open_prepared(directory, verify=verify)
    file.unlink()
    with pytest.raises(BadFileError, match=r"images\.npy is missing"):
        open_prepared(directory, verify=verify)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_writing_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def images() -> Iterator[tuple[str, np.ndarray]]:
        yield "ant", pixels("ant", 5)
        assert list(tmp_path.iterdir()), "it should be written as it comes"
        raise error

    with pytest.raises(error):
        write_prepared(tmp_path / "set", images(), size=SIZE, source="a test")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_rewriting_leaves_the_old_one(directory: Path, images: ImageSet) -> None:
    def other() -> Iterator[tuple[str, np.ndarray]]:
        yield "bee", pixels("bee", 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_prepared(directory, other(), size=SIZE, source="a test")
    assert open_prepared(directory).sha256 == images.sha256


def test_class_that_comes_back_is_refused(tmp_path: Path) -> None:
    apart = [("ant", pixels("ant", 1)), ("bee", pixels("bee", 1)), ("ant", pixels("ant", 1))]
    with pytest.raises(UsageError, match="twice"):
        write_prepared(tmp_path / "set", apart, size=SIZE, source="a test")
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a test has no images"):
        write_prepared(tmp_path / "set", [], size=SIZE, source="a test")


def test_open_images_takes_a_prepared_set(directory: Path) -> None:
    config = DataConfig(source=str(directory), size=SIZE, classes=("cat", "bee"), per_class=1)
    images = open_images(config)
    assert (images.classes.names, len(images)) == (("cat", "bee"), 2)
    with pytest.raises(UsageError, match="prepared at 4 px and size is 32"):
        open_images(DataConfig(source=str(directory)))
