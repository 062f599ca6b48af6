"""The kernels of component matrices as torch operators: shapes, blocks, and how they are launched.

`kindiff.components.fused` says what they compute, and what the letters mean.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

FEW = (16, 32, 64)
"""Columns that a sample's tailors may fill in a tile."""
ROWS = 16
"""Learngene ranks are multiples of this."""
WHOLE = 256
"""Learngene ranks up to this pass through both factors at once: so many of a row's columns stay on the chip."""
TRITON = importlib.util.find_spec("triton") is not None
"""Torch brings it along wherever it can run on a GPU."""
TILES = {
    "through": {"BLOCK_T": 64, "BLOCK_I": 64, "BLOCK_O": 64, "STAGES_O": 3, "num_warps": 4, "num_stages": 3},
    "through, wide": {"BLOCK_T": 64, "BLOCK_I": 64, "BLOCK_O": 64, "STAGES_O": 3, "num_warps": 4, "num_stages": 2},
    "through, long": {"BLOCK_T": 128, "BLOCK_I": 64, "BLOCK_O": 128, "STAGES_O": 3, "num_warps": 8, "num_stages": 4},
    "inward": {"BLOCK_T": 128, "BLOCK_I": 64, "num_warps": 8, "num_stages": 4},
    "outward": {"BLOCK_T": 128, "BLOCK_O": 256, "BLOCK_R": 64, "num_warps": 8, "num_stages": 3},
    "weights": {"BLOCK_T": 64, "BLOCK_O": 128, "num_warps": 8, "num_stages": 4},
}  # fmt: skip
"""Rows, columns and inner numbers of a block, warps, and blocks on their way at once; chosen on an H200 (`python
benchmarks/fused.py tiles`)."""
NARROW = 192
"""Learngene ranks above this are wide to `through`: two of its programs find room at once with fewer blocks each."""
SPARE = 2048
"""Bytes of shared memory that a kernel takes beside its blocks, at most."""
PROGRAMS = 132
"""Programs of `weights`: as many as run at once on such a card, one a multiprocessor."""
# Compiled programs launch a triton_op's kernels themselves; Triton's interpreter needs a call that is not looked into.
_GPU = torch.cuda.is_available()
_op = library.triton_op if _GPU else library.custom_op


def columns_of(components: int) -> int:
    """F: the columns that M components fill."""
    return next(few for few in FEW if components <= few)


def through_tile(rank: int, width: int, features: int) -> str:
    """Which of TILES `through` takes: where most of its time is the first factor's, one with larger blocks."""
    if width > features:
        return "through, long"
    return "through" if rank <= NARROW else "through, wide"


