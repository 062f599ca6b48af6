"""Adapting: a dense model learns new classes with one of the rivals that KIND is compared with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kindiff import checkpoint
from kindiff.components import load_autoencoder
from kindiff.config import AdaptConfig, ObjectiveConfig, RivalConfig
from kindiff.data import open_samples
from kindiff.data.sets import SampleSet
from kindiff.errors import UsageError
from kindiff.models.dit import DiT
from kindiff.parallel import joined
from kindiff.pipeline import DiTPipeline
from kindiff.progress import say
from kindiff.rivals import LEARNGENE, densified, load_learngene, merged, save_adapter, start
from kindiff.rivals.learngenes import BANKS
from kindiff.runtime import settled
from kindiff.train.loop import check_batch, fit
from kindiff.train.preparing import choose_blocks, part_of, sigma_first
from kindiff.train.run import Run, is_finished
from kindiff.train.transferring import check_fit

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
    config = replace(config, train=settled(config.train))
    with joined() as ranks:
        if samples is None:
            samples = ranks.in_turn(lambda: open_samples(config.data))
        base = DiT.from_pretrained(base_directory)
        check_fit(base.config, samples, what="base was")
        description = {
            "command": "adapt",
            "config": config,
            "data": samples.sha256,
            "base": checkpoint.hash_tensors(base.state_dict()),
        }
        # The model before the run's directory: a request that cannot be met leaves nothing behind.
        model = learngene = None
        if not is_finished(out):
            check_batch(config.train, ranks)
            model = start(base, samples.classes, _with_blocks(config.rival), seed=config.train.seed)
            if config.rival.method in BANKS:
                learngene = _learngene_of(base, base_directory, config.rival.method)
        with Run(Path(out), description, ranks) as run:
            if model is None:
                say(f"{run.folder} is finished already")
                return DiTPipeline.from_pretrained(run.model)
            trained, rival = _train(base, model, learngene, samples, config, run)

            def write() -> None:
                save_adapter(trained, base, rival, run.folder / "adapter", seed=config.train.seed)
                autoencoder = load_autoencoder(base_directory)
                DiTPipeline(merged(trained, rival), autoencoder).save_pretrained(run.model)

            ranks.on_first(write)
            return DiTPipeline.from_pretrained(run.model)


def _train(
    base: DiT, model: DiT, learngene: DiT | None, samples: SampleSet, config: AdaptConfig, run: Run
) -> tuple[DiT, RivalConfig]:
    """The trained model, and the rival with the blocks that Auto-LG chose."""
    rival, loop, flip = config.rival, config.train, config.data.flip
    objective = ObjectiveConfig(kind=base.config.objective, label_dropout=LABEL_DROPOUT, gate_dropout=0.0)
    if _with_blocks(rival) != rival:
        blocks = choose_blocks(base, samples, objective, loop, run, count=rival.inherit, flip=flip)
        say(f"inheriting the blocks {', '.join(map(str, blocks))}")
        rival = replace(rival, blocks=blocks)
        model = start(base, samples.classes, rival, seed=loop.seed)
    first = min(round(loop.steps * rival.sigma_share), loop.steps - 1) if rival.method == "fine" else 0
    if learngene is not None and first:
        model = sigma_first(learngene, samples, objective, part_of(loop, first), run, flip)
    return fit(model, samples, objective, part_of(loop, loop.steps - first), run, flip), rival


def _with_blocks(rival: RivalConfig) -> RivalConfig:
    """Auto-LG's blocks are chosen in the run; until then any of them show whether the base can have so many."""
    if rival.method != "auto-lg" or rival.blocks:
        return rival
    return replace(rival, blocks=tuple(range(rival.inherit)))


def _learngene_of(base: DiT, base_directory: str | Path, method: str) -> DiT:
    """The constrained model that the base was written out from; UsageError when it was not."""
    folder = Path(base_directory).parent / LEARNGENE
    learngene = load_learngene(folder, method=method, depth=base.config.depth)
    if checkpoint.hash_tensors(densified(learngene).state_dict()) != checkpoint.hash_tensors(
        base.state_dict()
    ):
        raise UsageError(
            f"{base_directory} is not the model that the learngene {folder} makes; give that one."
        )
    return learngene
