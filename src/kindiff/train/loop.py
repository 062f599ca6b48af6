"""The training loop.

B batch. Progress is counted in images; everything random about a sample comes with its position. Of several ranks each
has its share of a batch; losses, gradients, the classes of a step and what is decided are those of all ranks.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kindiff.config import ObjectiveConfig, TrainConfig
from kindiff.data.batches import Batch, batches, make_batch
from kindiff.data.sets import SampleSet
from kindiff.diffusion import loss_of
from kindiff.errors import UsageError
from kindiff.models.dit import DiT
from kindiff.parallel import Ranks
from kindiff.progress import Track, say
from kindiff.runtime import device_of
from kindiff.train.capsule import capsule_of, write_capsule
from kindiff.train.optimiser import factor_of
from kindiff.train.rollback import BadStepError, read_windows, roll_back
from kindiff.train.run import Run
from kindiff.train.state import Saver, State
from kindiff.train.step import Step


class Interrupted(Exception):
    """The run was asked to stop; it has saved. exit_code is 130 (SIGINT) or 143 (SIGTERM)."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a run trains on and how; with the run's windows it determines every step."""

    samples: SampleSet
    objective: ObjectiveConfig
    config: TrainConfig
    flip: bool
    run: Run


def check_batch(config: TrainConfig, ranks: Ranks) -> None:
    """UsageError for a batch that does not divide among the ranks and their parts; before a run is begun."""
    if config.batch % (config.accumulate * ranks.count):
        raise UsageError(
            f"a batch of {config.batch} does not divide among {ranks.count} ranks and {config.accumulate} parts; "
            f"make it a multiple of {config.accumulate * ranks.count}."
        )


def fit(
    model: DiT, samples: SampleSet, objective: ObjectiveConfig, config: TrainConfig, run: Run, flip: bool
) -> DiT:
    """Train what requires gradients; returns the EMA model. Resumes from the run's newest whole checkpoint.

    A step whose loss or gradient is not finite is not taken: the run goes back to its newest checkpoint and leaves
    a window of steps out, config.rollbacks times, then raises NotFinite. Raises Interrupted after SIGINT or SIGTERM.
    """
    job = Job(samples=samples, objective=objective, config=config, flip=flip, run=run)
    run.count(model)
    say(f"{len(samples):,} samples of {len(samples.classes)} classes")
    device = device_of(config.device)
    model.to(device).train()
    model.recompute = config.recompute
    state = State.fresh(model, config, device, run.ranks)
    writer = _tensorboard(run) if config.tensorboard and run.ranks.first else None
    sharded = config.checkpoints == "sharded"
    with _stop_signals(insistent=run.ranks.count == 1) as stop, Saver(run, sharded=sharded) as saver:
        while True:
            first = _resume(state, run, saver)
            try:
                _train(job, state, saver, stop, writer, first)
                break
            except BadStepError as bad:
                saver.settle()
                run.ranks.on_first(functools.partial(roll_back, run.folder, bad, config))
    trained = state.whole_model(averaged=True).cpu()
    trained.recompute = False
    return trained