@_op("kindiff::through", mutates_args=())
def through(
    x: Tensor, v: Tensor, v_own: Tensor, u: Tensor, u_own: Tensor, bias: Tensor | None, layers: int, keep: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (L, B, T, O) of x (B, T, I), v (L R, I), v_own (B, L M, I), u (L R, O), u_own (B, L M, O), bias (L, O); and h.

    keep: whether h is wanted; else it may be empty.
    """
    samples, tokens, width = x.shape
    rank, mine, features = len(v) // layers, v_own.shape[1] // layers, u.shape[1]
    few = columns_of(mine)
    y, h = _through_out(x, v, v_own, u, u_own, bias, layers, keep)
    if rank > WHOLE:
        _launch_inward(x, v, v_own, h, 0, layers, layers)
        for i in range(layers):
            _launch_outward(h, u, u_own, bias, y, i, 1, layers, i)
        return y, h
    a, b = _columns(rank)
    tile = _for_tokens(TILES[through_tile(rank, width, features)], tokens)
    block_t = tile["BLOCK_T"]
    inner = 2 * tile["BLOCK_I"] * (block_t + a + b + few)  # bytes of a stage of each loop
    outer = 2 * tile["BLOCK_O"] * (a + b + few)
    tile["num_stages"] = _stages(x, tile["num_stages"], inner)
    tile["STAGES_O"] = _stages(x, tile["STAGES_O"], outer, 2 * block_t * tile["BLOCK_O"])
    _kernel("through")[(samples * _parts(tokens, block_t) * layers,)](
        x, v, v_own, u, u_own, y if bias is None else bias, h, y, samples, tokens, WIDTH=width, FEATURES=features,
        RANK=rank, MINE=mine, FEW=few, LAYERS=layers, KEEP=keep, BIAS=bias is not None, BLOCK_A=a, BLOCK_B=b, **tile,
    )  # fmt: skip
    return y, h


@through.register_fake
def _through_out(
    x: Tensor, v: Tensor, v_own: Tensor, u: Tensor, u_own: Tensor, bias: Tensor | None, layers: int, keep: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    samples, tokens, _ = x.shape
    kept = samples * tokens if keep or len(v) // layers > WHOLE else 0
    h = x.new_empty(kept, len(v) + layers * columns_of(v_own.shape[1] // layers))
    return x.new_empty(layers, samples, tokens, u.shape[1]), h


@_op("kindiff::inward", mutates_args=())
def inward(xs: Sequence[Tensor], v: Tensor, own: Tensor) -> Tensor:
    """h (B T, L R + L F) of an input (B, T, I) for each of L layers; v (L R, I), own (B, L M, I)."""
    h = _inward_out(xs, v, own)
    for i, x in enumerate(xs):
        _launch_inward(x, v, own, h, i, 1, len(xs))
    return h


@inward.register_fake
def _inward_out(xs: Sequence[Tensor], v: Tensor, own: Tensor) -> Tensor:
    samples, tokens, _ = xs[0].shape
    return v.new_empty(samples * tokens, len(v) + len(xs) * columns_of(own.shape[1] // len(xs)))


@_op("kindiff::outward", mutates_args=())
def outward(h: Tensor, u: Tensor, own: Tensor, layers: int) -> Tensor:
    """y (B, T, O), the sum over layers, from h; u (L R, O), own (B, L M, O)."""
    y = _outward_out(h, u, own, layers)
    _launch_outward(h, u, own, None, y, 0, layers, layers, 0)
    return y


@outward.register_fake
def _outward_out(h: Tensor, u: Tensor, own: Tensor, layers: int) -> Tensor:
    return h.new_empty(len(own), len(h) // len(own), u.shape[1])


@_op("kindiff::weights", mutates_args=())
def weights(h: Tensor, z: Tensor, rank: int, layers: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Of `count` of the layers of h, the first at `first`, against z (B, T, O), summed over rows.

    For the learngenes in parts to be added up, (P, count R, O) fp32; for each sample's own, (B, count, F, O).
    """
    samples, tokens, features = z.shape
    few = h.shape[1] // layers - rank
    found, own = _weights_out(h, z, rank, layers, first, count)
    parts, (a, b) = len(found), _rows(rank)
    tile = dict(TILES["weights"])
    tile["num_stages"] = _stages(z, tile["num_stages"], 2 * tile["BLOCK_T"] * (tile["BLOCK_O"] + a + b + few))
    _kernel("weights")[(parts * _weights_tiles(rank, features, count),)](
        h, z, found, own, samples, _parts(samples, parts), first, TOKENS=tokens, FEATURES=features, RANK=rank,
        FEW=few, COUNT=count, LAYERS=layers, BLOCK_A=a, BLOCK_B=b, **tile,
    )  # fmt: skip
    return found, own


@weights.register_fake
def _weights_out(
    h: Tensor, z: Tensor, rank: int, layers: int, first: int, count: int
) -> tuple[Tensor, Tensor]:
    samples, _, features = z.shape
    parts = min(samples, max(1, PROGRAMS // _weights_tiles(rank, features, count)))
    parts = _parts(samples, _parts(samples, parts))  # each with a sample at least
    return (
        h.new_empty(parts, count * rank, features, dtype=torch.float32),
        h.new_empty(samples, count, h.shape[1] // layers - rank, features),
    )


def _weights_tiles(rank: int, features: int, count: int) -> int:
    return count * _parts(rank, sum(_rows(rank))) * _parts(features, TILES["weights"]["BLOCK_O"])


def _launch_inward(x: Tensor, v: Tensor, own: Tensor, h: Tensor, first: int, count: int, layers: int) -> None:
    """Of `count` of the layers, the first at `first`."""
    samples, tokens, width = x.shape
    rank, mine = len(v) // layers, own.shape[1] // layers
    few, (a, b) = columns_of(mine), _columns(rank)
    tile = _for_tokens(TILES["inward"], tokens)
    block_t = tile["BLOCK_T"]
    tile["num_stages"] = _stages(x, tile["num_stages"], 2 * tile["BLOCK_I"] * (block_t + a + b + few))
    _kernel("inward")[(samples * _parts(tokens, block_t) * count * _parts(rank, a + b),)](
        x, v, own, h, tokens, first, WIDTH=width, RANK=rank, MINE=mine, FEW=few, COUNT=count, LAYERS=layers,
        BLOCK_A=a, BLOCK_B=b, **tile,
    )  # fmt: skip


def _launch_outward(
    h: Tensor, u: Tensor, own: Tensor, bias: Tensor | None, y: Tensor, first: int, count: int, layers: int, to: int
) -> None:  # fmt: skip
    """The sum of `count` of the layers, the first at `first`, into the layer `to` of y."""
    samples, tokens, features = len(own), y.shape[-2], u.shape[1]
    rank, mine = len(u) // layers, own.shape[1] // layers
    few = columns_of(mine)
    tile = _for_tokens(TILES["outward"], tokens)
    block_t = tile["BLOCK_T"]
    few_all = 1 << (count * few - 1).bit_length()
    tile["num_stages"] = _stages(
        h, tile["num_stages"], 2 * tile["BLOCK_R"] * (block_t + tile["BLOCK_O"]),
        2 * few_all * (block_t + tile["BLOCK_O"]),
    )  # fmt: skip
    _kernel("outward")[(samples * _parts(tokens, block_t) * _parts(features, tile["BLOCK_O"]),)](
        h, u, own, y if bias is None else bias, y, samples, tokens, first, to, FEATURES=features, RANK=rank,
        MINE=mine, FEW=few, COUNT=count, LAYERS=layers, BIAS=bias is not None,
        BLOCK_M=few_all, **tile,
    )  # fmt: skip


def _for_tokens(tile: dict[str, int], tokens: int) -> dict[str, int]:
    """A block of no more rows than a sample's tokens need: its rows are one sample's."""
    return tile | {"BLOCK_T": min(tile["BLOCK_T"], max(64, 1 << (tokens - 1).bit_length()))}


def _columns(rank: int) -> tuple[int, int]:
    """A and B: powers of two that hold a rank between them; of a large one, a block of it."""
    if rank > WHOLE:
        return WHOLE, 0
    a = 1 << (rank.bit_length() - 1)
    rest = rank - a
    return a, max(ROWS, 1 << (rest - 1).bit_length()) if rest else 0


def _rows(rank: int) -> tuple[int, int]:
    """The same for rows, of which the card multiplies 64 at once."""
    a, b = _columns(rank)
    return max(64, a), max(64, b) if b else 0


def _stages(tensor: Tensor, wanted: int, stage: int, beside: int = 0) -> int:
    """Blocks that are on their way at once, of `stage` bytes each, in the shared memory that the card has."""
    return max(1, min(wanted, (_shared(tensor.device) - beside - SPARE) // stage))


@functools.cache
def _shared(device: torch.device) -> int:
    if device.type != "cuda":
        return 2**20
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _kernel(name: str) -> Any:
    from kindiff.components import kernels

    kernel = getattr(kernels, name)
    return library.wrap_triton(kernel) if _GPU else kernel


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)
