"""Frozen, typed configs (standard library only) and the strict reader of recipes.

Every field's docstring is its help text on the command line. A part receives its own config, never the whole.
"""

from kindiff.config.reading import from_dict, load_recipe, to_dict, with_defaults
from kindiff.config.rivals import AdaptConfig, RivalConfig
from kindiff.config.runs import (
    DataConfig,
    EncodeConfig,
    ObjectiveConfig,
    Precision,
    PretrainConfig,
    SampleConfig,
    TrainConfig,
    TransferConfig,
)
from kindiff.config.shapes import (
    DIT_SIZES,
    MATRICES,
    AutoencoderConfig,
    BackboneConfig,
    DesignConfig,
    DiTConfig,
    KindConfig,
    Share,
)

__all__ = [
    "DIT_SIZES",
    "MATRICES",
    "AdaptConfig",
    "AutoencoderConfig",
    "BackboneConfig",
    "DataConfig",
    "DesignConfig",
    "DiTConfig",
    "EncodeConfig",
    "KindConfig",
    "ObjectiveConfig",
    "Precision",
    "PretrainConfig",
    "RivalConfig",
    "SampleConfig",
    "Share",
    "TrainConfig",
    "TransferConfig",
    "from_dict",
    "load_recipe",
    "to_dict",
    "with_defaults",
]
