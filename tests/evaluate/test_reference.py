"""Feature shards that resume, stored references, floors, guided-diffusion files."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kindiff.classes import ClassSet
from kindiff.errors import BadFileError, UsageError
from kindiff.evaluate import adm, store
from kindiff.evaluate import reference as references
from kindiff.evaluate.features import CallableFeatures
from kindiff.evaluate.images import ArrayImages, NpzImages
from kindiff.evaluate.metrics import frechet_distance
from kindiff.evaluate.moments import moments

CLASSES = ClassSet(("ant", "bee"))


def colours(images: np.ndarray) -> Mapping[str, np.ndarray]:
    """Means of rows and columns: 18 + 18 numbers an image of 6 x 6."""
    x = images.astype(np.float32)
    return {"pool": x.mean(1).reshape(len(x), -1), "spatial": x.mean(2).reshape(len(x), -1) * 2}


NETWORK = CallableFeatures(name="colours", function=colours, version="1")


def picture_set(count: int, seed: int = 0) -> ArrayImages:
    x = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return ArrayImages(
        name="set", array=x, sha256=f"hash {seed}", labels=np.arange(count) % 2, classes=CLASSES
    )


class Counting:
    """A network that counts its images, and stops at one of them as an interruption would."""

    def __init__(self, stop_at: int = -1) -> None:
        self.seen, self.stop_at = 0, stop_at

    def __call__(self, images: np.ndarray) -> Mapping[str, np.ndarray]:
        self.seen += len(images)
        if 0 <= self.stop_at < self.seen:
            raise KeyboardInterrupt
        return colours(images)

    @property
    def network(self) -> CallableFeatures:
        return CallableFeatures(name="colours", function=self, version="1")


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_features_do_not_depend_on_the_batch(tmp_path: Path, batch: int) -> None:
    images = picture_set(store.SHARD + 77)
    found = store.compute(images, NETWORK, tmp_path, batch=batch)
    expected = colours(images.array)["pool"]
    np.testing.assert_array_equal(found.rows("pool"), expected)
    index = np.array([0, 5, store.SHARD - 1, store.SHARD, store.SHARD + 76])
    np.testing.assert_array_equal(found.rows("pool", index), expected[index])
    assert len(found.shards) == 2
    direct = moments(expected)
    np.testing.assert_allclose(found.moments("pool").cov, direct.cov, rtol=1e-10, atol=1e-9)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    images = picture_set(3 * store.SHARD + 10)
    whole = store.compute(images, NETWORK, tmp_path / "whole", batch=50)
    first = Counting(stop_at=2 * store.SHARD + 100)
    with pytest.raises(KeyboardInterrupt):
        store.compute(images, first.network, tmp_path / "cut", batch=50)
    second, seen = Counting(), []
    resumed = store.compute(
        images,
        second.network,
        tmp_path / "cut",
        batch=50,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert second.seen == store.SHARD + 10
    assert seen[0] == (2 * store.SHARD, len(images))
    assert seen[-1] == (len(images), len(images))
    for one, other in zip(whole.shards, resumed.shards, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_folder_with_features_of_something_else_is_refused(tmp_path: Path) -> None:
    store.compute(picture_set(10), NETWORK, tmp_path)
    with pytest.raises(UsageError, match=r"something else \(images differ\)"):
        store.compute(picture_set(10, seed=1), NETWORK, tmp_path)
    other = CallableFeatures(name="colours", function=colours, version="2")
    with pytest.raises(UsageError, match=r"\(features_sha256 differ\)"):
        store.compute(picture_set(10), other, tmp_path)


def test_broken_features_leave_nothing_that_would_be_taken_for_good(tmp_path: Path) -> None:
    nan = CallableFeatures(
        name="colours", function=lambda x: {"pool": np.full((len(x), 2), np.nan)}, version="1"
    )
    with pytest.raises(UsageError, match="image 0"):
        store.compute(picture_set(10), nan, tmp_path)
    assert list(tmp_path.glob("*.safetensors")) == []


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    found = store.compute(picture_set(10), NETWORK, tmp_path)
    found.shards[0].write_bytes(found.shards[0].read_bytes()[:100])
    with pytest.raises(BadFileError, match="damaged or truncated"):
        store.compute(picture_set(10), NETWORK, tmp_path)


def test_a_reference_is_built_once_and_stored_whole(tmp_path: Path) -> None:
    images, counting = picture_set(100), Counting()
    built = references.build(images, counting.network, tmp_path, keep=30)
    again = references.build(images, counting.network, tmp_path, keep=30)
    assert counting.seen == 100
    assert again.info == built.info
    assert (built.info.count, built.info.kept, built.info.classes) == (100, 30, ("ant", "bee"))
    for name in ("pool", "spatial"):
        np.testing.assert_array_equal(again.moments[name].cov, built.moments[name].cov)
        np.testing.assert_array_equal(again.kept[name], built.kept[name])
    expected = moments(colours(images.array)["pool"])
    np.testing.assert_allclose(built.moments["pool"].mean, expected.mean, rtol=1e-12)
    assert again.labels is not None
    assert set(again.labels.tolist()) == {0, 1}
    assert len([path for path in tmp_path.iterdir() if path.name[0] != "."]) == 1  # the shards are gone


def test_of_two_that_ask_for_a_reference_at_once_one_makes_it(tmp_path: Path) -> None:
    images, counting = picture_set(2 * store.SHARD), Counting()
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(references.build, images, counting.network, tmp_path) for _ in range(2)]
    one, other = (job.result() for job in asked)
    assert counting.seen == len(images)
    np.testing.assert_array_equal(one.moments["pool"].cov, other.moments["pool"].cov)


def test_other_images_or_classes_have_a_reference_of_their_own(tmp_path: Path) -> None:
    images = picture_set(100)
    ants = ArrayImages(name="ants", array=images.array[::2], sha256="other", labels=np.zeros(50, int))
    whole, part = (references.build(one, NETWORK, tmp_path) for one in (images, ants))
    assert whole.info.sha256 != part.info.sha256
    expected = moments(colours(images.array[::2])["pool"])
    np.testing.assert_allclose(part.moments["pool"].cov, expected.cov, rtol=1e-9, atol=1e-9)


def test_the_hash_of_a_reference_does_not_depend_on_its_name(tmp_path: Path) -> None:
    built = references.build(picture_set(20), NETWORK, tmp_path)
    assert references.replace_name(built, "other").info.sha256 == built.info.sha256


def test_a_damaged_reference_is_refused(tmp_path: Path) -> None:
    references.save(references.build(picture_set(20), NETWORK, tmp_path / "a"), tmp_path / "b")
    record = tmp_path / "b" / "reference.json"
    whole = record.read_text()
    record.write_text(whole.replace('"kept": 20', '"kept": "many"'))
    with pytest.raises(BadFileError, match="no whole reference"):
        references.load(tmp_path / "b")
    record.write_text(whole.replace('"format": 1', '"format": 0'))
    with pytest.raises(BadFileError, match="another format"):
        references.load(tmp_path / "b")


def test_the_floor_is_the_distance_of_two_disjoint_sets_of_the_same_n(tmp_path: Path) -> None:
    images = picture_set(400)
    built = references.build(images, NETWORK, tmp_path)
    small, large = (references.real_floor(built, "pool", count) for count in (50, 200))
    assert small is not None
    assert large is not None
    assert small.value > large.value > 0  # fewer images, more bias
    assert (small.count, small.note) == (50, "two disjoint sets of 50 real images")
    assert references.real_floor(references.build(images, NETWORK, tmp_path), "pool", 50) == small
    more = references.real_floor(built, "pool", 300)
    assert more is not None
    assert more.count == 200
    assert "400 are kept, not the 2 x 300" in more.note
    expectation = [
        frechet_distance(*(moments(colours(picture_set(50, seed=s + k).array)["pool"]) for k in (0, 1)))
        for s in range(10, 40, 2)
    ]
    assert small.value == pytest.approx(np.mean(expectation), rel=0.25)
    tiny = references.build(picture_set(3), NETWORK, tmp_path)
    assert references.real_floor(tiny, "pool", 10) is None


def test_a_guided_diffusion_file_is_written_and_read_back(tmp_path: Path) -> None:
    images = picture_set(60)
    built = references.build(images, NETWORK, tmp_path / "refs", keep=20)
    path = tmp_path / "ref.npz"
    adm.write_reference(path, built, images)
    with np.load(path, allow_pickle=False) as arrays:
        assert set(arrays) == {"mu", "sigma", "mu_s", "sigma_s", "arr_0"}
        np.testing.assert_array_equal(arrays["sigma_s"], built.moments["spatial"].cov)
        np.testing.assert_array_equal(colours(arrays["arr_0"])["pool"], built.kept["pool"])
    read = adm.read_reference(path, NETWORK, tmp_path / "refs")
    np.testing.assert_array_equal(read.moments["pool"].cov, built.moments["pool"].cov)  # of 60 images
    np.testing.assert_array_equal(read.kept["pool"], built.kept["pool"])  # of the 20
    assert read.info.count == 0


def test_a_file_with_images_only_is_a_reference_of_these(tmp_path: Path) -> None:
    x = picture_set(30).array
    np.savez(tmp_path / "x.npz", x)
    read = adm.read_reference(tmp_path / "x.npz", NETWORK, tmp_path / "refs")
    np.testing.assert_allclose(
        read.moments["pool"].cov, moments(colours(x)["pool"]).cov, rtol=1e-9, atol=1e-9
    )
    assert read.info.count == 30
    assert len(NpzImages(tmp_path / "x.npz")) == 30


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, UsageError, "5 dimensions, the features 'colours' have 18"),
        ({"mu": np.zeros(5)}, BadFileError, "no mean and covariance"),
        ({"mu": np.full(18, np.nan)}, BadFileError, "NaN or infinite"),
    ],
)
def test_foreign_statistics_are_refused(
    tmp_path: Path, change: dict[str, np.ndarray], error: type[Exception], message: str
) -> None:
    images = picture_set(30)
    built = references.build(images, NETWORK, tmp_path / "refs")
    adm.write_reference(tmp_path / "r.npz", built, images)
    with np.load(tmp_path / "r.npz") as arrays:
        np.savez(tmp_path / "bad.npz", **{**arrays, **change})
    with pytest.raises(error, match=message):
        adm.read_reference(tmp_path / "bad.npz", NETWORK, tmp_path / "refs")
