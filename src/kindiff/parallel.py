"""Processes that work together on one run (ranks): who they are, and the few things they tell each other.

torchrun, `accelerate launch` and schedulers start the processes and name their places in the environment (RANK,
WORLD_SIZE, LOCAL_RANK). One process is the ordinary case: nothing is started and every exchange is the value itself.

B samples of one rank, N ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(hours=6)
"""How long ranks wait for one that prepares what all need; one that has ended is noticed at once."""


class RankLost(RuntimeError):
    """Another rank has ended, so this one cannot go on."""

    exit_code = 1


def place() -> tuple[int, int]:
    """This process's rank and the number of ranks, as the environment says; (0, 1) where it says nothing."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), count) if count > 1 else (0, 1)


def local_rank() -> int | None:
    """This process's number on its machine, which is its GPU's; None for a process by itself."""
    return int(os.environ.get("LOCAL_RANK", "0")) if place()[1] > 1 else None


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them. Every rank must call each exchange, in the same order."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the ranks, the same bits on each; a number that is not finite on one is so on all."""
        if self.count > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
            tensor /= self.count
        return tensor

    def most(self, value: int) -> int:
        """The largest of the ranks' numbers."""
        if self.count > 1:
            import torch
            import torch.distributed as dist

            number = torch.tensor(value)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            return int(number)
        return value

    def union(self, numbers: Tensor, size: int) -> Tensor:
        """The numbers in [0, size) that any rank has, each once, ascending, on the CPU."""
        if self.count > 1:
            import torch
            import torch.distributed as dist

            mask = torch.zeros(size, dtype=torch.uint8)
            mask[numbers.long().cpu()] = 1
            dist.all_reduce(mask, dist.ReduceOp.MAX)
            return mask.nonzero().flatten()
        return numbers

    def rows(self, tensor: Tensor) -> Tensor:
        """The (B, ...) tensors of all ranks in their order: (N B, ...)."""
        if self.count > 1:
            import torch
            import torch.distributed as dist

            parts = [torch.empty_like(tensor) for _ in range(self.count)]
            dist.all_gather(parts, tensor.contiguous())
            return torch.cat(parts)
        return tensor

    def to_first(self, tensor: Tensor | None, counts: Sequence[int]) -> list[Tensor]:
        """On the first rank the tensors of the ranks that have one, which are its lowest len(counts); else nothing.

        Rank r's has shape (counts[r], ...) and lies on the CPU; they are alike but for that.
        """
        if self.count == 1:
            return [] if tensor is None else [tensor]
        import torch.distributed as dist

        if self.first and tensor is not None:
            parts = [tensor, *(tensor.new_empty(n, *tensor.shape[1:]) for n in counts[1:])]
            for rank, part in enumerate(parts[1:], 1):
                dist.recv(part, rank)
            return parts
        if tensor is not None:
            dist.send(tensor.contiguous(), 0)
        return []

    def word(self, text: str) -> str:
        """The text of the lowest rank that has one, at most 400 bytes of it."""
        if self.count > 1:
            import torch

            content = text.encode()[:400].ljust(400, b"\0")
            for other in self.rows(torch.frombuffer(bytearray(content), dtype=torch.uint8)).view(-1, 400):
                if found := bytes(other.tolist()).rstrip(b"\0").decode(errors="ignore"):
                    return found
        return text

    def wait(self) -> None:
        """Until every rank is here."""
        self.most(0)

    def in_turn(self, make: Callable[[], T]) -> T:
        """make() on the first rank, then on the others, which find what the first one wrote."""
        made = make() if self.first else None
        self.wait()
        return make() if made is None else made

    def on_first(self, act: Callable[[], object]) -> None:
        """act() on the first rank, while the others wait."""
        if self.first:
            act()
        self.wait()


ALONE = Ranks()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that the environment names, connected: gloo between processors, NCCL between GPUs.

    A connection that is there already is used and left; it must have gloo for the CPU. RankLost when another rank ends
    within.
    """
    rank, count = place()
    if count == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    ranks, ours = Ranks(rank, count), not dist.is_initialized()
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank() or 0)
        if ours:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
        yield ranks
    except RuntimeError as error:
        own = hasattr(error, "exit_code")
        words = ("gloo", "NCCL", "onnection")
        if not own and (isinstance(error, dist.DistError) or any(word in str(error) for word in words)):
            raise RankLost(
                "another rank has ended; its message says why. To resume, run the same command again."
            ) from error
        raise
    ranks.wait()
    if ours:
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process with an exit code, as `sys.exit`; one of several ranks ends at once, once its output is out.

    DistributedDataParallel and FSDP keep gloo's threads alive after `destroy_process_group`. One that drops the last
    exchange's tensor while the interpreter is taken down ends the process by SIGABRT, after all its work was done.
    """
    if place()[1] == 1:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
