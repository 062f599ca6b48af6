"""Samplers on data whose best predictor is known: independent Gaussians N(mean, std^2)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from kindiff.diffusion import samplers
from kindiff.diffusion.gaussian import respaced, schedule
from kindiff.diffusion.guidance import guided

MEAN, STD = 0.4, 0.6


def velocity(x: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """E[noise - x_0 | x_t] for Gaussian data: linear in x_t."""
    t = (t_B.double() / 1000).view(-1, 1)
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


def noise_and_range(few):
    """E[noise | x_t], and the range that gives the exact variance of x_{t-1} | x_t."""

    def predict(x: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        s = int((few.timesteps == t_B[0]).nonzero())
        bar, before = float(few.alpha_bar[s]), float(few.alpha_bar_before[s])
        total = bar * STD**2 + 1 - bar
        eps = math.sqrt(1 - bar) * (x - math.sqrt(bar) * MEAN) / total
        beta = 1 - bar / before
        clean_variance = STD**2 * (1 - bar) / total
        exact = beta * (1 - before) / (1 - bar) + before * (beta / (1 - bar)) ** 2 * clean_variance
        low, high = float(few.posterior_log_variance[s]), math.log(beta)
        share = (math.log(exact) - low) / (high - low) if high > low else 0.0
        return torch.cat([eps, torch.full_like(x, 2 * share - 1)], dim=1)

    return predict


def noise_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error_of(solve, steps: int) -> float:
    """Distance from the flow's exact end point, mean + std * noise."""
    noise = noise_of(200)
    return float((solve(velocity, noise, steps=steps) - (MEAN + STD * noise)).abs().max())


def test_euler_and_heun_converge_with_their_orders() -> None:
    euler = [error_of(samplers.euler, steps) for steps in (20, 40, 80)]
    heun = [error_of(samplers.heun, steps) for steps in (20, 40, 80)]
    for coarse, fine in pairwise(euler):
        assert coarse / fine == pytest.approx(2, rel=0.15)
    for coarse, fine in pairwise(heun):
        assert coarse / fine > 3
    assert heun[0] < euler[0] / 5
    assert heun[-1] < 1e-3


def test_flow_samplers_give_the_datas_mean_and_spread() -> None:
    for solve in (samplers.euler, samplers.heun):
        x = solve(velocity, noise_of(20_000), steps=100)
        assert float(x.mean()) == pytest.approx(MEAN, abs=0.02)
        assert float(x.std()) == pytest.approx(STD, rel=0.02)


@pytest.mark.parametrize(("solve", "calls"), [(samplers.euler, 7), (samplers.heun, 13)])
def test_number_and_times_of_evaluations(solve, calls) -> None:
    times = []

    def predict(x: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        times.append(float(t_B[0]))
        return velocity(x, t_B)

    solve(predict, noise_of(3), steps=7)
    assert len(times) == calls
    assert times[0] == 1000
    assert min(times) == pytest.approx(1000 / 7)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_ddim_follows_the_probability_flow(kind) -> None:
    noise = noise_of(500)
    # the exact end of the deterministic path of x_T = noise
    last = float(schedule(kind).alpha_bar[-1])
    spread = math.sqrt(last * STD**2 + 1 - last)
    exact = MEAN + STD * (noise - math.sqrt(last) * MEAN) / spread
    errors = []
    for steps in (50, 100, 1000):
        few = respaced(schedule(kind), steps)
        x = samplers.ddim(noise_and_range(few), noise, schedule=few)
        errors.append(float((x - exact).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 250])
def test_ddpm_with_the_exact_variance_is_exact_at_any_number_of_steps(kind, steps) -> None:
    few = respaced(schedule(kind), steps)
    generator = torch.Generator().manual_seed(5)
    count = 20_000
    drawn = []

    def new_noise() -> torch.Tensor:
        drawn.append(torch.randn(count, 2, generator=generator, dtype=torch.float64))
        return drawn[-1]

    x = samplers.ddpm(noise_and_range(few), noise_of(count), schedule=few, new_noise=new_noise, clip=False)
    assert len(drawn) == steps - 1, "no noise after the last step"
    # 40,000 numbers: standard errors 0.003 of the mean and 0.35 % of the spread
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.012)
    assert float(x.std()) == pytest.approx(STD, rel=0.015)


def test_ddpm_clips_the_clean_image_to_pixels() -> None:
    few = respaced(schedule("linear"), 20)
    wild = lambda x, t: torch.cat([-50 * torch.ones_like(x), -torch.ones_like(x)], dim=1)  # noqa: E731
    zero = lambda: torch.zeros(4, 2, dtype=torch.float64)  # noqa: E731
    clipped = samplers.ddpm(wild, noise_of(4), schedule=few, new_noise=zero, clip=True)
    free = samplers.ddpm(wild, noise_of(4), schedule=few, new_noise=zero, clip=False)
    torch.testing.assert_close(clipped, torch.ones_like(clipped))
    assert float(free.abs().min()) > 2


def linear_model(x: torch.Tensor, t_B: torch.Tensor, ids_B: torch.Tensor) -> torch.Tensor:
    """3 guided channels and a range; every output tells its class."""
    value = ids_B.to(x.dtype).view(-1, 1, 1, 1) + 1
    return torch.cat([x * value, x[:, :3] * value + 10 * value], dim=1)


def test_guidance_mixes_all_channels_and_takes_the_range_from_the_class() -> None:
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t_B, ids = torch.full((4,), 500.0), torch.tensor([0, 2, 1, 4])
    calls = []

    def model(x, t_B, ids_B):
        calls.append(ids_B.tolist())
        return linear_model(x, t_B, ids_B)

    conditional = linear_model(x, t_B, ids)
    null = linear_model(x, t_B, torch.full((4,), 5))
    for scale in (0.0, 0.5, 1.0, 3.0):
        out = guided(model, ids, null_id=5, scale=scale, channels=3)(x, t_B)
        expected = null[:, :3] + scale * (conditional[:, :3] - null[:, :3])
        torch.testing.assert_close(out[:, :3], expected)
        assert torch.equal(out[:, 3:], conditional[:, 3:])
        if scale == 1:
            assert torch.equal(out, conditional)
        if scale == 0:
            assert torch.equal(out[:, :3], null[:, :3])
        else:
            for channel in range(3):
                assert not torch.equal(out[:, channel], null[:, channel])
    assert calls == [[0, 2, 1, 4, 5, 5, 5, 5], [0, 2, 1, 4, 5, 5, 5, 5], [0, 2, 1, 4], calls[0]]
