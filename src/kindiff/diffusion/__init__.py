"""Objectives and samplers: pure functions that know no model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kindiff.config import DiTConfig
from kindiff.diffusion.flow import flow_loss
from kindiff.diffusion.gaussian import hybrid_loss, schedule

Loss = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor, Tensor], Tensor]
"""(predict, x_0, noise, u_B) -> (B,)."""


def loss_of(config: DiTConfig) -> Loss:
    """The training loss of a model's objective."""
    if config.objective == "flow":
        return flow_loss
    full = schedule(config.schedule)
    return lambda predict, x_0, noise, u_B: hybrid_loss(predict, x_0, noise, u_B, full)
