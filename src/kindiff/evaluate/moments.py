"""Mean and covariance of features, gathered in pieces that can be merged in any order, in float64.

Shapes: N images, B images of a batch, D feature dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kindiff.errors import UsageError


@dataclass(frozen=True)
class Moments:
    """What a Fréchet distance needs to know of a set of features."""

    count: int
    """N, the number of images; 0 when a foreign file does not say."""
    mean: np.ndarray
    """(D,) float64."""
    cov: np.ndarray
    """(D, D) float64, the unbiased estimate (divided by N - 1)."""

    @property
    def dims(self) -> int:
        return len(self.mean)


class MomentsBuilder:
    """Streaming mean and covariance: `add` batches, or `merge` builders that saw disjoint parts.

    The result does not depend on how the images were cut into batches, to rounding in float64.
    """

    def __init__(self, dims: int) -> None:
        self.count = 0
        self.mean_D = np.zeros(dims)
        self.scatter_DD = np.zeros((dims, dims))

    def add(self, x_BD: np.ndarray) -> None:
        """One batch of features (B, D); B may be 0. NaN and infinities are the caller's to refuse."""
        x_BD = np.asarray(x_BD, dtype=np.float64)
        if len(x_BD) == 0:
            return
        mean_D = x_BD.mean(axis=0)
        centred_BD = x_BD - mean_D
        self._merge(len(x_BD), mean_D, centred_BD.T @ centred_BD)

    def merge(self, other: MomentsBuilder) -> None:
        """Takes in what another builder saw."""
        if other.count:
            self._merge(other.count, other.mean_D, other.scatter_DD)

    def _merge(self, count: int, mean_D: np.ndarray, scatter_DD: np.ndarray) -> None:
        # Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for ... sample variances"
        total = self.count + count
        delta_D = mean_D - self.mean_D
        self.scatter_DD += scatter_DD + np.outer(delta_D, delta_D) * (self.count * count / total)
        self.mean_D = self.mean_D + delta_D * (count / total)
        self.count = total

    def build(self) -> Moments:
        """The moments of all that was added; UsageError for fewer than two images."""
        if self.count < 2:
            raise UsageError(f"a covariance needs at least 2 images; there are {self.count}.")
        return Moments(self.count, self.mean_D.copy(), self.scatter_DD / (self.count - 1))


def moments(x_ND: np.ndarray, *, batch: int = 4096) -> Moments:
    """Mean and covariance of features (N, D) in float64; batch rows are converted at a time."""
    builder = MomentsBuilder(x_ND.shape[1])
    for start in range(0, len(x_ND), batch):
        builder.add(x_ND[start : start + batch])
    return builder.build()
