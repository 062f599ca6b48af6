"""Scores with their protocol: what they hold, when they are refused, models that are sampled on the way."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from kindiff.checkpoint import write_json
from kindiff.classes import ClassSet
from kindiff.config import SampleConfig
from kindiff.errors import BadFileError, UsageError
from kindiff.evaluate import reference as references
from kindiff.evaluate import run
from kindiff.evaluate.features import CallableFeatures
from kindiff.evaluate.generated import GeneratedImages
from kindiff.evaluate.images import ArrayImages
from kindiff.evaluate.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from kindiff.evaluate.moments import moments
from kindiff.evaluate.protocol import RECORDED_ONLY, Protocol, Score, read_score, same_protocol
from kindiff.evaluate.run import evaluate
from kindiff.evaluate.sources import open_samples
from kindiff.models import DiT

NAMES = ("red", "green", "blue")


def colours(images: np.ndarray) -> Mapping[str, np.ndarray]:
    x = images.astype(np.float32) / 255
    pool = np.concatenate([x.mean((1, 2)), x.std((1, 2))], axis=1)
    return {"pool": pool, "spatial": x[:, ::4, ::4].reshape(len(x), -1), "logits": pool[:, :3] * 20}


NETWORK = CallableFeatures(name="colours", function=colours, version="1")


def coloured(count: int, seed: int, names: tuple[str, ...] = NAMES, strength: int = 100) -> ArrayImages:
    """Noise with more of the class's colour; classes in turn."""
    draw = np.random.default_rng(seed)
    classes, labels = ClassSet(names), np.arange(count) % len(names)
    channels = np.array([NAMES.index(name) for name in names])[labels]
    x = draw.integers(0, 120, (count, 8, 8, 3))
    x[np.arange(count), :, :, channels] += strength
    return ArrayImages(
        name=f"noise {seed}", array=x.clip(0, 255).astype(np.uint8), sha256=f"{seed} {names} {strength}",
        labels=labels, classes=classes, class_order=False,
    )  # fmt: skip


@pytest.fixture
def reference(tmp_path: Path) -> references.Reference:
    return references.build(coloured(240, 0), NETWORK, tmp_path / "references")


def test_kid_of_many_images_is_of_some_of_them_whatever_the_order_of_the_classes(
    tmp_path: Path, reference: references.Reference, monkeypatch
) -> None:
    monkeypatch.setattr(run, "KID_IMAGES", 60)
    samples = coloured(120, 1, strength=80)
    pool = colours(samples.array)["pool"]
    taken = []
    monkeypatch.setattr(run, "kernel_distance", lambda x, y: taken.append(x) or kernel_distance(x, y))
    monkeypatch.setattr(run, "_per_class", lambda *_: ())
    evaluate(samples, reference, NETWORK, work=tmp_path / "w")
    rows = [int(np.flatnonzero((pool == row).all(axis=1))[0]) for row in taken[0]]
    assert len(set(rows)) == 60
    assert rows == sorted(rows)
    assert max(np.bincount(np.array(rows) % 3)) <= 28  # evenly spaced ones would be 40 of one class


def test_every_number_of_a_score_is_its_metric(tmp_path: Path, reference: references.Reference) -> None:
    samples, real = coloured(90, 1, strength=80), coloured(240, 0)
    score = evaluate(samples, reference, NETWORK, work=tmp_path / "w")
    x, y = colours(samples.array), colours(real.array)
    assert score.distance == pytest.approx(frechet_distance(moments(x["pool"]), moments(y["pool"])), rel=1e-9)
    assert score.distance_name == "FD (colours)"
    spatial = frechet_distance(moments(x["spatial"]), moments(y["spatial"]))
    assert score.spatial_distance == pytest.approx(spatial, rel=1e-9)
    assert score.inception_score == pytest.approx(inception_score(x["logits"]).value)
    assert (score.precision, score.recall) == precision_recall(y["pool"], x["pool"])
    assert score.kid == pytest.approx(kernel_distance(x["pool"], y["pool"]).value)
    assert score.accuracy == 1.0
    assert score.real_accuracy == 1.0
    assert [one.name for one in score.per_class] == list(NAMES)
    blue = kernel_distance(x["pool"][2::3], y["pool"][2::3])
    assert (score.per_class[2].kid, score.per_class[2].kid_error) == pytest.approx(blue)
    assert score.per_class[2].count == 30
    assert score.floor is not None
    assert score.distance > score.floor
    assert score.floor_note == "two disjoint sets of 90 real images"
    assert score.notes == ()


