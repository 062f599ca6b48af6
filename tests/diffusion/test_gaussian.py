"""Schedules, the posterior and the hybrid loss, against formulas written another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from kindiff.config import DiTConfig
from kindiff.diffusion import flow_loss, hybrid_loss, loss_of, schedule
from kindiff.diffusion.gaussian import STEPS, _log_likelihood_8_bit, respaced

EXACT = {"rtol": 1e-10, "atol": 1e-12}
KINDS = pytest.mark.parametrize("kind", ["linear", "cosine"])


def test_linear_schedule_is_ddpms() -> None:
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    bar, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        bar.append(product)
    full = schedule("linear")
    np.testing.assert_allclose(full.beta.numpy(), betas, rtol=1e-9)
    np.testing.assert_allclose(full.alpha_bar.numpy(), bar, rtol=1e-9)
    assert full.timesteps.tolist() == list(range(1000))


def test_cosine_schedule_is_improved_ddpms() -> None:
    f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    full = schedule("cosine")
    clipped = [min(1 - f[i + 1] / f[i], 0.999) for i in range(1000)]
    np.testing.assert_allclose(full.beta.numpy(), clipped, rtol=1e-7)
    assert full.beta[-1] == pytest.approx(0.999)
    np.testing.assert_allclose(full.alpha_bar[:900].numpy(), np.array(f[1:901]) / f[0], rtol=1e-9)


@KINDS
def test_posterior_is_the_product_of_gaussians(kind) -> None:
    """q(x_{t-1} | x_t, x_0) by Bayes: precisions add, means are weighted by them."""
    full = schedule(kind)
    generator = torch.Generator().manual_seed(0)
    x_0, x_t = torch.randn(2, STEPS - 1, 3, generator=generator, dtype=torch.float64)
    s = torch.arange(1, STEPS)
    bar, before = full.alpha_bar[s].unsqueeze(1), full.alpha_bar[s - 1].unsqueeze(1)
    alpha = bar / before
    # x_{t-1} | x_0 ~ N(sqrt(before) x_0, 1 - before); x_t | x_{t-1} ~ N(sqrt(alpha) x_{t-1}, 1 - alpha)
    precision = 1 / (1 - before) + alpha / (1 - alpha)
    mean = (before.sqrt() * x_0 / (1 - before) + alpha.sqrt() * x_t / (1 - alpha)) / precision
    torch.testing.assert_close(full.posterior_mean(x_0, x_t, s), mean, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(full.posterior_variance[s], 1 / precision[:, 0], rtol=1e-8, atol=1e-14)
    logs = full.posterior_log_variance
    torch.testing.assert_close(logs[1:], full.posterior_variance[1:].log())
    assert logs[0] == logs[1], "the first step's variance is zero and is replaced"


@KINDS
def test_noising_and_its_inverse(kind) -> None:
    full = schedule(kind)
    generator = torch.Generator().manual_seed(1)
    x_0, noise = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    s = torch.tensor([0, 1, 500, 900, 990])
    x_t = full.add_noise(x_0, noise, s)
    for i, step in enumerate(s.tolist()):
        bar = float(full.alpha_bar[step])
        expected = math.sqrt(bar) * x_0[i] + math.sqrt(1 - bar) * noise[i]
        torch.testing.assert_close(x_t[i], expected, **EXACT)
    torch.testing.assert_close(full.clean(x_t, noise, s), x_0, rtol=1e-8, atol=1e-8)


@KINDS
def test_learned_range_spans_posterior_to_beta(kind) -> None:
    full = schedule(kind)
    s = torch.tensor([0, 3, 500, 999])
    one = torch.ones(4, 2, dtype=torch.float64)
    torch.testing.assert_close(full.log_variance(one, s)[:, 0], full.beta[s].log(), **EXACT)
    torch.testing.assert_close(full.log_variance(-one, s)[:, 1], full.posterior_log_variance[s], **EXACT)
    middle = (full.beta[s].log() + full.posterior_log_variance[s]) / 2
    torch.testing.assert_close(full.log_variance(0 * one, s)[:, 0], middle, **EXACT)


@KINDS
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 250, 999, 1000, 4000])
def test_respacing_keeps_the_marginals(kind, steps) -> None:
    full = schedule(kind)
    few = respaced(full, steps)
    assert len(few.timesteps) == min(steps, 1000)
    assert few.timesteps[-1] == 999, "sampling starts at the last step"
    if steps > 1:
        assert few.timesteps[0] == 0
        gaps = few.timesteps.diff()
        assert int(gaps.max() - gaps.min()) <= 1, "evenly spaced"
    torch.testing.assert_close(few.alpha_bar, full.alpha_bar[few.timesteps], rtol=0, atol=0)
    # beta of the sub-schedule: one step does what all between did
    kept = torch.cat([torch.ones(1, dtype=torch.float64), few.alpha_bar])
    torch.testing.assert_close(1 - few.beta, kept[1:] / kept[:-1], **EXACT)


def batch(count: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    x_0 = torch.rand(count, 3, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    noise, other = torch.randn(2, count, 3, 4, 4, generator=generator, dtype=torch.float64)
    spread = torch.rand(count, 3, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    u_B = torch.rand(count, generator=generator)
    return x_0, noise, noise + 0.3 * other, spread, u_B


@KINDS
def test_hybrid_loss_is_simple_plus_bound(kind) -> None:
    x_0, noise, eps, spread, u_B = batch(6)
    full = schedule(kind)
    seen = {}

    def predict(x, t):
        seen["x"], seen["t"] = x, t
        return torch.cat([eps, spread], dim=1)

    loss = hybrid_loss(predict, x_0, noise, u_B, full)
    steps = [int(u * 1000) for u in u_B.tolist()]
    assert seen["t"].tolist() == steps
    for i, s in enumerate(steps):
        assert s > 0
        bar, before = float(full.alpha_bar[s]), float(full.alpha_bar[s - 1])
        beta = 1 - bar / before
        x_t = math.sqrt(bar) * x_0[i] + math.sqrt(1 - bar) * noise[i]
        torch.testing.assert_close(seen["x"][i], x_t, **EXACT)

        def posterior(clean, x_t=x_t, bar=bar, before=before, beta=beta):
            return (math.sqrt(before) * beta * clean + math.sqrt(1 - beta) * (1 - before) * x_t) / (1 - bar)

        implied = (x_t - math.sqrt(1 - bar) * eps[i]) / math.sqrt(bar)
        variance = beta * (1 - before) / (1 - bar)
        share = (spread[i] + 1) / 2
        learned = beta**share * variance ** (1 - share)
        truth = Normal(posterior(x_0[i]), math.sqrt(variance))
        model = Normal(posterior(implied), learned.sqrt())
        bound = kl_divergence(truth, model).mean() / math.log(2)
        simple = (eps[i] - noise[i]).square().mean()
        torch.testing.assert_close(loss[i], simple + bound, rtol=1e-7, atol=1e-9)


def test_the_first_steps_bound_is_the_likelihood_of_eight_bits() -> None:
    full = schedule("linear")
    x_0 = torch.linspace(-1, 1, 256, dtype=torch.float64)[[0, 1, 100, 254, 255]].view(1, 5, 1, 1)
    noise, eps = torch.full_like(x_0, 0.3), torch.full_like(x_0, 0.5)
    spread = torch.zeros_like(x_0)
    loss = hybrid_loss(lambda x, t: torch.cat([eps, spread], 1), x_0, noise, torch.zeros(1), full)
    bar = float(full.alpha_bar[0])
    x_t = math.sqrt(bar) * x_0 + math.sqrt(1 - bar) * noise
    mean = (x_t - math.sqrt(1 - bar) * eps) / math.sqrt(bar)  # at the first step the posterior mean is x_0
    std = math.exp(0.25 * float(full.beta[0].log() + full.posterior_log_variance[1]))
    low, high = x_0.flatten() - 1 / 255, x_0.flatten() + 1 / 255
    low[0], high[-1] = -math.inf, math.inf
    normal = Normal(mean.flatten(), std)
    bits = -(normal.cdf(high) - normal.cdf(low)).log().mean() / math.log(2)
    torch.testing.assert_close(loss[0], bits + 0.04, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mean", [-1.2, -0.5, 0.013, 0.99])
@pytest.mark.parametrize("scale", [0.003, 0.02, 0.5])
def test_likelihood_of_eight_bits_sums_to_one(mean, scale) -> None:
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    logs = _log_likelihood_8_bit(levels, torch.tensor(mean), torch.tensor(scale, dtype=torch.float64).log())
    assert float(logs.exp().sum()) == pytest.approx(1, abs=1e-6)
    # the edges are open: their bins may hold more than the one around the mean
    assert int(logs.argmax()) in (int((levels - mean).abs().argmin()), 0, 255)


def test_the_variance_does_not_move_the_noise() -> None:
    """The bound trains the range only: the noise's gradient is the squared error's alone (improved DDPM, 4)."""
    x_0, noise, eps, spread, u_B = batch(4)
    eps.requires_grad_()
    spread.requires_grad_()
    hybrid_loss(
        lambda x, t: torch.cat([eps, spread], 1), x_0, noise, u_B, schedule("linear")
    ).sum().backward()
    torch.testing.assert_close(eps.grad, 2 * (eps - noise).detach() / eps[0].numel(), **EXACT)
    assert (spread.grad != 0).any()


def test_a_perfect_prediction_costs_the_entropy_gap_only() -> None:
    """With the true noise and the posterior's variance both parts vanish."""
    x_0, noise, _, _, u_B = batch(6)
    right = lambda x, t: torch.cat([noise, -torch.ones_like(noise)], 1)  # noqa: E731
    loss = hybrid_loss(right, x_0, noise, u_B, schedule("linear"))
    torch.testing.assert_close(loss, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-9)


