"""kindiff: KIND for diffusion transformers. Names are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kindiff.components import Components, decompose, factorize, load_components, save_components
    from kindiff.config import (
        AdaptConfig,
        DataConfig,
        DiTConfig,
        KindConfig,
        PretrainConfig,
        RivalConfig,
        SampleConfig,
        TrainConfig,
        TransferConfig,
    )
    from kindiff.models import DiT
    from kindiff.pipeline import DiTPipeline
    from kindiff.train import adapt, pretrain, transfer

__version__ = "0.1.0"

_HOME = {
    "AdaptConfig": "config",
    "Components": "components",
    "DataConfig": "config",
    "DiT": "models",
    "DiTConfig": "config",
    "DiTPipeline": "pipeline",
    "KindConfig": "config",
    "PretrainConfig": "config",
    "RivalConfig": "config",
    "SampleConfig": "config",
    "TrainConfig": "config",
    "TransferConfig": "config",
    "adapt": "train",
    "decompose": "components",
    "factorize": "components",
    "load_components": "components",
    "pretrain": "train",
    "save_components": "components",
    "transfer": "train",
}

__all__ = [
    "AdaptConfig",
    "Components",
    "DataConfig",
    "DiT",
    "DiTConfig",
    "DiTPipeline",
    "KindConfig",
    "PretrainConfig",
    "RivalConfig",
    "SampleConfig",
    "TrainConfig",
    "TransferConfig",
    "__version__",
    "adapt",
    "decompose",
    "factorize",
    "load_components",
    "pretrain",
    "save_components",
    "transfer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kindiff' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kindiff.{_HOME[name]}"), name)
