"""What two of the rivals do before they train as the others do: Auto-LG finds its blocks, FINE trains sigma first.

B batch.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from kindiff.config import ObjectiveConfig, TrainConfig
from kindiff.data.sets import SampleSet
from kindiff.models.dit import DiT
from kindiff.randomness import Purpose, stream
from kindiff.rivals import densified
from kindiff.rivals.base import CLASS_ROWS, rows_of_new_classes
from kindiff.rivals.layers import most_similar_blocks
from kindiff.rivals.learngenes import with_tensors
from kindiff.train.loop import fit
from kindiff.train.run import Run

DESCENDANT_SHARE = 0.2
"""Steps of Auto-LG's pseudo-descendant, beyond the run's own, as a share of them."""
PROBES = 64
"""Images on which its blocks are compared with the base's."""


def choose_blocks(
    base: DiT,
    samples: SampleSet,
    objective: ObjectiveConfig,
    config: TrainConfig,
    run: Run,
    *,
    count: int,
    flip: bool,
) -> tuple[int, ...]:
    """Auto-LG: the blocks of the base that are most like those of a pseudo-descendant, in order.

    The pseudo-descendant is a model of `count` blocks, trained on the new images from random weights.
    """
    shape = dataclasses.replace(base.config, depth=count, num_classes=len(samples.classes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        descendant = DiT(shape, classes=samples.classes)
    few = part_of(config, max(1, round(config.steps * DESCENDANT_SHARE)))
    with Run(run.folder / "pseudo-descendant", {"command": "pseudo-descendant"}, run.ranks) as own:
        descendant = fit(descendant, samples, objective, few, own, flip)
    draws = stream(config.seed, Purpose.FOLD, 0)
    indices = draws.permutation(len(samples))[:PROBES]
    x_BCHW = torch.from_numpy(samples.fetch(indices, np.zeros(len(indices), bool)))
    noise_BCHW = torch.from_numpy(draws.standard_normal(x_BCHW.shape, dtype=np.float32))
    u_B = torch.from_numpy(draws.random(len(indices), dtype=np.float32))
    return most_similar_blocks(base, descendant, x_BCHW, noise_BCHW, u_B, count=count)


def sigma_first(
    learngene: DiT, samples: SampleSet, objective: ObjectiveConfig, config: TrainConfig, run: Run, flip: bool
) -> DiT:
    """FINE's first stage: a constrained model of which sigma trains alone (and the class rows); written out dense."""
    state = {name: tensor.detach().clone() for name, tensor in learngene.state_dict().items()}
    state[CLASS_ROWS] = rows_of_new_classes(state[CLASS_ROWS], len(samples.classes))
    shape = dataclasses.replace(learngene.config, num_classes=len(samples.classes))
    model = with_tensors(shape, samples.classes, "fine", state)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == CLASS_ROWS or name.endswith(".sigma_LR"))
    with Run(run.folder / "sigma", {"command": "sigma"}, run.ranks) as own:
        return densified(fit(model, samples, objective, config, own, flip))


def part_of(config: TrainConfig, steps: int) -> TrainConfig:
    """The loop of a part of a run: its steps, and the warm-up's share of them."""
    return dataclasses.replace(config, steps=steps, warmup=round(config.warmup * steps / config.steps))
