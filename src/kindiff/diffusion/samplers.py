"""Samplers: plain functions from noise to samples, given something that predicts. They know no model.

B batch.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from kindiff.diffusion.flow import SCALE
from kindiff.diffusion.gaussian import Schedule

Predict = Callable[[Tensor, Tensor], Tensor]
NewNoise = Callable[[], Tensor]
"""Fresh standard normal noise of the batch's shape; called once a step, in order."""


def euler(predict: Predict, noise: Tensor, *, steps: int) -> Tensor:
    """Euler's method on the flow ODE, from t = 1 to 0 in equal steps: `steps` evaluations."""
    x = noise
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, after in pairwise(times):
        x = x + (after - t) * predict(x, _full(x, t * SCALE))
    return x


def heun(predict: Predict, noise: Tensor, *, steps: int) -> Tensor:
    """Heun's second-order method on the flow ODE, Euler for the last step: 2 steps - 1 evaluations."""
    x = noise
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, after in pairwise(times):
        slope = predict(x, _full(x, t * SCALE))
        ahead = x + (after - t) * slope
        if after > 0:
            slope = (slope + predict(ahead, _full(x, after * SCALE))) / 2
            ahead = x + (after - t) * slope
        x = ahead
    return x


def ddim(predict: Predict, noise: Tensor, *, schedule: Schedule) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with sigma 0) over a respaced schedule."""
    x, here = noise, schedule.to(noise.device)
    for s in reversed(range(len(schedule.timesteps))):
        s_B, t_B = _positions(here, x, s)
        eps = predict(x, t_B).chunk(2, dim=1)[0]
        x_0 = here.clean(x, eps, s_B)
        before = float(schedule.alpha_bar_before[s])
        x = before**0.5 * x_0 + (1 - before) ** 0.5 * eps
    return x


def ddpm(predict: Predict, noise: Tensor, *, schedule: Schedule, new_noise: NewNoise, clip: bool) -> Tensor:
    """Ancestral sampling with the learned variances (DDPM, algorithm 2). clip: bound x_0 to [-1, 1] (pixels)."""
    x, schedule = noise, schedule.to(noise.device)
    for s in reversed(range(len(schedule.timesteps))):
        s_B, t_B = _positions(schedule, x, s)
        eps, spread = predict(x, t_B).chunk(2, dim=1)
        x_0 = schedule.clean(x, eps, s_B)
        mean = schedule.posterior_mean(x_0.clamp(-1, 1) if clip else x_0, x, s_B)
        x = mean if s == 0 else mean + (0.5 * schedule.log_variance(spread, s_B)).exp() * new_noise()
    return x


def _positions(schedule: Schedule, x: Tensor, s: int) -> tuple[Tensor, Tensor]:
    s_B = torch.full((len(x),), s, device=x.device)
    return s_B, schedule.timesteps[s_B]


def _full(x: Tensor, value: float) -> Tensor:
    return torch.full((len(x),), value, device=x.device, dtype=torch.float32)
