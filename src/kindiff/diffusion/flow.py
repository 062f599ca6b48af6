"""Rectified flow (Liu et al. 2022): x_t = (1 - t) x_0 + t noise, the model predicts noise - x_0.

B batch. The model sees 1000 t as its timestep.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

SCALE = 1000.0

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, H, W), timesteps (B,) in [0, 1000]) -> the velocity."""


def flow_loss(predict: Predict, x_0: Tensor, noise: Tensor, u_B: Tensor) -> Tensor:
    """Mean squared error of the velocity, a value a sample: (B,). u_B uniform in [0, 1) is the time."""
    t = u_B.view(-1, 1, 1, 1)
    x_t = (1 - t) * x_0 + t * noise
    velocity = predict(x_t, u_B * SCALE)
    return (velocity - (noise - x_0)).square().flatten(1).mean(dim=1)
