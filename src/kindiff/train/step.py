"""One step of training: the gradients of a batch, and the move along them; on one GPU recorded, where asked for.

A small model's step on a GPU is hundreds of short operations, and the host is slower to name them than the card to do
them. Recorded as a CUDA graph they are started all at once. Two graphs, since between them training looks at the loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kindiff.components.operators import TRITON
from kindiff.config import TrainConfig
from kindiff.data.batches import Batch
from kindiff.diffusion import Loss
from kindiff.runtime import autocast
from kindiff.train.apart import padded
from kindiff.train.optimiser import Optimiser
from kindiff.train.sharding import unshared, whole

WARM = 3
"""Plain calls before a recording: kernels compile and the optimiser makes its moments."""


class Recorded:
    """A function of tensors on a GPU: called plainly a few times, then recorded as a CUDA graph and replayed.

    Its inputs must keep their shapes. The results of a replay stand in the same tensors as those of the one before.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], device: torch.device) -> None:
        self.function, self.device = function, device
        self.stream = torch.cuda.Stream(device)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.outputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        with torch.cuda.device(self.device):
            if self.calls <= WARM:
                here = torch.cuda.current_stream()
                self.stream.wait_stream(here)
                with torch.cuda.stream(self.stream):
                    outputs = self.function(*inputs)
                here.wait_stream(self.stream)
                return outputs
            if self.graph is None:
                self.inputs = tuple(tensor.clone() for tensor in inputs)
                graph = torch.cuda.CUDAGraph()
                # Only this thread records: another may be writing a checkpoint.
                with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                    self.outputs = self.function(*self.inputs)
                self.graph = graph
            for own, given in zip(self.inputs, inputs, strict=True):
                own.copy_(given, non_blocking=True)
            self.graph.replay()
        return self.outputs


class Step:
    """A step of a module (what a step calls: a model, or what spreads it over ranks) by an optimiser.

    With config.record, a whole model on a GPU and Triton both halves are recorded.
    """

    def __init__(self, module: nn.Module, optimiser: Optimiser, loss: Loss, config: TrainConfig) -> None:
        self.module, self.optimiser, self.loss, self.config = module, optimiser, loss, config
        first = optimiser.parameters[0]
        self.device = first.device
        recorded = config.record and first.is_cuda and optimiser.alone and TRITON
        self._recorded = (
            tuple(Recorded(half, self.device) for half in (self._gradients, self._move)) if recorded else None
        )
        self._places: list[Tensor] = []
        self._replay: tuple[Recorded, ...] | None = None
        """What this step is done by, if not plainly: a batch without any tailor is."""

    def gradients(self, batch: Batch, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Of a batch on the device, clipped: its mean loss and the norm that the gradients had.

        slots: the tailors that it trains, on the host. Gradients are the means over all ranks, the loss is this one's.
        """
        self._replay = self._recorded if len(slots) or not self.optimiser.tailors.banks else None
        fixed = self.config.compile or self._recorded is not None
        places = self.optimiser.places(slots, len(batch.ids_B) if fixed else 0)
        self._places = [tensor.to(self.device, non_blocking=True) for tensor in places]
        run = self._gradients if self._replay is None else self._replay[0]
        loss, norm = run(*batch, *self._places)
        return loss, norm

    def move(self, factor: float, slots: Tensor, ids: Tensor) -> None:
        """Along the gradients, at `factor` times the peak learning rates; slots and ids (each once) as in Optimiser."""
        if self._replay is None:
            self.optimiser.step(factor=factor, slots=slots, ids=ids)
            return
        slots = self._places[0] if self._places else padded(slots, self.config.batch)
        inputs = (torch.tensor(factor), slots, padded(ids, self.config.batch))
        self._replay[1](*(tensor.to(self.device, non_blocking=True) for tensor in inputs))

    def _gradients(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        batch, places = Batch(*tensors[: len(Batch._fields)]), tensors[len(Batch._fields) :]
        with self.optimiser.at_places(*places):
            loss = self._loss(batch)
        return loss, whole(self.optimiser.clip(self.config.clip))

    def _loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch; its gradients are added to the parameters'."""
        config, device = self.config, self.device
        total = torch.zeros((), device=device)
        parts = [
            Batch(*tensors) for tensors in zip(*(t.chunk(config.accumulate) for t in batch), strict=True)
        ]
        for part in parts:
            with (
                unshared(self.module, part is not parts[-1]),
                autocast(device, config.precision),
            ):
                per_sample = self.loss(
                    lambda x, t, part=part: self.module(x, t, part.ids_B, part.gate_ids_B),  # type: ignore[misc]
                    part.x_BCHW, part.noise_BCHW, part.u_B,
                )  # fmt: skip
                loss = per_sample.mean() / len(parts)
            with unshared(self.module, part is not parts[-1]):
                loss.backward()
            total = total + loss.detach()
        return total

    def _move(self, factor: Tensor, slots: Tensor, ids: Tensor) -> tuple[()]:
        self.optimiser.step(factor=factor, slots=slots, ids=ids)
        return ()
