"""Metrics of generated images: pure functions from arrays to floats, in float64.

Shapes: N, M images of two sets, D feature dimensions, C classes, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kindiff.errors import UsageError
from kindiff.evaluate.moments import Moments

NEIGHBOURS = 3
"""k of improved precision and recall, as in its paper and in the guided-diffusion evaluator."""


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    error: float


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians; FID on Inception's pool features.

    Raises UsageError when the dimensions differ. Singular covariances (fewer images than dimensions) are
    fine numerically: nothing is added to a diagonal. The result is not clipped: equal sets give about 1e-15
    times the trace, of either sign.
    """
    if a.dims != b.dims:
        raise UsageError(
            f"features of {a.dims} and {b.dims} dimensions cannot be compared; use one network for both."
        )
    # Dowson & Landau 1982: |mu_a - mu_b|^2 + tr A + tr B - 2 tr (AB)^(1/2). The last trace is the sum of the
    # roots of the eigenvalues of the symmetric A^(1/2) B A^(1/2), that is the sum of the singular values of
    # A^(1/2) B^(1/2). These need no root of a rounding error: a null direction costs 1e-16, not 1e-8.
    shift_D = a.mean - b.mean
    cross = np.linalg.svd(_root(a).T @ _root(b), compute_uv=False).sum()
    return float(shift_D @ shift_D + np.trace(a.cov) + np.trace(b.cov) - 2.0 * cross)


def _root(of: Moments) -> np.ndarray:
    """A matrix R (D, at most D) with R R^T = cov: of N images no more than N - 1 directions vary."""
    values_D, vectors_DD = np.linalg.eigh(of.cov)  # ascending
    first = max(of.dims - of.count + 1, 0) if of.count else 0
    return vectors_DD[:, first:] * np.sqrt(np.clip(values_D[first:], 0.0, None))


def inception_score(logits_NC: np.ndarray, *, split_size: int = 5000) -> Estimate:
    """Inception score (Salimans et al. 2016) and its standard error over the splits.

    logits (N, C) in the order of the images: splits are consecutive, split_size images each, the last one may
    be shorter, and the score is the mean over the splits, as in the guided-diffusion evaluator. Images sorted
    by class make splits of few classes and a low score: give them in a mixed order. One split has error 0.
    """
    scores = []
    for start in range(0, len(logits_NC), split_size):
        x_BC = np.asarray(logits_NC[start : start + split_size], dtype=np.float64)
        log_p_BC = x_BC - x_BC.max(axis=1, keepdims=True)
        log_p_BC -= np.log(np.exp(log_p_BC).sum(axis=1, keepdims=True))
        p_BC = np.exp(log_p_BC)
        marginal_C = p_BC.mean(axis=0)
        # exp E_x KL(p(y|x) || p(y)); a class that no image can be has p = 0 and adds 0
        log_marginal_C = np.log(marginal_C, where=marginal_C > 0, out=np.zeros_like(marginal_C))
        scores.append(np.exp((p_BC * (log_p_BC - log_marginal_C)).sum(axis=1).mean()))
    if not scores:
        raise UsageError("the inception score needs at least one image; there are 0.")
    error = np.std(scores, ddof=1) / np.sqrt(len(scores)) if len(scores) > 1 else 0.0
    return Estimate(float(np.mean(scores)), float(error))


def kernel_distance(x_ND: np.ndarray, y_MD: np.ndarray, *, block: int = 1024) -> Estimate:
    """KID (Bińkowski et al. 2018): the unbiased squared MMD under the kernel (x.y / D + 1)^3.

    x (N, D), y (M, D), each of at least 2 images. All pairs are used, not random subsets, so there is no
    seed; the error is the jackknife's (leave one image out, each set for itself). May be slightly negative.
    """
    n, m = len(x_ND), len(y_MD)
    if min(n, m) < 2:
        raise UsageError(f"KID needs at least 2 images in each set; there are {n} and {m}.")
    xx_N, _ = _kernel_sums(x_ND, x_ND, block)
    yy_M, _ = _kernel_sums(y_MD, y_MD, block)
    xx_N, yy_M = xx_N - _kernel_self(x_ND), yy_M - _kernel_self(y_MD)
    xy_N, xy_M = _kernel_sums(x_ND, y_MD, block)
    # KID paper eq. 4: mean over pairs i != j of k(x, x), of k(y, y), less twice the mean of k(x, y)
    sum_x, sum_y, cross = xx_N.sum(), yy_M.sum(), xy_N.sum()
    value = sum_x / (n * (n - 1)) + sum_y / (m * (m - 1)) - 2 * cross / (n * m)
    if min(n, m) < 3:
        return Estimate(float(value), float("nan"))
    others_x, others_y = sum_y / (m * (m - 1)), sum_x / (n * (n - 1))
    left_N = (sum_x - 2 * xx_N) / ((n - 1) * (n - 2)) + others_x - 2 * (cross - xy_N) / ((n - 1) * m)
    left_M = (sum_y - 2 * yy_M) / ((m - 1) * (m - 2)) + others_y - 2 * (cross - xy_M) / (n * (m - 1))
    variance = (n - 1) * left_N.var() + (m - 1) * left_M.var()
    return Estimate(float(value), float(np.sqrt(variance)))