def test_flow_loss_is_the_velocitys_error() -> None:
    x_0, noise, velocity, _, u_B = batch(5)
    seen = {}

    def predict(x, t):
        seen["x"], seen["t"] = x, t
        return velocity

    loss = flow_loss(predict, x_0, noise, u_B)
    for i, t in enumerate(u_B.tolist()):
        torch.testing.assert_close(seen["x"][i], x_0[i] + t * (noise[i] - x_0[i]), rtol=1e-6, atol=1e-7)
        error = (velocity[i] - noise[i] + x_0[i]).pow(2).mean()
        torch.testing.assert_close(loss[i], error, **EXACT)
    torch.testing.assert_close(seen["t"], u_B * 1000)
    assert float(flow_loss(lambda x, t: noise - x_0, x_0, noise, u_B).sum()) == 0.0


def test_loss_of_takes_the_models_schedule() -> None:
    x_0, noise, eps, spread, u_B = batch(3)
    predict = lambda x, t: torch.cat([eps, spread], 1)  # noqa: E731
    for kind in ("linear", "cosine"):
        config = DiTConfig(
            input_size=4, channels=3, num_classes=2, width=8, depth=1, heads=1, patch=2,
            objective="epsilon", schedule=kind,
        )  # fmt: skip
        found = loss_of(config)(predict, x_0, noise, u_B)
        assert torch.equal(found, hybrid_loss(predict, x_0, noise, u_B, schedule(kind)))
