"""kindiff: KIND for diffusion transformers. Names are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kindiff.components import (
        Components as Components,
        decompose as decompose,
        factorize as factorize,
        load_components as load_components,
        save_components as save_components,
    )
    from kindiff.config import (
        DiTConfig as DiTConfig,
        KindConfig as KindConfig,
        PretrainConfig as PretrainConfig,
        SampleConfig as SampleConfig,
        TransferConfig as TransferConfig,
    )
    from kindiff.models import DiT as DiT
    from kindiff.pipeline import DiTPipeline as DiTPipeline
    from kindiff.train import pretrain as pretrain, transfer as transfer

__version__ = "0.1.0"

_HOME = {
    "Components": "components",
    "DiT": "models",
    "DiTConfig": "config",
    "DiTPipeline": "pipeline",
    "KindConfig": "config",
    "PretrainConfig": "config",
    "SampleConfig": "config",
    "TransferConfig": "config",
    "decompose": "components",
    "factorize": "components",
    "load_components": "components",
    "pretrain": "train",
    "save_components": "components",
    "transfer": "train",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kindiff' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kindiff.{_HOME[name]}"), name)