def _train(job: Job, state: State, saver: Saver, stop: list[int], writer: Any, first: int) -> None:
    """Steps first .. config.steps - 1; raises BadStepError before one that must not be taken."""
    # Everything that a step needs.
    model, optimiser, config, ranks = state.model, state.optimiser, job.config, job.run.ranks
    device = state.loss_sum.device
    work = Step(state.module, optimiser, loss_of(model.config), config)
    save_every = -(-config.save_every // 2)  # the one before may still be being written
    left_out = [window.steps for window in read_windows(job.run.folder)]
    feed = batches(
        job.samples, job.objective, seed=config.seed, first_step=first, steps=config.steps - first,
        batch=config.batch, flip=job.flip, workers=config.workers, left_out=left_out, rank=ranks.rank,
        ranks=ranks.count,
    )  # fmt: skip
    started, taken = time.monotonic(), 0  # steps since: a checkpoint's are not of this time

    with Track("training", config.steps * config.batch, unit="images", done=first * config.batch) as track:
        for step in range(first, config.steps):
            saver.keep_up(step, config.save_every)
            batch = None
            if not any(step in window for window in left_out):
                # The classes of this batch, known before it reaches the device.
                batch = next(feed)
                slots = ranks.union(optimiser.slots_on(batch.gate_ids_B), optimiser.tailors.rows)
                ids = ranks.union(torch.unique(batch.ids_B), model.classes.rows)
                batch = Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))

                # Forward and backward; check (two numbers, the same on all ranks), move, average.
                loss, norm = ranks.mean(torch.stack(work.gradients(batch, slots)))
                if not torch.isfinite(loss + norm):
                    found = f"the loss ({float(loss)}) or the gradient's norm ({float(norm)}) is not finite"
                    raise _bad(job, state, batch, step, found)
                factor = factor_of(step, config)
                work.move(factor, slots, ids)
                state.ema.update(step)
                state.loss_sum, state.since, taken = state.loss_sum + loss, state.since + 1, taken + 1

            # Log and save.
            done = step + 1
            if batch is not None and (done % config.log_every == 0 or done == config.steps):
                mean = float(state.loss_sum) / state.since
                seconds = time.monotonic() - started
                metrics = {
                    "step": done, "images": done * config.batch, "loss": mean, "lr": config.lr * factor,
                    "gradient_norm": float(norm), "images_per_second": taken * config.batch / seconds,
                }  # fmt: skip
                job.run.log(metrics)
                if writer is not None:
                    for name, value in metrics.items():
                        writer.add_scalar(name, value, done)
                state.loss_sum, state.since = torch.zeros((), device=device), 0
                started, taken = time.monotonic(), 0
                track.note = f"loss {mean:.4f}"
            track.advance(config.batch)
            stopping = ranks.most(stop[0] if stop else 0)
            if done % save_every == 0 or done == config.steps or stopping:
                if fault := ranks.word(state.fault()):
                    raise _bad(job, state, batch, step, fault)
                saver.save(done, state.tensors(), last=done == config.steps)
            saver.check()
            if stopping and done < config.steps:
                saver.settle()
                ranks.wait()
                raise Interrupted(
                    stopping,
                    f"stopped at step {done} of {config.steps}, saved; to resume, run the same command again.",
                )
    saver.settle()


def _bad(job: Job, state: State, batch: Batch | None, step: int, found: str) -> BadStepError:
    """The step's capsule is written first; a step that was left out has its batch drawn for it."""
    ranks = job.run.ranks
    if batch is None:
        batch = make_batch(
            job.samples, job.objective, seed=job.config.seed, first_position=step * job.config.batch,
            batch=job.config.batch, flip=job.flip,
        )  # fmt: skip
    else:
        batch = Batch(*(ranks.rows(tensor) for tensor in batch))
    model = state.whole_model(averaged=False)
    ranks.on_first(
        lambda: write_capsule(
            job.run.folder, model, batch, step=step, found=found, objective=job.objective, config=job.config,
            flip=job.flip,
        )
    )  # fmt: skip
    return BadStepError(step, found, capsule_of(job.run.folder, step))


def _resume(state: State, run: Run, saver: Saver) -> int:
    """Take over the newest whole checkpoint, or write the first; returns the step to go on with."""
    found = run.newest()
    saver.newest = step = found[0] if found else 0
    run.metrics_until(step)
    if found is not None:
        state.load_(found[1])
        if step:
            say(f"resuming at step {step}")
        return step
    # What a rollback before the first checkpoint goes back to; and a full disk is found before an hour of work.
    saver.save(0, state.tensors())
    saver.settle()  # loader processes are forked from here on: not while a thread runs
    return 0


@contextlib.contextmanager
def _stop_signals(*, insistent: bool) -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM; a second one acts at once, where it is a person's who insists.

    Of several ranks each may get the person's and the launcher's.
    """
    stop: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread
        return

    def note(signum: int, frame: Any) -> None:
        stop.append(signum)
        say("finishing the step, then saving ...")
        for s, handler in before.items() if insistent else ():
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
