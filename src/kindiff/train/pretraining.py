"""Pre-training: a decomposable (or, for the rivals, a dense) model from images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kindiff.config import PretrainConfig
from kindiff.data import open_samples
from kindiff.data.sets import SampleSet
from kindiff.models.dit import DiT
from kindiff.parallel import joined
from kindiff.pipeline import DiTPipeline
from kindiff.progress import say
from kindiff.rivals import LEARNGENE, densified, save_learngene
from kindiff.rivals.learngenes import BANKS
from kindiff.runtime import settled
from kindiff.train.loop import check_batch, fit
from kindiff.train.run import Run, is_finished
from kindiff.train.starting import init_hash, starting_model


def new_model(config: PretrainConfig, samples: SampleSet) -> DiT:
    """The model of a config at step 0: a function of the config, the data's shape and classes, and the seed."""
    shape = config.model.build(
        input_size=samples.size,
        channels=samples.channels,
        num_classes=len(samples.classes),
        objective=config.objective.kind,
        schedule=config.objective.schedule,
        null_gate=config.objective.null_gate,
        autoencoder=samples.autoencoder_hash,
    )
    return starting_model(config, shape, samples.classes)


def pretrain(config: PretrainConfig, out: str | Path) -> DiTPipeline:
    """Pre-train into the run directory `out`, or go on with the run that is there; returns the EMA model.

    The finished model is also written to out/model; of method tleg, fine or wave it is the dense model that
    out/learngene makes. Raises UsageError when `out` holds a run with other settings, and what `fit` and `open_samples`
    raise. Under torchrun its ranks train together.
    """
    config = replace(config, train=settled(config.train))
    with joined() as ranks:
        if not is_finished(out):
            check_batch(config.train, ranks)
        samples = ranks.in_turn(lambda: open_samples(config.data))
        model = new_model(config, samples)
        description = {"command": "pretrain", "config": config, "data": samples.sha256}
        with Run(Path(out), description | {"init": init_hash(config)}, ranks) as run:
            if not run.finished:
                trained = fit(model, samples, config.objective, config.train, run, config.data.flip)
                ranks.on_first(lambda: _write(trained, samples, config, run))
            else:
                say(f"{run.folder} is finished already")
            return DiTPipeline.from_pretrained(run.model)


def _write(trained: DiT, samples: SampleSet, config: PretrainConfig, run: Run) -> None:
    if config.method in BANKS:
        save_learngene(trained, config.method, run.folder / LEARNGENE)
        trained = densified(trained)
    DiTPipeline(trained, samples.autoencoder()).save_pretrained(run.model)