def _kernel_sums(x_ND: np.ndarray, y_MD: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the kernel over y (N,) and over x (M,)."""
    rows_N, columns_M = np.zeros(len(x_ND)), np.zeros(len(y_MD))
    for at, x_BD in _blocks(x_ND, block):
        for start, y_BD in _blocks(y_MD, block):
            kernel_BB = (x_BD @ y_BD.T / x_ND.shape[1] + 1.0) ** 3
            rows_N[at : at + len(x_BD)] += kernel_BB.sum(axis=1)
            columns_M[start : start + len(y_BD)] += kernel_BB.sum(axis=0)
    return rows_N, columns_M


def _kernel_self(x_ND: np.ndarray) -> np.ndarray:
    """(N,) the kernel of each image with itself."""
    return ((np.square(x_ND, dtype=np.float64)).sum(axis=1) / x_ND.shape[1] + 1.0) ** 3


def precision_recall(
    reference_ND: np.ndarray, samples_MD: np.ndarray, *, neighbours: int = NEIGHBOURS, block: int = 1024
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of samples (M, D) against a reference (N, D).

    precision: share of the samples inside the reference's manifold (each reference image is the centre of a
    ball that reaches to its k-th nearest reference image); recall: share of the reference in the samples'.
    Needs more than k images in each set. Memory: one block of block x max(N, M) distances in float64 beside
    the features themselves, so 50,000 x 10,000 images fit in 4 GB.
    """
    if min(len(reference_ND), len(samples_MD)) <= neighbours:
        raise UsageError(
            f"precision and recall with k = {neighbours} need more than {neighbours} images in each set; "
            f"there are {len(reference_ND)} reference images and {len(samples_MD)} samples."
        )
    radii_N = _radii(reference_ND, neighbours, block)
    radii_M = _radii(samples_MD, neighbours, block)
    inside_M = np.zeros(len(samples_MD), dtype=bool)
    inside_N = np.zeros(len(reference_ND), dtype=bool)
    for at, distance_BM in _squared_distances(reference_ND, samples_MD, block):
        rows = slice(at, at + len(distance_BM))
        inside_M |= (distance_BM <= radii_N[rows, None]).any(axis=0)
        inside_N[rows] = (distance_BM <= radii_M[None, :]).any(axis=1)
    return float(inside_M.mean()), float(inside_N.mean())


def _radii(x_ND: np.ndarray, neighbours: int, block: int) -> np.ndarray:
    """(N,) squared distance of each image to its k-th nearest other image."""
    radii_N = np.empty(len(x_ND))
    for at, distance_BN in _squared_distances(x_ND, x_ND, block):
        rows = np.arange(len(distance_BN))
        distance_BN[rows, at + rows] = np.inf  # an image is not its own neighbour
        distance_BN.partition(neighbours - 1, axis=1)
        radii_N[at : at + len(distance_BN)] = distance_BN[:, neighbours - 1]
    return radii_N


def _squared_distances(x_ND: np.ndarray, y_MD: np.ndarray, block: int) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of the squared distances (N, M), `block` rows at a time, each with the number of its first row."""
    centre_D = y_MD.mean(axis=0, dtype=np.float64)  # distances do not change, cancellation gets smaller
    for at, x_BD in _blocks(x_ND, block):
        x_BD = x_BD - centre_D
        out_BM = np.empty((len(x_BD), len(y_MD)))
        for start, y_BD in _blocks(y_MD, block):
            y_BD = y_BD - centre_D
            part_BB = out_BM[:, start : start + len(y_BD)]
            np.matmul(x_BD, y_BD.T, out=part_BB)
            part_BB *= -2.0
            part_BB += (x_BD * x_BD).sum(axis=1)[:, None] + (y_BD * y_BD).sum(axis=1)
        yield at, np.maximum(out_BM, 0.0, out=out_BM)


def _blocks(x_ND: np.ndarray, block: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(x_ND), block):
        yield start, np.asarray(x_ND[start : start + block], dtype=np.float64)