def test_a_score_knows_how_it_was_made(tmp_path: Path, reference: references.Reference) -> None:
    score = evaluate(coloured(90, 1), reference, NETWORK, work=tmp_path / "w")
    protocol = score.protocol
    assert (protocol.features, protocol.features_sha256) == ("colours", NETWORK.sha256)
    assert (protocol.count, protocol.size, protocol.encoding) == (90, (8, 8), "lossless")
    assert protocol.reference_sha256 == reference.info.sha256
    assert {line.split()[0] for line in protocol.versions} >= {"python", "torch", "numpy", "scipy", "kindiff"}
    write_json(tmp_path / "score.json", score.to_json())
    assert read_score(tmp_path / "score.json") == score
    same_protocol(score.protocol, read_score(tmp_path / "score.json").protocol)


def test_a_file_that_is_no_score_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_score(tmp_path / "none.json")
    (tmp_path / "x.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(BadFileError, match="is not a score"):
        read_score(tmp_path / "x.json")


PROTOCOL = Protocol(
    features="net", features_sha256="1", resize="bilinear", count=10, size=(8, 8), encoding="lossless",
    classes=("a",), reference="avatars:base", reference_sha256="2",
)  # fmt: skip


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Protocol)])
def test_scores_of_two_protocols_are_not_compared(name: str) -> None:
    other = {
        "count": 11, "size": (8, 9), "classes": ("b",), "steps": 9, "guidance": 2.0, "ema": True, "metrics": 99,
        "seed": 3, "versions": ("torch 1",),
    }  # fmt: skip
    changed = dataclasses.replace(PROTOCOL, **{name: other.get(name, "other")})
    if name in (*RECORDED_ONLY, "reference"):
        same_protocol(PROTOCOL, changed)
    else:
        with pytest.raises(UsageError, match=f"differ in '{name}'"):
            same_protocol(PROTOCOL, changed)


def test_fewer_images_than_features_warn_of_the_bias(tmp_path: Path, reference: references.Reference) -> None:
    with pytest.warns(UserWarning, match="5 samples are not more than the 6 feature dimensions") as caught:
        score = evaluate(coloured(5, 1), reference, NETWORK, work=tmp_path / "w")
    assert "biased upwards" in str(caught[0].message)
    assert len(score.notes) == 1
    assert score.per_class == ()  # fewer than 3 of each class


def test_what_does_not_fit_is_refused(tmp_path: Path, reference: references.Reference) -> None:
    small = coloured(90, 1)
    cropped = ArrayImages(name="x", array=small.array[:, :6, :6], sha256="c")
    with pytest.raises(UsageError, match="samples are 6 x 6 pixels, the reference's images 8 x 8"):
        evaluate(cropped, reference, NETWORK, work=tmp_path / "w")
    other = CallableFeatures(name="colours", function=colours, version="2")
    with pytest.raises(UsageError, match="the reference's features_sha256"):
        evaluate(small, reference, other, work=tmp_path / "w")
    few = ArrayImages(name="few", array=small.array[:3], sha256="f")
    with pytest.raises(UsageError, match="few has 3 images; an evaluation needs 4"):
        evaluate(few, reference, NETWORK, work=tmp_path / "w")


def test_other_classes_are_told_of(tmp_path: Path, reference: references.Reference) -> None:
    part = evaluate(coloured(90, 1, ("green", "blue")), reference, NETWORK, work=tmp_path / "a")
    assert "2 of the reference's 3 classes" in part.notes[0]
    assert [one.name for one in part.per_class] == ["green", "blue"]
    assert part.accuracy == 1.0  # ids are translated by name
    x = coloured(90, 1)
    foreign = dataclasses.replace(x, classes=ClassSet(("red", "green", "violet")))
    score = evaluate(foreign, reference, NETWORK, work=tmp_path / "b")
    assert "'violet'" in score.notes[0]
    assert score.accuracy is None
    numbers = dataclasses.replace(x, classes=None)
    assert evaluate(numbers, reference, NETWORK, work=tmp_path / "c").accuracy == 1.0
    assert (
        evaluate(dataclasses.replace(x, labels=None), reference, NETWORK, work=tmp_path / "d").accuracy
        is None
    )


