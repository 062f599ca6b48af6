"""Pre-training: a decomposable (or, for the rivals, a dense) model from images."""

from __future__ import annotations

from pathlib import Path

import torch

from kindiff.components import factorize
from kindiff.config import PretrainConfig, to_dict
from kindiff.data import open_samples
from kindiff.data.sets import SampleSet
from kindiff.models.dit import DiT
from kindiff.pipeline import DiTPipeline
from kindiff.progress import say
from kindiff.train.loop import fit
from kindiff.train.run import Run


def new_model(config: PretrainConfig, samples: SampleSet) -> DiT:
    """The untrained model of a config: a function of the config, the data's shape and classes, and the seed."""
    shape = config.model.build(
        input_size=samples.size,
        channels=samples.channels,
        num_classes=len(samples.classes),
        objective=config.objective.kind,
        schedule=config.objective.schedule,
        autoencoder=samples.autoencoder_hash,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = DiT(shape, classes=samples.classes)
    return model if config.method == "dense" else factorize(model, config.kind, seed=config.train.seed)


def pretrain(config: PretrainConfig, out: str | Path) -> DiTPipeline:
    """Pre-train into the run directory `out`, or go on with the run that is there; returns the EMA model.

    The finished model is also written to out/model. Raises UsageError when `out` holds a run with other
    settings, and what `fit` and `open_samples` raise.
    """
    samples = open_samples(config.data)
    model = new_model(config, samples)
    run = Run(Path(out), {"command": "pretrain", "config": to_dict(config), "data": samples.sha256})
    if not run.finished:
        trained = fit(model, samples, config.objective, config.train, run, config.data.flip)
        DiTPipeline(trained, samples.autoencoder()).save_pretrained(run.model)
    else:
        say(f"{run.folder} is finished already")
    return DiTPipeline.from_pretrained(run.model)
