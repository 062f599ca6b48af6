"""What every set of samples offers, images and latents alike.

Shape letters: N samples of the set, B batch, C channels, H W height and width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from kindiff.classes import ClassSet

if TYPE_CHECKING:
    from kindiff.models.codec import Codec


class SampleSet(Protocol):
    """A labelled set that batches are drawn from; `len()` is N."""

    @property
    def classes(self) -> ClassSet:
        """The classes; labels are their ids."""

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64 class ids, never the null id."""

    @property
    def sha256(self) -> str:
        """Hash of the content: equal hashes, equal samples."""

    @property
    def channels(self) -> int:
        """Channels of a sample."""

    @property
    def size(self) -> int:
        """Side of a sample, in pixels or latent cells."""

    @property
    def autoencoder_hash(self) -> str:
        """SHA-256 of the autoencoder whose latents these are; empty for images."""

    def autoencoder(self) -> Codec | None:
        """That autoencoder; None for images."""

    def __len__(self) -> int: ...

    def fetch(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        """Samples (B, C, H, W) float32 at `indices` (B,), mirrored left-right where `flips` (B,) is true.

        Of latents, the means.
        """

    def deviations(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray | None:
        """Standard deviations (B, C, H, W) float32 of the same latents; None for images, which have none."""
