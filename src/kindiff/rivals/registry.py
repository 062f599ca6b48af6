"""Every rival by name, and the two things that are done with one."""

from __future__ import annotations

import torch

from kindiff.classes import ClassSet
from kindiff.config import RivalConfig
from kindiff.models.dit import DiT
from kindiff.rivals import layers, svdiff, tuners, whole
from kindiff.rivals.base import Rival, densified, for_classes

RIVALS: dict[str, Rival] = {
    "scratch": whole.SCRATCH,
    "full": whole.FULL,
    "embedding": whole.EMBEDDING,
    "lora": tuners.LORA,
    "dora": tuners.DORA,
    "pissa": tuners.PISSA,
    "oft": tuners.OFT,
    "boft": tuners.BOFT,
    "loha": tuners.LOHA,
    "lokr": tuners.LOKR,
    "vera": tuners.VERA,
    "hra": tuners.HRA,
    "svdiff": svdiff.SVDIFF,
    "heur-lg": layers.HEUR_LG,
    "auto-lg": layers.AUTO_LG,
    # Full fine-tuning, of a base that was pre-trained under the method's constraint (learngenes.py).
    "tleg": whole.FULL,
    "fine": whole.FULL,
    "wave": whole.FULL,
}


def start(base: DiT, classes: ClassSet, config: RivalConfig, *, seed: int) -> DiT:
    """The model that a rival trains on new classes, a function of its arguments; the base is not changed.

    What trains are the parameters that require gradients, the class embedding's rows always among them. UsageError
    when the base is made of components or the method cannot have these settings on it; ImportError that names the
    extra where peft is needed and missing.
    """
    model = for_classes(base, classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RIVALS[config.method].wrap(model, config, seed)


def merged(model: DiT, config: RivalConfig) -> DiT:
    """A trained model as a plain dense DiT, which costs what the base does; the trained one is not changed."""
    return densified(model, RIVALS[config.method].weight)
