"""The linear probe on data whose best accuracy is known."""

from __future__ import annotations

import numpy as np
import pytest

from kindiff.errors import UsageError
from kindiff.evaluate.probe import fit_probe


def blobs(seed: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    labels = np.arange(300) % 3
    centres = np.array([[5.0, 0, 7], [0, 5, 7], [-5, -5, 7]])  # the third feature is nearly constant
    return centres[labels] + draw.standard_normal((300, 3)) * spread, labels


def test_separable_classes_are_told_apart_and_shuffled_labels_are_not() -> None:
    probe = fit_probe(*blobs(0, 0.5), classes=3)
    x, labels = blobs(1, 0.5)
    assert probe.accuracy(x, labels) == 1.0
    assert probe.accuracy(x, np.roll(labels, 1)) == 0.0
    noise = fit_probe(x, np.random.default_rng(0).permutation(labels), classes=3)
    assert noise.accuracy(*blobs(2, 0.5)) < 0.7


def test_the_probe_is_deterministic_and_scale_free() -> None:
    x, labels = blobs(0, 3.0)
    y, wanted = blobs(1, 3.0)
    first, again = fit_probe(x, labels, classes=3), fit_probe(x, labels, classes=3)
    np.testing.assert_array_equal(first.weight, again.weight)
    scaled = fit_probe(x * 1000, labels, classes=3)
    assert scaled.accuracy(y * 1000, wanted) == pytest.approx(first.accuracy(y, wanted), abs=0.01)


def test_it_agrees_with_the_optimality_condition() -> None:
    x, labels = blobs(0, 3.0)
    probe = fit_probe(x, labels, classes=3, decay=0.1)
    z = (x - probe.shift) * probe.scale
    p = np.exp(z @ probe.weight + probe.bias)
    p /= p.sum(1, keepdims=True)
    slope = z.T @ (p - np.eye(3)[labels]) / len(z) + 0.1 * probe.weight
    assert np.abs(slope).max() < 1e-4


def test_a_class_without_images_is_refused() -> None:
    with pytest.raises(UsageError, match="class 3 has none"):
        fit_probe(*blobs(0, 1.0), classes=4)