def test_the_inception_score_of_samples_sorted_by_class_is_that_of_mixed_ones(tmp_path: Path) -> None:
    def logits(images: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"pool": colours(images)["pool"], "logits": np.eye(3)[images[:, 0, 0].argmax(1)] * 50}

    network = CallableFeatures(name="logits", function=logits, version="1")
    flat = np.zeros((9000, 1, 1, 3), dtype=np.uint8)
    flat[np.arange(9000), 0, 0, np.arange(9000) // 3000] = 200  # three classes one after the other
    flat[:, 0, 0, 0] += np.random.default_rng(0).integers(0, 9, 9000, dtype=np.uint8)
    images = ArrayImages(name="sorted", array=flat, sha256="s")
    reference = references.build(images, network, tmp_path / "r", keep=200)
    mixed = evaluate(images, reference, network, work=tmp_path / "a").inception_score
    as_they_are = evaluate(
        dataclasses.replace(images, class_order=False), reference, network, work=tmp_path / "a"
    ).inception_score
    assert mixed == pytest.approx(3.0, rel=0.01)
    assert as_they_are is not None
    assert as_they_are < 2.5


@pytest.fixture
def model(tmp_path: Path, kind_model: DiT) -> Path:
    kind_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


CONFIG = SampleConfig(steps=2, batch=4, device="cpu")


def test_a_model_is_sampled_on_the_way(tmp_path: Path, model: Path) -> None:
    samples = open_samples(model, count=40, sampling=CONFIG)
    assert isinstance(samples, GeneratedImages)
    assert len(samples) == 40
    assert samples.labels is not None
    assert samples.labels[:6].tolist() == [0, 1, 2, 3, 4, 0]
    np.testing.assert_array_equal(samples.read(7, 9), samples.read(0, 40)[7:9])
    reference = references.build(samples, NETWORK, tmp_path / "r")
    score = evaluate(samples, reference, NETWORK, work=tmp_path / "w", sampler=samples.sampler, batch=16)
    assert abs(score.distance) < 1e-9
    protocol = score.protocol
    assert (protocol.sampler, protocol.steps, protocol.guidance) == ("heun", 2, 1.5)
    assert (protocol.seed, protocol.ema, protocol.precision) == (0, True, "fp32")
    assert len(score.per_class) == 5


def test_what_a_model_draws_has_a_hash_of_its_own(model: Path) -> None:
    def sha256(config: SampleConfig = CONFIG, count: int = 10) -> str:
        return open_samples(model, count=count, sampling=config).sha256

    assert sha256() == sha256()
    assert sha256() == sha256(dataclasses.replace(CONFIG, batch=3))  # the batch is no matter
    assert sha256() != sha256(dataclasses.replace(CONFIG, seed=1))
    assert sha256() != sha256(dataclasses.replace(CONFIG, guidance=2.0))
    assert sha256() != sha256(count=11)


def test_classes_of_a_model(model: Path) -> None:
    picked = open_samples(model, classes=("cat", "ant"), sampling=CONFIG)
    assert len(picked) == 100  # 50 of each
    assert isinstance(picked, GeneratedImages)
    assert picked.ids[:3] == [2, 0, 2]
    assert picked.labels is not None
    assert picked.labels[:3].tolist() == [0, 1, 0]
    whole = open_samples(model, count=10, sampling=CONFIG)
    assert whole.size == (8, 8)
    with pytest.raises(UsageError, match="4 samples are fewer than the 5 classes"):
        open_samples(model, count=4, sampling=CONFIG)


def test_a_score_is_complete_without_labels_spatial_features_and_logits(tmp_path: Path) -> None:
    bare = CallableFeatures(name="bare", function=lambda x: {"pool": colours(x)["pool"]}, version="1")
    x = coloured(60, 0)
    images = ArrayImages(name="bare", array=x.array, sha256="b")
    reference = references.build(images, bare, tmp_path / "r")
    score = evaluate(images, reference, bare, work=tmp_path / "w")
    nothing = {"spatial_distance", "spatial_floor", "inception_score", "inception_score_error", "accuracy"}
    nothing |= {"real_accuracy"}
    assert {f.name for f in dataclasses.fields(Score) if getattr(score, f.name) is None} == nothing
