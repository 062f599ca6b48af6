"""DDPM with DiT's choices: 1000 steps, epsilon prediction, a learned range of variances, the hybrid loss.

B batch, S steps of a schedule; tensors over steps are float64 until they meet a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

STEPS = 1000

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, H, W), timesteps (B,) in [0, 1000)) -> the model's output."""


@dataclass(frozen=True)
class Schedule:
    """A (possibly respaced) discrete schedule: alpha_bar (S,) float64 and the timesteps (S,) the model sees."""

    alpha_bar: Tensor
    timesteps: Tensor

    def to(self, device: torch.device) -> Schedule:
        """The same on a device, where it stays: a copy in every step would make the device wait for the host."""
        if device == self.alpha_bar.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = Schedule(self.alpha_bar.to(device), self.timesteps.to(device))
        return self._elsewhere[device]

    @cached_property
    def _elsewhere(self) -> dict[torch.device, Schedule]:
        return {}

    @cached_property
    def alpha_bar_before(self) -> Tensor:
        return torch.cat([torch.ones_like(self.alpha_bar[:1]), self.alpha_bar[:-1]])

    @cached_property
    def beta(self) -> Tensor:
        return 1 - self.alpha_bar / self.alpha_bar_before

    @cached_property
    def posterior_variance(self) -> Tensor:
        # DDPM eq. 7
        return self.beta * (1 - self.alpha_bar_before) / (1 - self.alpha_bar)

    @cached_property
    def posterior_log_variance(self) -> Tensor:
        """Its logarithm, the first entry (a variance of zero) replaced by the second."""
        variance = self.posterior_variance.clone()
        variance[0] = variance[1] if len(variance) > 1 else self.beta[0]
        return variance.log()

    def posterior_mean(self, x_0: Tensor, x_t: Tensor, s_B: Tensor) -> Tensor:
        """E[x_{t-1} | x_t, x_0], DDPM eq. 7."""
        before, bar, beta = self.alpha_bar_before, self.alpha_bar, self.beta
        weight_0 = before.sqrt() * beta / (1 - bar)
        weight_t = (1 - beta).sqrt() * (1 - before) / (1 - bar)
        return _at(weight_0, s_B, x_0) * x_0 + _at(weight_t, s_B, x_t) * x_t

    def add_noise(self, x_0: Tensor, noise: Tensor, s_B: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise, DDPM eq. 4."""
        return _at(self.alpha_bar.sqrt(), s_B, x_0) * x_0 + _at((1 - self.alpha_bar).sqrt(), s_B, x_0) * noise

    def clean(self, x_t: Tensor, eps: Tensor, s_B: Tensor) -> Tensor:
        """x_0 that the predicted noise implies."""
        bar = self.alpha_bar
        return _at(bar.rsqrt(), s_B, x_t) * x_t - _at((1 / bar - 1).sqrt(), s_B, x_t) * eps

    def log_variance(self, range_BCHW: Tensor, s_B: Tensor) -> Tensor:
        """The learned range: interpolates log beta and log posterior variance (improved DDPM, eq. 15)."""
        share = (range_BCHW + 1) / 2
        upper, lower = _at(self.beta.log(), s_B, share), _at(self.posterior_log_variance, s_B, share)
        return share * upper + (1 - share) * lower


def schedule(kind: Literal["linear", "cosine"]) -> Schedule:
    """The training schedule: linear beta 1e-4 to 0.02 (DDPM), or cosine (improved DDPM, eq. 17)."""
    if kind == "linear":
        beta = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
    else:
        angle = (torch.arange(STEPS + 1, dtype=torch.float64) / STEPS + 0.008) / 1.008 * math.pi / 2
        bar = angle.cos().square()
        beta = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    return Schedule((1 - beta).cumprod(dim=0), torch.arange(STEPS))


def respaced(full: Schedule, steps: int, *, spacing: Literal["even", "trailing"] = "even") -> Schedule:
    """A sub-schedule of `steps` timesteps that ends at the last one.

    even: from the first to the last (improved DDPM, section 4). trailing: whole strides down from the last
    (Lin et al. 2024, table 2).
    """
    count = len(full.timesteps)
    steps = min(steps, count)
    # counted from the last, so that a single step is the last one
    if spacing == "even":
        chosen = torch.linspace(count - 1, 0, steps, dtype=torch.float64).flip(0).round().long()
    else:
        strides = torch.arange(steps, dtype=torch.float64) * (count / steps)
        chosen = (count - strides).flip(0).round().long() - 1
    return Schedule(full.alpha_bar[chosen], full.timesteps[chosen])


def hybrid_loss(predict: Predict, x_0: Tensor, noise: Tensor, u_B: Tensor, full: Schedule) -> Tensor:
    """L_simple + L_vlb of improved DDPM (eq. 16), a value a sample: (B,).

    u_B uniform in [0, 1) picks the timestep. The variance's gradient does not reach the predicted noise.
    """
    full = full.to(u_B.device)
    s_B = (u_B.double() * STEPS).long()
    x_t = full.add_noise(x_0, noise, s_B)
    eps, spread = predict(x_t, full.timesteps[s_B]).chunk(2, dim=1)
    simple = (eps - noise).square().flatten(1).mean(dim=1)
    return simple + _bound(full, x_0, x_t, eps.detach(), spread, s_B)


def _bound(full: Schedule, x_0: Tensor, x_t: Tensor, eps: Tensor, spread: Tensor, s_B: Tensor) -> Tensor:
    """One term of the variational bound in bits per dimension: KL to the true posterior, or at the first step
    the likelihood of 8-bit data."""
    true_mean = full.posterior_mean(x_0, x_t, s_B)
    true_log_variance = _at(full.posterior_log_variance, s_B, x_0)
    mean = full.posterior_mean(full.clean(x_t, eps, s_B), x_t, s_B)
    log_variance = full.log_variance(spread, s_B)
    kl = 0.5 * (
        log_variance
        - true_log_variance
        - 1
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    first = -_log_likelihood_8_bit(x_0, mean, 0.5 * log_variance)
    per_sample = torch.where(s_B == 0, first.flatten(1).mean(dim=1), kl.flatten(1).mean(dim=1))
    return per_sample / math.log(2.0)


def _log_likelihood_8_bit(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of the bin of width 2/255 around x under a Gaussian, open at -1 and 1 (DDPM eq. 13)."""
    inverse = (-log_scale).exp()
    above = torch.special.ndtr((x - mean + 1 / 255) * inverse)
    below = torch.special.ndtr((x - mean - 1 / 255) * inverse)
    mass = torch.where(x > 0.999, 1 - below, torch.where(x < -0.999, above, above - below))
    return mass.clamp(min=1e-12).log()


def _at(values_S: Tensor, s_B: Tensor, like: Tensor) -> Tensor:
    """values[s] in the batch's dtype, shaped to broadcast over it."""
    return values_S[s_B].to(like.dtype).view(-1, *[1] * (like.ndim - 1))
