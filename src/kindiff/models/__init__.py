"""Models and their layers; nothing here knows that components exist."""

from kindiff.models.dit import DiT, dense_linear
from kindiff.models.layers import Gating, Linear

__all__ = ["DiT", "Gating", "Linear", "dense_linear"]
