"""Random numbers as a pure function of (seed, purpose, position): no generator state is ever stored.

A training sample's noise depends on its global position in the run and an image's noise on its index, so a
run does not depend on workers, ranks or interruptions. Philox is counter-based: a stream is its key.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_MASK = (1 << 64) - 1


class Purpose(IntEnum):
    """What a stream is for; streams of different purposes never overlap."""

    ORDER = 1
    SAMPLE = 2
    IMAGE = 3
    FOLD = 4
    LATENT = 6


def stream(seed: int, purpose: Purpose, position: int) -> np.random.Generator:
    """The random stream of one position. seed and position are taken modulo 2**64."""
    key = np.array([seed & _MASK, int(purpose)], dtype=np.uint64)
    counter = np.array([0, 0, 0, position & _MASK], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
