"""Heur-LG and Auto-LG: some whole blocks are inherited, random ones stand in for the others, everything trains.

Our reading of both (docs/rivals.md): an inherited block keeps its place, and what stands outside the blocks is
inherited too.

B batch, T tokens, D width, N = B T rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kindiff.config import RivalConfig
from kindiff.diffusion import loss_of
from kindiff.errors import UsageError
from kindiff.models.dit import DiT
from kindiff.rivals.base import Rival


def _heuristic(model: DiT, config: RivalConfig, seed: int) -> DiT:
    depth = model.config.depth
    return _inherit(model, range(depth - _at_most(config.inherit, depth), depth))


def _automatic(model: DiT, config: RivalConfig, seed: int) -> DiT:
    depth = model.config.depth
    if not config.blocks:
        raise UsageError(
            "auto-lg chooses its blocks on the data, as `kindiff adapt` does; here, name them with blocks."
        )
    _at_most(max(config.blocks) + 1, depth)
    return _inherit(model, config.blocks)


def _at_most(count: int, depth: int) -> int:
    if count > depth:
        raise UsageError(
            f"{count} blocks are to be inherited or counted and the base has {depth}; ask for fewer."
        )
    return count


def _inherit(model: DiT, blocks: Sequence[int]) -> DiT:
    random = DiT(model.config, classes=model.classes)
    for i in range(model.config.depth):
        if i not in blocks:
            model.blocks[i] = random.blocks[i]
    return model


HEUR_LG = Rival(wrap=_heuristic)
AUTO_LG = Rival(wrap=_automatic)


@torch.no_grad()
def most_similar_blocks(
    base: DiT, descendant: DiT, x_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor, *, count: int
) -> tuple[int, ...]:
    """The blocks of the base that do most nearly what some block of a (pseudo-)descendant does, in order.

    Similarity is linear CKA (Kornblith et al. 2019) of what the blocks add to the tokens, on the same noisy images
    without a class.
    """
    own = [_rows(block) for block in _changes(base, x_BCHW, noise_BCHW, u_B)]
    other = [_rows(block) for block in _changes(descendant, x_BCHW, noise_BCHW, u_B)]
    scores = torch.tensor([max(_cka(a, b) for b in other) for a in own])
    best = scores.argsort(descending=True, stable=True)[: _at_most(count, len(own))]
    return tuple(sorted(best.tolist()))


def _changes(model: DiT, x_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor) -> list[Tensor]:
    """What each block adds to its input, (B, T, D)."""
    changes: list[Tensor] = []

    def note(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        changes.append(output - inputs[0])

    handles = [block.register_forward_hook(note) for block in model.blocks]
    ids_B = torch.full((len(x_BCHW),), model.classes.null_id)
    loss_of(model.config)(lambda x, t: model(x, t, ids_B), x_BCHW, noise_BCHW, u_B)
    for handle in handles:
        handle.remove()
    return changes


def _rows(change_BTD: Tensor) -> Tensor:
    rows_ND = change_BTD.flatten(0, 1).double()
    return rows_ND - rows_ND.mean(dim=0)


def _cka(a_ND: Tensor, b_ND: Tensor) -> float:
    """Linear CKA of centred rows; 0 where a block adds nothing."""
    scale = (a_ND.T @ a_ND).norm() * (b_ND.T @ b_ND).norm()
    return float((a_ND.T @ b_ND).square().sum() / scale) if scale else 0.0
