"""Transfer: new classes on frozen learngenes, by training only fresh tailors and class embeddings."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kindiff.components import Components, decompose, load_autoencoder, load_components, mixture
from kindiff.components.build import check_rank
from kindiff.config import DiTConfig, ObjectiveConfig, TransferConfig
from kindiff.data import open_samples
from kindiff.data.sets import SampleSet
from kindiff.diffusion import loss_of
from kindiff.errors import UsageError
from kindiff.models.dit import DiT
from kindiff.parallel import joined
from kindiff.pipeline import DiTPipeline
from kindiff.progress import Track, say
from kindiff.randomness import Purpose, stream
from kindiff.runtime import settled
from kindiff.train.loop import check_batch, fit
from kindiff.train.run import Run, is_finished

PROBES = 32
"""Images of a new class on which the existing tailors are compared."""


def transfer(parts_directory: str | Path, config: TransferConfig, out: str | Path) -> DiTPipeline:
    """Teach the parts new classes, into the run directory `out` (or go on with the run that is there).

    The model of the new classes is returned and written to out/model; `decompose` gives its tailors. Raises
    UsageError when the images do not fit the parts or `out` holds a run with other settings. Under torchrun its ranks
    train together.
    """
    config = replace(config, train=settled(config.train))
    with joined() as ranks:
        samples = ranks.in_turn(lambda: open_samples(config.data))
        parts = load_components(parts_directory, classes=None if config.init == "nearest" else ())
        check_fit(parts.config, samples)
        description = {
            "command": "transfer",
            "config": config,
            "data": samples.sha256,
            "learngenes": parts.learngene_hash,
        }
        # The model before the run's directory: a request that cannot be met leaves nothing behind.
        model = None
        if not is_finished(out):
            check_batch(config.train, ranks)
            model = model_to_train(parts, samples, config)
        with Run(Path(out), description, ranks) as run:
            if model is None:
                say(f"{run.folder} is finished already")
                return DiTPipeline.from_pretrained(run.model)
            model = fit(model, samples, transfer_objective(parts.config), config.train, run, config.data.flip)
            if config.trains == "mixture":
                model = decompose(model).recombine(tailor_rank=config.rank, layers="factored")
            trained = DiTPipeline(model, load_autoencoder(parts_directory))
            ranks.on_first(lambda: trained.save_pretrained(run.model))
            return DiTPipeline.from_pretrained(run.model)


def transfer_objective(shape: DiTConfig) -> ObjectiveConfig:
    """What fresh tailors on the learngenes of a model of this shape learn to predict.

    Learngenes do not train, so a sample without its tailor would teach nothing; where the tailor stays on without a
    label, some are trained so.
    """
    usual = ObjectiveConfig(kind=shape.objective, null_gate=shape.null_gate, gate_dropout=0.0)
    return usual if shape.null_gate == "class" else replace(usual, label_dropout=0.0)


def check_start(config: TransferConfig, known: int, shape: DiTConfig) -> None:
    """UsageError unless parts of this many known classes and this shape can start what the config asks for."""
    for matrix in config.targets:
        check_rank(config.rank, matrix, shape, what="tailor")
    if config.init == "nearest" and not known:
        raise UsageError("no tailor to start from: these parts hold learngenes only; set init fresh.")
    if config.trains == "mixture" and config.mixes > known:
        raise UsageError(
            f"a mixture of {config.mixes} tailors is asked for and the parts hold {known}; set mixes to that or less."
        )


def model_to_train(parts: Components, samples: SampleSet, config: TransferConfig) -> DiT:
    """The parts' learngenes with fresh tailors for the samples' classes, as the config asks for them."""
    check_start(config, len(parts.classes), parts.config)
    mixes = config.mixes if config.trains == "mixture" else 0
    found = nearest_classes(parts, samples, seed=config.train.seed) if config.init == "nearest" else {}
    if mixes:
        nearest = {name: names[:mixes] for name, names in found.items()}
        return mixture(parts, nearest, targets=config.targets, train_also=config.train_also)
    return parts.with_new_tailors(
        samples.classes.names,
        rank=config.rank,
        share=config.share,
        targets=config.targets,
        nearest={name: names[0] for name, names in found.items()},
        train_also=config.train_also,
        seed=config.train.seed,
    )


@torch.inference_mode()
def nearest_classes(parts: Components, samples: SampleSet, *, seed: int) -> dict[str, list[str]]:
    """For each new class the existing ones, first those whose tailors denoise its images best (lowest loss).

    All classes are compared on the same images, noise and timesteps, so the choice is a function of its
    arguments.
    """
    model = parts.recombine().eval()
    loss = loss_of(parts.config)
    chosen: dict[str, list[str]] = {}
    with Track("finding the nearest tailors", len(samples.classes), unit="classes") as track:
        for c, name in enumerate(samples.classes.names):
            indices = np.flatnonzero(samples.labels == c)[:PROBES]
            x_0 = torch.from_numpy(samples.fetch(indices, np.zeros(len(indices), bool)))
            draws = stream(seed, Purpose.FOLD, c)
            noise = torch.from_numpy(draws.standard_normal(x_0.shape, dtype=np.float32))
            u_B = torch.from_numpy(draws.random(len(x_0), dtype=np.float32))
            losses = []
            for i in range(len(parts.classes)):
                ids = torch.full((len(x_0),), i)
                predict = partial(_predict, model, ids)
                losses.append(float(loss(predict, x_0, noise, u_B).mean()))
            chosen[name] = [parts.classes[i] for i in np.argsort(losses, kind="stable")]
            track.advance(1)
    return chosen


def _predict(model: DiT, ids_B: torch.Tensor, x: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    return model(x, t_B, ids_B)


def check_fit(trained: DiTConfig, samples: SampleSet, *, what: str = "parts were") -> None:
    """UsageError unless the samples are of the shape and the autoencoder that something (`what`) was trained on."""
    wanted = (trained.input_size, trained.channels, trained.autoencoder)
    if (samples.size, samples.channels, samples.autoencoder_hash) != wanted:
        raise UsageError(
            f"the images are {samples.size} x {samples.size} with {samples.channels} channels, the {what} "
            f"trained on {wanted[0]} x {wanted[0]} with {wanted[1]}"
            + (" (and another autoencoder)" if samples.autoencoder_hash != wanted[2] else "")
            + "; set data.size, or use latents of the same autoencoder."
        )
