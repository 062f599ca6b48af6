"""Metrics against closed forms, SciPy, torchmetrics and toy cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance, _compute_fid
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from kindiff.errors import UsageError
from kindiff.evaluate.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from kindiff.evaluate.moments import Moments, MomentsBuilder, moments


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def rotation(dims: int, seed: int) -> np.ndarray:
    return np.linalg.qr(rng(seed).standard_normal((dims, dims)))[0]


def gaussian(mean: np.ndarray, values: np.ndarray, basis: np.ndarray) -> Moments:
    return Moments(1000, mean, (basis * values) @ basis.T)


class Given(torch.nn.Module):
    """Hands torchmetrics the features themselves."""

    num_features = 24

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("dims", [1, 2, 16, 128])
@pytest.mark.parametrize("rank", ["full", "half", "one"])
def test_frechet_of_commuting_gaussians_is_the_closed_form(dims: int, rank: str) -> None:
    # the same eigenvectors: |mu_a - mu_b|^2 + sum (sqrt a - sqrt b)^2, singular covariances included
    keep = {"full": dims, "half": max(1, dims // 2), "one": 1}[rank]
    a, b = rng(1).uniform(0.1, 5, dims), rng(2).uniform(0.1, 5, dims)
    a[keep:], b[: dims - keep] = 0, 0
    basis, shift = rotation(dims, 3), rng(4).standard_normal(dims)
    found = frechet_distance(gaussian(shift, a, basis), gaussian(np.zeros(dims), b, basis))
    assert found == pytest.approx((shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-6)


def test_frechet_of_rotated_two_dimensional_gaussians_is_the_closed_form() -> None:
    # two dimensions: tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB))
    a = gaussian(np.zeros(2), np.array([3.0, 0.5]), rotation(2, 0))
    b = gaussian(np.array([1.0, -2.0]), np.array([0.2, 4.0]), rotation(2, 1))
    ab = a.cov @ b.cov
    cross = np.sqrt(np.trace(ab) + 2 * np.sqrt(np.linalg.det(ab)))
    expected = 5.0 + np.trace(a.cov) + np.trace(b.cov) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_with_fewer_images_than_dimensions() -> None:
    # y is x scaled by s about a shifted mean: the distance is |shift|^2 + (1 - s)^2 tr cov(x), at any rank
    x = rng(0).standard_normal((20, 200)) * np.linspace(0.1, 3, 200)
    shift = rng(1).standard_normal(200)
    a, b = moments(x), moments((x - x.mean(0)) * 1.7 + x.mean(0) + shift)
    expected = (shift**2).sum() + 0.7**2 * np.trace(a.cov)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert abs(frechet_distance(a, a)) < 1e-12 * np.trace(a.cov)
    # against many images: the trace of the root is the nuclear norm of the sets' product, no eigenvector in it
    y = rng(2).standard_normal((900, 200))
    many = moments(y)
    cross = np.linalg.norm((x - x.mean(0)) @ (y - y.mean(0)).T, "nuc") / np.sqrt(19 * 899)
    expected = ((a.mean - many.mean) ** 2).sum() + np.trace(a.cov) + np.trace(many.cov) - 2 * cross
    assert frechet_distance(a, many) == pytest.approx(expected, rel=1e-12)


def test_frechet_agrees_with_scipy_and_torchmetrics_on_the_same_features() -> None:
    x, y = rng(0).standard_normal((900, 24)), rng(1).standard_normal((700, 24)) @ rotation(24, 2) * 1.3 + 0.2
    x *= np.exp(-np.arange(24) / 6)
    a, b = moments(x), moments(y)
    found = frechet_distance(a, b)
    root = scipy.linalg.sqrtm(a.cov @ b.cov).real
    reference = ((a.mean - b.mean) ** 2).sum() + np.trace(a.cov + b.cov - 2 * root)
    assert found == pytest.approx(reference, rel=1e-6)
    metric = FrechetInceptionDistance(
        feature=Given(), normalize=True, input_img_size=(24,), reset_real_features=False
    ).set_dtype(torch.float64)
    metric.update(torch.from_numpy(x), real=True)
    metric.update(torch.from_numpy(y), real=False)
    assert found == pytest.approx(float(metric.compute()), rel=1e-6)
    assert found == pytest.approx(
        float(_compute_fid(*(torch.from_numpy(v) for v in (a.mean, a.cov, b.mean, b.cov)))), rel=1e-6
    )


def test_frechet_refuses_other_dimensions() -> None:
    with pytest.raises(UsageError, match="8 and 9 dimensions"):
        frechet_distance(moments(rng().random((9, 8))), moments(rng().random((9, 9))))


@pytest.mark.parametrize("cuts", [[], [1], [50, 51, 300], list(range(7, 500, 7))])
def test_moments_do_not_depend_on_batches_or_on_the_order_of_merging(cuts: list[int]) -> None:
    x = rng(0).standard_normal((500, 12)).astype(np.float32) * 10 + 100
    parts = [MomentsBuilder(12) for _ in range(3)]
    for i, part in enumerate(np.split(x, cuts)):
        parts[i % 3].add(part)
    whole = MomentsBuilder(12)
    for part in reversed(parts):
        whole.merge(part)
    found = whole.build()
    wide = x.astype(np.float64)
    assert found.count == 500
    np.testing.assert_allclose(found.mean, wide.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.cov, np.cov(wide, rowvar=False), rtol=1e-9, atol=1e-11)


def test_a_covariance_of_one_image_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 2 images; there are 1"):
        moments(np.ones((1, 4)))


def test_inception_score_of_known_distributions() -> None:
    certain = np.full((40, 10), -1e4)
    certain[np.arange(40), np.arange(40) % 10] = 0
    assert inception_score(certain).value == pytest.approx(10)  # sure of each image, all classes alike
    assert inception_score(np.zeros((40, 10))).value == pytest.approx(1)  # knows nothing
    assert inception_score(np.tile(certain[:1], (40, 1))).value == pytest.approx(1)  # one class only


@pytest.mark.filterwarnings("ignore:.*large memory footprint")
def test_inception_score_agrees_with_torchmetrics_and_has_consecutive_splits() -> None:
    logits = rng(0).standard_normal((600, 30)) * 3
    metric = InceptionScore(feature=Given(), splits=1).set_dtype(torch.float64)
    metric.update(torch.from_numpy(logits))
    with pytest.warns(UserWarning, match="degrees of freedom"):  # one split has no deviation
        reference, _ = metric.compute()
    assert inception_score(logits).value == pytest.approx(float(reference), rel=1e-9)
    split = inception_score(logits, split_size=250)
    parts = [inception_score(part).value for part in (logits[:250], logits[250:500], logits[500:])]
    assert split.value == pytest.approx(np.mean(parts))
    assert split.error == pytest.approx(np.std(parts, ddof=1) / np.sqrt(3))


@pytest.mark.filterwarnings("ignore:.*large memory footprint")
def test_kernel_distance_agrees_with_torchmetrics() -> None:
    x, y = rng(0).standard_normal((300, 24)), rng(1).standard_normal((300, 24)) + 0.1
    metric = KernelInceptionDistance(feature=Given(), normalize=True, subsets=1, subset_size=300)
    metric.set_dtype(torch.float64)
    metric.update(torch.from_numpy(x), real=True)
    metric.update(torch.from_numpy(y), real=False)
    found = kernel_distance(x, y, block=64)
    assert found.value == pytest.approx(float(metric.compute()[0]), rel=1e-9)
    assert found == kernel_distance(x, y, block=64)
    assert found.value == pytest.approx(kernel_distance(x, y, block=1000).value, rel=1e-9)


def test_kernel_distance_is_the_definition_for_sets_of_different_sizes() -> None:
    x, y = rng(0).standard_normal((7, 3)), rng(1).standard_normal((5, 3))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 3 + 1) ** 3)

    def value(x: np.ndarray, y: np.ndarray) -> float:
        n, m = len(x), len(y)
        xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
        return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)

    found = kernel_distance(x, y)
    assert found.value == pytest.approx(value(x, y), rel=1e-12)
    without_x = np.array([value(np.delete(x, i, 0), y) for i in range(7)])
    without_y = np.array([value(x, np.delete(y, i, 0)) for i in range(5)])
    assert found.error == pytest.approx(np.sqrt(6 * without_x.var() + 4 * without_y.var()), rel=1e-9)


def test_kernel_distance_is_unbiased_and_its_error_is_right() -> None:
    draws = [kernel_distance(*rng(seed).standard_normal((2, 40, 8))) for seed in range(300)]
    values, errors = np.array(draws).T
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(300)  # expectation 0 for equal distributions
    shifted = [
        kernel_distance(rng(seed).standard_normal((60, 8)), rng(seed + 999).standard_normal((60, 8)) + 1)
        for seed in range(200)
    ]
    values, errors = np.array(shifted).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.2)


def test_precision_and_recall_of_mode_collapse_and_of_its_mirror() -> None:
    reference = np.concatenate([rng(i).standard_normal((100, 4)) * 0.1 + 10 * i for i in range(4)])
    collapsed = rng(9).standard_normal((400, 4)) * 0.1  # one of four modes
    precision, recall = precision_recall(reference, collapsed)
    assert precision > 0.9
    assert recall < 0.3
    precision, recall = precision_recall(collapsed, reference)
    assert precision < 0.3
    assert recall > 0.9


def test_precision_and_recall_are_the_definition() -> None:
    reference, samples = rng(0).standard_normal((60, 5)), rng(1).standard_normal((45, 5)) * 1.2

    def inside(centres: np.ndarray, points: np.ndarray) -> float:
        hits = 0
        for point in points:
            for i, centre in enumerate(centres):
                others = np.linalg.norm(np.delete(centres, i, 0) - centre, axis=1)
                if np.linalg.norm(point - centre) <= np.sort(others)[2]:
                    hits += 1
                    break
        return hits / len(points)

    expected = (inside(reference, samples), inside(samples, reference))
    assert 0.1 < expected[0] < 0.9
    for block in (7, 64, 1024):
        assert precision_recall(reference, samples, block=block) == expected


def test_too_few_images_for_neighbours_are_refused() -> None:
    with pytest.raises(UsageError, match="more than 3 images"):
        precision_recall(np.zeros((10, 2)), np.zeros((3, 2)))


@pytest.mark.slow
def test_precision_and_recall_of_50k_by_10k_stay_far_below_4_gb() -> None:
    import subprocess
    import sys

    script = """
import resource, numpy as np
from kindiff.evaluate.metrics import precision_recall
x = np.random.default_rng(0).standard_normal((50_000, 64), dtype=np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
precision_recall(x[:10_000], x)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # beside the distances: features of 2048 dimensions take 0.5 GB (60,000 x 2048 x 4)
    assert float(ran.stdout) < 1.5
