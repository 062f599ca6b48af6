"""A model spread over ranks by PyTorch's own means, and its tensors as one rank holds them and as a whole.

With DDP every rank holds everything. With FSDP2 a rank holds a piece of the rows of every tensor (a DTensor), so what
works row by row or number by number works on the pieces as they are.
"""

from __future__ import annotations

import contextlib
from typing import Literal

import torch
from torch import Tensor, nn

from kindiff.models.dit import DiT
from kindiff.parallel import Ranks


def spread(model: DiT, how: Literal["ddp", "fsdp"], device: torch.device, ranks: Ranks) -> nn.Module:
    """The module to call in place of the model; its gradients are the means over the ranks. fsdp: in place."""
    if ranks.count == 1:
        return model
    if how == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks.count,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def unshared(module: nn.Module, on: bool) -> contextlib.AbstractContextManager[None]:
    """Within, where `on`, DDP leaves gradients as they are: those of all but the last micro-batch of a step.

    FSDP2 shares each micro-batch's: kept whole until the last, they would need the memory that it saves.
    """
    if on and isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its rows, or all of it; changes of it are changes of the tensor."""
    return tensor.to_local() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def first_row(tensor: Tensor) -> int:
    """The number, in the whole tensor, of the first row that this rank holds."""
    if not is_spread(tensor):
        return 0
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    return min(-(-len(tensor) // mesh.size()) * mesh.get_local_rank(), len(tensor))


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; every rank must ask for it."""
    return tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def as_rows_of(rows: Tensor, bank: Tensor) -> Tensor:
    """This rank's rows as a tensor of as many rows, in all, as a bank has, held as the bank is held."""
    if not is_spread(bank):
        return rows
    from torch.distributed.tensor import DTensor

    shape = torch.Size((len(bank), *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = bank.device_mesh, bank.placements  # type: ignore[attr-defined]
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=shape, stride=stride)


def held_as(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor that every rank has, on another's device and held as that one is held."""
    tensor = tensor.to(other.device)
    if not is_spread(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = other.device_mesh, other.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def is_spread(tensor: Tensor) -> bool:
    """Whether each rank holds a piece of the tensor's rows."""
    return hasattr(tensor, "full_tensor")
