"""FD (Lite0) and the probe on the embedded avatars: the offline protocol orders what it should order."""

from __future__ import annotations

import dataclasses
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageFilter

from kindiff.data.avatars import BASE, open_avatars
from kindiff.evaluate.features import extract
from kindiff.evaluate.lite0 import Lite0Features
from kindiff.evaluate.metrics import frechet_distance, kernel_distance, precision_recall
from kindiff.evaluate.moments import Moments, moments
from kindiff.evaluate.probe import fit_probe

FEW = ("rings", "stripes", "waves", "shapes", "pixel-art", "lorelei")


@cache
def network() -> Lite0Features:
    return Lite0Features.load()


def pool(images: np.ndarray, batch: int = 32) -> np.ndarray:
    parts = [extract(network(), images[i : i + batch])["pool"] for i in range(0, len(images), batch)]
    return np.concatenate(parts)


def noisy(images: np.ndarray, deviation: float) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(images.shape) * deviation
    return (images + noise).round().clip(0, 255).astype(np.uint8)


def blurred(images: np.ndarray, radius: float) -> np.ndarray:
    soft = ImageFilter.GaussianBlur(radius)
    return np.stack([np.asarray(Image.fromarray(image).filter(soft)) for image in images])


@dataclasses.dataclass(frozen=True)
class Avatars:
    """Real images in two disjoint parts, and their features."""

    images: np.ndarray
    labels: np.ndarray
    samples: np.ndarray
    reference: np.ndarray
    reference_labels: np.ndarray

    @property
    def moments(self) -> Moments:
        return moments(self.reference)


def avatars(classes: tuple[str, ...], per_class: int) -> Avatars:
    held = open_avatars("base", size=32, classes=classes, per_class=per_class, first=400)
    real = open_avatars("base", size=32, classes=classes, per_class=per_class)
    return Avatars(np.asarray(held.images), held.labels, pool(held.images), pool(real.images), real.labels)


def rises(data: Avatars, changes: list[np.ndarray]) -> list[float]:
    """Distances of the untouched samples and of the ever more changed ones."""
    return [frechet_distance(moments(x), data.moments) for x in (data.samples, *changes)]


def steps_up(distances: list[float], factor: float = 1.0) -> bool:
    return all(high > low * factor for low, high in pairwise(distances))


@pytest.fixture(scope="module")
def few() -> Avatars:
    return avatars(FEW, 6)


def test_distance_rises_with_noise_and_blur(few: Avatars) -> None:
    assert steps_up(rises(few, [pool(noisy(few.images, s)) for s in (10, 30)]), 1.1)
    assert steps_up(rises(few, [pool(blurred(few.images, r)) for r in (0.7, 1.4)]), 1.1)


def test_distance_rises_with_dropped_classes_at_the_same_number_of_images(few: Avatars) -> None:
    def twelve(classes: int) -> Moments:
        of_class = [np.flatnonzero(few.labels == i)[: 12 // classes] for i in range(classes)]
        return moments(few.samples[np.concatenate(of_class)])

    assert steps_up([frechet_distance(twelve(classes), few.moments) for classes in (6, 4, 2)], 1.1)


def test_a_probe_tells_the_styles_apart(few: Avatars) -> None:
    probe = fit_probe(few.reference, few.reference_labels, classes=len(FEW))
    assert probe.accuracy(few.samples, few.labels) > 0.97


def test_a_distance_does_not_depend_on_the_batch(few: Avatars) -> None:
    other = moments(pool(few.images, batch=7))
    whole = frechet_distance(moments(few.samples), few.moments)
    assert frechet_distance(other, few.moments) == pytest.approx(whole, rel=1e-6)


@pytest.mark.slow
def test_the_offline_protocol_on_all_base_styles() -> None:
    data = avatars(BASE, 15)
    assert steps_up(rises(data, [pool(noisy(data.images, s)) for s in (10, 20)]), 1.05)
    assert steps_up(rises(data, [pool(blurred(data.images, r)) for r in (0.6, 1.2)]), 1.05)
    dropped = [data.samples[data.labels < len(BASE) - count] for count in (3, 7, 14)]
    assert steps_up(rises(data, dropped), 1.02)
    assert (
        kernel_distance(dropped[2], data.reference).value
        > 3 * kernel_distance(dropped[0], data.reference).value
    )
    probe = fit_probe(data.reference, data.reference_labels, classes=len(BASE))
    assert probe.accuracy(data.samples, data.labels) > 0.97
    precision, recall = precision_recall(data.reference, dropped[2])
    full_precision, full_recall = precision_recall(data.reference, data.samples)
    assert precision > full_precision - 0.1
    assert recall < full_recall - 0.3
