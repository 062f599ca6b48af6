"""How long a training step takes on this machine, from a few real ones.

B batch.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace

import torch

from kindiff.config import ObjectiveConfig, TrainConfig
from kindiff.data.batches import Batch, make_batch
from kindiff.data.sets import SampleSet
from kindiff.diffusion import loss_of
from kindiff.models.dit import DiT
from kindiff.train.ema import Ema
from kindiff.train.optimiser import Optimiser
from kindiff.train.step import Step

STEPS = 3
"""Steps that are timed, after one that is not."""
CPU_IMAGES = 4
"""Images of a timed step on a CPU, where the time goes with their number."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step, medians."""

    images: int
    """Images that were run at once."""
    loading: float
    """Making their batch, in one process."""
    passes: float
    """Forward, backward and clipping."""
    update: float
    """Optimiser and average."""

    def step(self, batch: int, workers: int) -> float:
        """Seconds of a step of `batch` images: the passes as often as needed, or the loading where that is longer."""
        times = batch / self.images
        loading = times * self.loading / max(workers, 1)
        computing = times * self.passes + self.update
        return max(loading, computing) if workers else loading + computing


def measure(
    model: DiT,
    samples: SampleSet,
    objective: ObjectiveConfig,
    config: TrainConfig,
    *,
    flip: bool,
    images: int,
) -> StepTime:
    """Train the model for a few steps of `images` images, in place, and time them."""
    device = model.positions_TD.device
    model.train()
    model.recompute = config.recompute
    optimiser, ema = Optimiser(model, config), Ema(model, config.ema)
    once = replace(config, batch=images, accumulate=1, compile=False, record=False)
    work = Step(model, optimiser, loss_of(model.config), once)
    loading, passes, update = [], [], []
    for step in range(1 + STEPS):
        started = time.monotonic()
        batch = make_batch(
            samples, objective, seed=config.seed, first_position=step * images, batch=images, flip=flip
        )
        loading.append(time.monotonic() - started)
        slots = optimiser.slots_on(batch.gate_ids_B)
        ids = torch.unique(batch.ids_B)
        batch = Batch(*(tensor.to(device) for tensor in batch))
        started = _now(device)
        work.gradients(batch, slots)
        passes.append(_now(device) - started)
        started = _now(device)
        work.move(1.0, slots, ids)
        ema.update(step)
        update.append(_now(device) - started)
    middle = [statistics.median(seconds[1:]) for seconds in (loading, passes, update)]
    return StepTime(images=images, loading=middle[0], passes=middle[1], update=middle[2])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
