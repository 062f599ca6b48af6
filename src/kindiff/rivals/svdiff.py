"""SVDiff (Han et al. 2023): of each matrix's SVD only the singular values train.

The published spectral shift is relu(sigma + delta); sigma itself trains here, without the relu.
"""

from __future__ import annotations

from torch import Tensor, nn

from kindiff.components import ComponentLinear, factorize
from kindiff.config import KindConfig, RivalConfig
from kindiff.models.dit import DiT
from kindiff.rivals.base import CLASS_ROWS, Rival


def _wrap(model: DiT, config: RivalConfig, seed: int) -> DiT:
    full_rank = model.config.width  # of all six matrices: the MLP's are taller or wider
    new = factorize(model, KindConfig(learngene_rank=full_rank, tailor_rank=0, init="svd"))
    singular_values = {f"{name}.sigma" for name, _ in new.named_matrices()}
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(name in singular_values or name == CLASS_ROWS)
    return new


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer, ComponentLinear)
    return layer.merged_weight()


SVDIFF = Rival(wrap=_wrap, weight=_weight, keeps=1e-5)
