"""Adapting: a dense model learns new classes with one of the rivals that KIND is compared with."""

from __future__ import annotations

from pathlib import Path

from kindiff import checkpoint
from kindiff.components import load_autoencoder
from kindiff.config import AdaptConfig, ObjectiveConfig, to_dict
from kindiff.data import open_samples
from kindiff.data.sets import SampleSet
from kindiff.errors import UsageError
from kindiff.models.dit import DiT
from kindiff.pipeline import DiTPipeline
from kindiff.progress import say
from kindiff.rivals import merged, save_adapter, start
from kindiff.train.loop import fit
from kindiff.train.run import Run, is_finished

LABEL_DROPOUT = 0.1
"""Rivals change the network that guidance's null pass runs through, so that pass is trained, as in pre-training."""


def adapt(
    base_directory: str | Path, config: AdaptConfig, out: str | Path, *, samples: SampleSet | None = None
) -> DiTPipeline:
    """Teach a dense model new classes, into the run directory `out` (or go on with the run that is there).

    The merged, dense model is returned and written to out/model, what trained to out/adapter. samples: the images,
    where they are open already; None to open config.data. Raises UsageError when the images do not fit the base,
    the rival cannot stand on it, or `out` holds a run with other settings.
    """
    samples = open_samples(config.data) if samples is None else samples
    base = DiT.from_pretrained(base_directory)
    _check_fit(base, samples)
    description = {
        "command": "adapt",
        "config": to_dict(config),
        "data": samples.sha256,
        "base": checkpoint.hash_tensors(base.state_dict()),
    }
    # The model before the run's directory: a request that cannot be met leaves nothing behind.
    seed = config.train.seed
    model = None if is_finished(out) else start(base, samples.classes, config.rival, seed=seed)
    run = Run(Path(out), description)
    if model is None:
        say(f"{run.folder} is finished already")
        return DiTPipeline.from_pretrained(run.model)
    objective = ObjectiveConfig(kind=base.config.objective, label_dropout=LABEL_DROPOUT, gate_dropout=0.0)
    trained = fit(model, samples, objective, config.train, run, config.data.flip)
    save_adapter(trained, base, config.rival, run.folder / "adapter", seed=seed)
    DiTPipeline(merged(trained, config.rival), load_autoencoder(base_directory)).save_pretrained(run.model)
    return DiTPipeline.from_pretrained(run.model)


def trainable(model: DiT) -> int:
    """How many numbers of a model train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _check_fit(base: DiT, samples: SampleSet) -> None:
    wanted = (base.config.input_size, base.config.channels, base.config.autoencoder)
    if (samples.size, samples.channels, samples.autoencoder_hash) != wanted:
        raise UsageError(
            f"the images are {samples.size} x {samples.size} with {samples.channels} channels, the base was "
            f"trained on {wanted[0]} x {wanted[0]} with {wanted[1]}"
            + (" (and another autoencoder)" if samples.autoencoder_hash != wanted[2] else "")
            + "; set data.size, or use latents of the same autoencoder."
        )
