"""What a training run carries from step to step, and how checkpoints of it are written off the critical path."""

from __future__ import annotations

import copy
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from kindiff.config import TrainConfig
from kindiff.models.dit import DiT
from kindiff.parallel import Ranks
from kindiff.progress import say
from kindiff.train.ema import Ema
from kindiff.train.optimiser import Optimiser
from kindiff.train.run import Run
from kindiff.train.sharding import held_as, is_spread, local, spread, whole


@dataclass(kw_only=True)
class State:
    """Model, optimiser, average, and the running sum of the log."""

    model: DiT
    module: nn.Module
    """What a step calls: the model, or what spreads it over ranks."""
    shell: DiT
    """The model without its numbers."""
    optimiser: Optimiser
    ema: Ema
    loss_sum: Tensor
    """Sum of the losses since the last line of metrics.jsonl."""
    since: int = 0
    """Steps in that sum."""

    @staticmethod
    def fresh(model: DiT, config: TrainConfig, device: torch.device, ranks: Ranks) -> State:
        """The state before step 0; the model is trained in place."""
        numberless = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
            for p in model.parameters()
        }
        shell = copy.deepcopy(model, numberless)
        if config.compile:
            # torch.compile itself looks at what goes into a block.
            warnings.filterwarnings(
                "ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning
            )
            for block in model.blocks:  # one compilation serves them all
                block.compile(dynamic=False)
        return State(
            shell=shell,
            module=spread(model, config.parallel, device, ranks),  # in place, where it is: before all below
            model=model,
            optimiser=Optimiser(model, config, alone=ranks.count == 1),
            ema=Ema(model, config.ema),
            loss_sum=torch.zeros((), device=device),
        )

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All of it by group and name, for a checkpoint."""
        log = {"loss_sum": self.loss_sum, "since": torch.tensor(self.since)}
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.average,
            "optimiser": self.optimiser.tensors(),
            "log": log,
        }

    def load_(self, tensors: Mapping[str, dict[str, Tensor]]) -> None:
        """Take over what a checkpoint holds, in place."""
        own = self.model.state_dict()
        self.model.load_state_dict(
            {name: held_as(tensor, own.get(name, tensor)) for name, tensor in tensors["model"].items()}
        )
        self.ema.load_(tensors["ema"])
        self.optimiser.load_(tensors["optimiser"])
        self.loss_sum = tensors["log"]["loss_sum"].to(self.loss_sum.device)
        self.since = int(tensors["log"]["since"])

    @torch.no_grad()
    def whole_model(self, *, averaged: bool) -> DiT:
        """The model as one process has it, with the averaged parameters or the present ones; every rank must ask.

        It may share memory with this state.
        """
        tensors = self.model.state_dict() | (self.ema.average if averaged else {})
        model = copy.deepcopy(self.shell)
        model.load_state_dict({name: whole(tensor) for name, tensor in tensors.items()}, assign=True)
        return model

    def fault(self) -> str:
        """The first tensor that, on this rank, holds a number which is not finite, in words; empty for none."""
        for group, tensors in self.tensors().items():
            for name, tensor in ((name, local(tensor)) for name, tensor in tensors.items()):
                # A sum needs no second tensor; only where it is not finite is it worth looking at each number.
                if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
                    return f"{name} ({group}) holds a number that is not finite"
        return ""


class Saver:
    """Writes checkpoints in a thread; training waits for a copy of the tensors alone.

    A save waits for the one before it. A failure is raised at the next call, or when the block ends. Every rank must
    call save, settle and keep_up at the same steps. The first writes whole tensors; with `sharded` each its pieces,
    which the first makes a checkpoint when the save is settled.
    """

    def __init__(self, run: Run, *, sharded: bool = False) -> None:
        self.run = run
        self.sharded = sharded and run.ranks.count > 1
        self.newest = 0
        """Step of the newest whole checkpoint."""
        self.waits: list[float] = []
        """Seconds that training stood still, a number a checkpoint."""
        self._parts: tuple[int, bool] | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.settle() if error is None else self.wait()
        except BaseException as failure:
            if error is None:
                raise
            if failure is not error:
                say(f"the last checkpoint was not written: {failure}")

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], *, last: bool = False) -> None:
        """Copy the tensors and start to write them; `last`: no older checkpoint is kept beside it."""
        began = time.monotonic()
        self.settle()
        copies: dict[str, dict[str, Tensor]] = {group: {} for group in tensors}
        for group, some in tensors.items():
            for name, tensor in some.items():
                one = tensor.detach() if self.sharded else whole(tensor.detach())
                if self.run.ranks.first or is_spread(one):
                    copies[group][name] = local(one).to("cpu", copy=True)
        if self.sharded:
            self._parts = (step, last)
        elif not self.run.ranks.first:
            return
        self._thread = threading.Thread(
            target=self._write, args=(step, copies, last), name=f"checkpoint {step}"
        )
        self._thread.start()
        self.waits.append(time.monotonic() - began)

    def keep_up(self, done: int, most: int) -> None:
        """Wait for the running save, where a kill during the step after `done` would cost more than `most` steps."""
        if done - self.newest >= most:
            self.settle()

    def settle(self) -> None:
        """Until the running save has ended and, on every rank, is a checkpoint."""
        self.wait()
        if self._parts is not None:
            (step, last), self._parts = self._parts, None
            self.run.ranks.wait()
            self.run.ranks.on_first(lambda: self.run.put_together(step, last=last))
            self.newest = step

    def check(self) -> None:
        """Raise the failure of a save that has ended; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until this rank's running save has ended; raises its failure, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], last: bool) -> None:
        try:
            if self.sharded:
                self.run.save_part(step, tensors)
            else:
                self.run.save(step, tensors, last=last)
                self.newest = step
        except BaseException as error:
            self._error = error
