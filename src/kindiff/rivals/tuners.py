"""peft's tuners on the six matrices of every block: the library's own layers, put into a copy of the dense model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kindiff.config import MATRICES, RivalConfig
from kindiff.errors import UsageError
from kindiff.models.dit import DiT
from kindiff.rivals.base import CLASS_ROWS, Rival

TARGETS = rf"blocks\.\d+\.({'|'.join(MATRICES)})"
"""peft's target_modules, matched against whole names."""


def tuner(make: Callable[[Any, RivalConfig, int], Any], *, keeps: float) -> Rival:
    """A rival from `make`: (the peft module, settings, seed) -> peft's own config."""

    def wrap(model: DiT, config: RivalConfig, seed: int) -> DiT:
        peft = _library()
        try:
            peft.inject_adapter_in_model(make(peft, config, seed), model)
        except ValueError as error:
            raise UsageError(f"peft refuses {config.method} of rank {config.rank}: {error}") from None
        for name, parameter in model.named_parameters():
            if name == CLASS_ROWS:
                parameter.requires_grad_(True)
        return model

    return Rival(wrap=wrap, weight=_weight, keeps=keeps)


def _weight(layer: nn.Module) -> Tensor:
    """What peft merges into the layer below; the trained layer stays as it is."""
    merged: Any = copy.deepcopy(layer)
    merged.merge()
    return merged.get_base_layer().weight


def _library() -> Any:
    try:
        import peft
    except ImportError:
        raise ImportError("peft is not installed; pip install 'kindiff[peft]'.") from None
    return peft


def _lora(peft: Any, config: RivalConfig, *, dora: bool = False, init: bool | str = True) -> Any:
    return peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha or config.rank, use_dora=dora, init_lora_weights=init,
        target_modules=TARGETS,
    )  # fmt: skip


LORA = tuner(lambda peft, config, seed: _lora(peft, config), keeps=1e-5)
DORA = tuner(lambda peft, config, seed: _lora(peft, config, dora=True), keeps=1e-5)
PISSA = tuner(lambda peft, config, seed: _lora(peft, config, init="pissa"), keeps=1e-4)
