"""Batches as a pure function of the position in the run: no worker, rank or interruption changes one bit.

Shape letters: N samples of the set, B batch, C channels, H W height and width.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kindiff.classes import drop_labels
from kindiff.config import ObjectiveConfig
from kindiff.data.sets import SampleSet
from kindiff.errors import UsageError
from kindiff.randomness import Purpose, stream


class Batch(NamedTuple):
    """What one training step needs; everything random in it is already drawn."""

    x_BCHW: Tensor
    """(B, C, H, W) float32 clean samples; images are in [-1, 1]."""
    ids_B: Tensor
    """(B,) int64 class ids after label dropout."""
    gate_ids_B: Tensor
    """(B,) int64 class ids for the gate: null where the gate was dropped, and the label too (see null_gate)."""
    noise_BCHW: Tensor
    """(B, C, H, W) float32 standard normal."""
    u_B: Tensor
    """(B,) float32 in [0, 1), from which the timestep is made."""


def make_batch(
    samples: SampleSet,
    objective: ObjectiveConfig,
    *,
    seed: int,
    first_position: int,
    batch: int,
    flip: bool,
) -> Batch:
    """The samples at positions first_position .. first_position + batch - 1 of the run with this seed.

    Position p is sample `order(seed, p // N, N)[p % N]`; every epoch meets every sample once.
    """
    indices, scalars, noises, drawn = [], [], [], []
    for position in range(first_position, first_position + batch):
        epoch, place = divmod(position, len(samples))
        indices.append(order(seed, epoch, len(samples))[place])
        # The order of the draws is part of the format; scalars first: they do not depend on the shape.
        random = stream(seed, Purpose.SAMPLE, position)
        scalars.append(random.random(4, dtype=np.float32))
        noises.append(
            random.standard_normal((samples.channels, samples.size, samples.size), dtype=np.float32)
        )
        if objective.gate_labels == "shuffled":
            drawn.append(random.integers(len(samples.classes)))
    index_B = np.array(indices, dtype=np.int64)
    u_B, flip_B, label_B, gate_B = np.stack(scalars, axis=1)
    null_id = samples.classes.null_id
    ids_B = drop_labels(
        samples.labels[index_B], label_B, probability=objective.label_dropout, null_id=null_id
    )
    on_B = np.array(drawn) if drawn else samples.labels[index_B]
    if objective.null_gate == "off":
        on_B = np.where(ids_B == null_id, null_id, on_B)
    gate_ids_B = drop_labels(on_B, gate_B, probability=objective.gate_dropout, null_id=null_id)
    return Batch(
        x_BCHW=torch.from_numpy(_drawn(samples, index_B, (flip_B < 0.5) & flip, seed, first_position)),
        ids_B=torch.from_numpy(ids_B),
        gate_ids_B=torch.from_numpy(gate_ids_B),
        noise_BCHW=torch.from_numpy(np.stack(noises)),
        u_B=torch.from_numpy(u_B.copy()),
    )


def _drawn(
    samples: SampleSet, index_B: np.ndarray, flip_B: np.ndarray, seed: int, first_position: int
) -> np.ndarray:
    """Images as they are; latents drawn from their distributions: mean + deviation * noise of the position."""
    x_BCHW = samples.fetch(index_B, flip_B)
    deviation_BCHW = samples.deviations(index_B, flip_B)
    if deviation_BCHW is None:
        return x_BCHW
    streams = [stream(seed, Purpose.LATENT, first_position + i) for i in range(len(index_B))]
    return x_BCHW + deviation_BCHW * np.stack(
        [s.standard_normal(x_BCHW.shape[1:], dtype=np.float32) for s in streams]
    )


@functools.lru_cache(maxsize=4)
def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """(N,) the order of the samples in one epoch, a permutation."""
    permutation = stream(seed, Purpose.ORDER, epoch).permutation(count)
    permutation.flags.writeable = False
    return permutation


def batches(
    samples: SampleSet,
    objective: ObjectiveConfig,
    *,
    seed: int,
    first_step: int,
    steps: int,
    batch: int,
    flip: bool,
    workers: int = 0,
    rank: int = 0,
    ranks: int = 1,
    left_out: Sequence[range] = (),
) -> Iterator[Batch]:
    """The batches of steps first_step .. first_step + steps - 1 without those `left_out`, the part of one rank.

    batch is the global batch: step s has the positions s * batch .. (s + 1) * batch - 1, and rank r the r-th
    of `ranks` equal parts of them. workers is the number of loader processes (0: this process). Raises
    UsageError when the batch does not divide among the ranks.
    """
    if batch < 1 or ranks < 1 or batch % ranks or not 0 <= rank < ranks:
        raise UsageError(
            f"a batch of {batch} does not divide among {ranks} ranks; make it a multiple of {ranks}."
        )
    if workers < 0:
        raise UsageError(f"workers is {workers}; it must be 0 or more.")
    share = batch // ranks
    source = _Steps(samples, objective, seed, batch, rank * share, share, flip)
    numbers: Sequence[int] = range(first_step, first_step + steps)
    if left_out:
        numbers = [step for step in numbers if not any(step in window for window in left_out)]
    if workers == 0:
        return (source[step] for step in numbers)
    from torch.utils.data import DataLoader

    loader: DataLoader[tuple[np.ndarray, ...]] = DataLoader(
        source,  # type: ignore[arg-type]
        batch_size=None,
        sampler=numbers,
        collate_fn=_to_arrays,  # type: ignore[arg-type]  # with batch_size=None it is given one item
        num_workers=min(workers, max(1, len(numbers))),
        worker_init_fn=_leave_interrupts_to_the_parent,
        generator=torch.Generator(),  # else the loader would advance torch's global generator
    )
    return (Batch(*map(torch.from_numpy, arrays)) for arrays in loader)


@dataclass(frozen=True)
class _Steps:
    """A data set of steps, for torch's loader."""

    samples: SampleSet
    objective: ObjectiveConfig
    seed: int
    batch: int
    offset: int
    share: int
    flip: bool

    def __getitem__(self, step: int) -> Batch:
        return make_batch(
            self.samples, self.objective, seed=self.seed, first_position=step * self.batch + self.offset,
            batch=self.share, flip=self.flip,
        )  # fmt: skip


def _to_arrays(batch: Batch) -> tuple[np.ndarray, ...]:
    # Tensors would travel as shared-memory handles: scarce in containers, and a fault in every loader process
    # when the main one is terminated. Arrays go through the pipe.
    return tuple(tensor.numpy() for tensor in batch)


def _leave_interrupts_to_the_parent(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
