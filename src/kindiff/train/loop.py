"""The training loop.

B batch. Progress is counted in images; everything random about a sample comes with its position.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from kindiff.config import ObjectiveConfig, TrainConfig
from kindiff.data.batches import Batch, batches
from kindiff.data.sets import SampleSet
from kindiff.diffusion import loss_of
from kindiff.models.dit import DiT
from kindiff.progress import Track, say
from kindiff.runtime import device_of
from kindiff.train.ema import Ema
from kindiff.train.optimiser import Optimiser, factor_of
from kindiff.train.run import Run


class NotFinite(RuntimeError):
    """Loss or gradient is not a finite number; the step was not taken."""

    exit_code = 1


class Interrupted(Exception):
    """The run was asked to stop; it has saved. exit_code is 130 (SIGINT) or 143 (SIGTERM)."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def fit(
    model: DiT, samples: SampleSet, objective: ObjectiveConfig, config: TrainConfig, run: Run, flip: bool
) -> DiT:
    """Train what requires gradients; returns the EMA model. Resumes from the run's newest whole checkpoint.

    Raises NotFinite at a step whose loss or gradient is not finite, and Interrupted after SIGINT or SIGTERM.
    """
    # Everything that a step needs.
    device = device_of(config.device)
    model.to(device).train()
    optimiser, ema, loss_function = Optimiser(model, config), Ema(model, config.ema), loss_of(model.config)
    first, loss_sum, since = _resume(model, ema, optimiser, run)
    writer = _tensorboard(run) if config.tensorboard else None
    feed = batches(
        samples, objective, seed=config.seed, first_step=first, steps=config.steps - first, batch=config.batch,
        flip=flip, workers=config.workers,
    )  # fmt: skip
    loss_sum, started = loss_sum.to(device), time.monotonic()

    with (
        _stop_signals() as stop,
        Track("training", config.steps * config.batch, unit="images", done=first * config.batch) as track,
    ):
        for step, batch in enumerate(feed, start=first):
            # The classes of this batch, known before it reaches the device.
            slots = model.gate.slots_on(batch.gate_ids_B) if model.gate is not None else torch.empty(0)  # type: ignore[operator]
            ids = torch.unique(batch.ids_B)
            batch = Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))

            # Forward and backward.
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                per_sample = loss_function(
                    lambda x, t, batch=batch: model(x, t, batch.ids_B, batch.gate_ids_B),  # type: ignore[misc]
                    batch.x_BCHW, batch.noise_BCHW, batch.u_B,
                )  # fmt: skip
            loss = per_sample.mean()
            optimiser.zero_grad()
            loss.backward()

            # Check, step, average.
            norm = torch.nn.utils.clip_grad_norm_(optimiser.parameters, config.clip)
            if not torch.isfinite(loss + norm):
                run.save(step, _tensors(model, ema, optimiser, loss_sum, since))
                raise NotFinite(
                    f"step {step}: the loss ({float(loss.detach())}) or the gradient's norm ({float(norm)}) is not "
                    "finite; the step was not taken and the state before it is saved. Try a lower rate or fp32."
                )
            factor = factor_of(step, config)
            optimiser.step(factor=factor, slots=slots, ids=ids)
            ema.update(step)
            loss_sum, since = loss_sum + loss.detach(), since + 1

            # Log and save.
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                mean = float(loss_sum) / since
                seconds = time.monotonic() - started
                metrics = {
                    "step": done, "images": done * config.batch, "loss": mean, "lr": config.lr * factor,
                    "gradient_norm": float(norm), "images_per_second": since * config.batch / seconds,
                }  # fmt: skip
                run.log(metrics)
                if writer is not None:
                    for name, value in metrics.items():
                        writer.add_scalar(name, value, done)
                loss_sum, since, started = torch.zeros((), device=device), 0, time.monotonic()
                track.note = f"loss {mean:.4f}"
            track.advance(config.batch)
            stopping = bool(stop)
            if done % config.save_every == 0 or done == config.steps or stopping:
                run.save(done, _tensors(model, ema, optimiser, loss_sum, since))
            if stopping and done < config.steps:
                raise Interrupted(
                    stop[0],
                    f"stopped at step {done} of {config.steps}, saved; to resume, run the same command again.",
                )
    return ema.model(model).cpu()


def _tensors(
    model: DiT, ema: Ema, optimiser: Optimiser, loss_sum: torch.Tensor, since: int
) -> dict[str, dict[str, torch.Tensor]]:
    log = {"loss_sum": loss_sum, "since": torch.tensor(since)}
    return {"model": model.state_dict(), "ema": ema.average, "optimiser": optimiser.tensors(), "log": log}


def _resume(model: DiT, ema: Ema, optimiser: Optimiser, run: Run) -> tuple[int, torch.Tensor, int]:
    """Take over the newest whole checkpoint; returns the step to go on with and the log's running sum."""
    found = run.newest()
    step = found[0] if found else 0
    run.metrics_until(step)
    if found is None:
        return 0, torch.zeros(()), 0
    tensors = found[1]
    model.load_state_dict(tensors["model"])
    ema.load_(tensors["ema"])
    optimiser.load_(tensors["optimiser"])
    say(f"resuming at step {step}")
    return step, tensors["log"]["loss_sum"], int(tensors["log"]["since"])


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM; a second one acts at once."""
    stop: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread
        return

    def note(signum: int, frame: Any) -> None:
        stop.append(signum)
        say("finishing the step, then saving ...")
        for s, handler in before.items():
            signal.signal(s, handler)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _tensorboard(run: Run) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("TensorBoard is not installed; pip install 'kindiff[tensorboard]'.") from None
    return SummaryWriter(str(run.folder / "tensorboard"))
