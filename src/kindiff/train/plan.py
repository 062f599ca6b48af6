"""What a run would do, without doing it: data, model, parameters, GMACs, memory, time (`--dry-run`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kindiff.classes import ClassSet, numbered
from kindiff.components import load_components
from kindiff.components.assembly import freeze_learngenes
from kindiff.components.build import Structure, empty, sizes_of, slots_by_share, structure_of
from kindiff.components.gates import TableGate
from kindiff.config import (
    DataConfig,
    DiTConfig,
    ObjectiveConfig,
    PretrainConfig,
    TrainConfig,
    TransferConfig,
    load_recipe,
)
from kindiff.data import open_samples
from kindiff.data.groups import read_grouping, superclass_of
from kindiff.data.sets import SampleSet
from kindiff.errors import UsageError
from kindiff.evaluate.cost import closed_macs, cost_table, total
from kindiff.models.dit import DiT
from kindiff.parallel import place
from kindiff.progress import duration
from kindiff.rivals.learngenes import BANKS, constrained
from kindiff.runtime import device_of
from kindiff.train.measuring import CPU_IMAGES, STEPS, measure
from kindiff.train.memory import free, memory
from kindiff.train.pretraining import new_model
from kindiff.train.transferring import check_fit, check_start, model_to_train, transfer_objective


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a run; `text` is what people read."""

    data: str
    """The samples, or that they are missing."""
    model: str
    """Its shape and split."""
    parameters: int
    """In all, of the finished model."""
    trainable: int
    """Those that train."""
    macs: int
    """Multiply-accumulates of one forward pass of one image."""
    dense_macs: int
    """Those of the dense model of this shape."""
    memory: dict[str, int]
    """Bytes by purpose, of one process."""
    images: int
    """Images that this process has at once."""
    training: str
    """Steps and images."""
    time: str
    """The estimate, or why there is none."""

    def text(self) -> str:
        """A line for each."""
        parts = ", ".join(f"{name} {_gib(count)}" for name, count in self.memory.items())
        saved = (self.dense_macs - self.macs) / 1e9
        rows = {
            "data": self.data,
            "model": self.model,
            "parameters": f"{self.parameters:,}, {self.trainable:,} of them train ({self.trainable / 1e6:.1f}M)",
            "GMACs": f"{self.macs / 1e9:.4f} an image, the dense model {self.dense_macs / 1e9:.4f}: "
            f"{saved:.4f} {'saved' if saved >= 0 else 'more'}",
            "memory": f"about {_gib(sum(self.memory.values()))} at {self.images} images ({parts})",
            "training": self.training,
            "time": self.time,
        }
        return "\n".join(f"{name:<11}{value}" for name, value in rows.items())


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The data of a run as far as they are known: themselves, or what the recipe says of them."""

    samples: SampleSet | None
    classes: ClassSet
    channels: int
    size: int
    autoencoder: str
    note: str


def pretrain_plan(config: PretrainConfig) -> Plan:
    """The plan of a pre-training run; raises what the run itself would raise at its start.

    Where the data are missing, the plan is made from the recipe alone and says so.
    """
    found = expected(config.data)
    if config.init and found.samples is not None:
        model = new_model(config, found.samples)
    else:
        model = outline(config, found)
    what, finished = "dense matrices", model
    if config.method in BANKS:
        finished = outline(replace(config, method="dense"), found)
    if config.method == "kind":
        what = f"learngene rank {config.kind.learngene_rank}, tailor rank {config.kind.tailor_rank}"
    on_device = (lambda device: outline(config, found, device)) if not config.init else model.to
    return _plan(
        model, what, found, config.objective, config.train, flip=config.data.flip, to_measure=on_device,
        finished=finished,
    )  # fmt: skip


def transfer_plan(parts: Path, config: TransferConfig) -> Plan:
    """The plan of a transfer. parts: a components directory, or the recipe (TOML) of a pre-training that would
    make them. Raises what the run itself would raise at its start."""
    found = expected(config.data)
    what = f"tailor rank {config.rank} for each {config.share}"
    what += f", cut from a mixture of {config.mixes}" if config.trains == "mixture" else ""
    to_measure: Callable[[torch.device], DiT] | None = None
    if parts.suffix == ".toml":
        recipe = load_recipe(parts, PretrainConfig)
        if recipe.method != "kind":
            raise UsageError(
                f"recipe {parts} trains a dense model; a transfer starts from parts of method kind."
            )
        origin = expected(recipe.data)
        shape = _shape(recipe, origin)
        if found.samples is not None and (found.size, found.channels) != (origin.size, origin.channels):
            raise UsageError(
                f"the data hold {found.channels} x {found.size} x {found.size} and the parts would be made for "
                f"{origin.channels} x {origin.size} x {origin.size}."
            )
        check_start(config, len(origin.classes), shape)
        ranks = recipe.kind.learngene_rank, recipe.kind.tailor_rank
        model = _transferred(shape, *ranks, config, found.classes)
    else:
        loaded = load_components(parts, classes=None if config.init == "nearest" else ())
        shape = loaded.config
        if found.samples is not None:
            check_fit(loaded.config, found.samples)
            model = model_to_train(loaded, found.samples, config)
            to_measure = model.to
        else:
            check_start(config, len(loaded.classes), shape)
            model = _transferred(shape, loaded.learngene_rank, loaded.tailor_rank, config, found.classes)
    objective = transfer_objective(shape)
    assert model.structure is not None
    rank, finished = model.structure["rank"], model
    if config.trains == "mixture":
        finished = _transferred(shape, rank, config.rank, replace(config, trains="components"), found.classes)
    what = f"learngene rank {rank} (frozen), {what}"
    return _plan(
        model, what, found, objective, config.train, flip=config.data.flip, to_measure=to_measure,
        finished=finished,
    )  # fmt: skip


def expected(data: DataConfig) -> Expected:
    """Open the data; where they do not exist, what the recipe says: groups or class names, latent_shape or size."""
    try:
        samples = open_samples(data)
    except FileNotFoundError as missing:
        channels, size = data.latent_shape or (3, data.size)
        names = data.classes or (read_grouping(data.groups).split(data.split) if data.groups else ())
        count = f"{len(names)} classes" if names else "one class (the recipe names none)"
        return Expected(
            samples=None, classes=ClassSet(tuple(names)) if names else numbered(1), channels=channels, size=size,
            autoencoder="", note=f"missing ({missing}) Planned for {channels} x {size} x {size} and {count}",
        )  # fmt: skip
    kind = "latents" if samples.autoencoder_hash else "images"
    note = (
        f"{len(samples):,} samples of {len(samples.classes)} classes, {samples.size} x {samples.size} "
        f"({kind}, {samples.channels} channels)"
    )
    return Expected(
        samples=samples, classes=samples.classes, channels=samples.channels, size=samples.size,
        autoencoder=samples.autoencoder_hash, note=note,
    )  # fmt: skip


def outline(config: PretrainConfig, found: Expected, device: torch.device | None = None) -> DiT:
    """The model that a recipe starts from, with any values (the true start may take minutes of SVDs), or with none
    on the meta device. UsageError for ranks, targets or superclasses that do not fit."""
    shape = _shape(config, found)
    with torch.device(device or "meta"), torch.random.fork_rng(devices=[]):
        if config.method == "dense":
            return DiT(shape, classes=found.classes)
        if config.method in BANKS:
            return constrained(shape, found.classes, config.method)
        superclasses = None
        if config.superclasses:
            superclasses = superclass_of(found.classes.names, read_grouping(config.superclasses))
        structure, table = structure_of(shape, found.classes, config.kind, superclasses)
        model = empty(shape, found.classes, structure)
        if device is not None:
            _fill_(model, table)
        return model


def _shape(config: PretrainConfig, found: Expected) -> DiTConfig:
    return config.model.build(
        input_size=found.size, channels=found.channels, num_classes=len(found.classes),
        objective=config.objective.kind, schedule=config.objective.schedule, autoencoder=found.autoencoder,
        null_gate=config.objective.null_gate,
    )  # fmt: skip


@torch.no_grad()
def _fill_(model: DiT, table: list[list[int]]) -> None:
    if isinstance(model.gate, TableGate):
        model.gate.fill_(table)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)


def _transferred(
    shape: DiTConfig, learngene_rank: int, tailor_rank: int, config: TransferConfig, classes: ClassSet
) -> DiT:
    """The model that trains at transfer, without values. tailor_rank: of the parts, for a mixture of them."""
    known, shape = shape.num_classes, replace(shape, num_classes=len(classes))
    slots, width = sizes_of(slots_by_share(len(classes), config.share))
    structure = Structure(
        rank=learngene_rank, tailor_rank=config.rank, slots=slots, gate_width=width, targets=config.targets
    )
    if config.trains == "mixture":  # of all known tailors at the most
        structure = replace(
            structure, tailor_rank=tailor_rank, slots=known, gate="mixture", gate_width=config.mixes
        )
    with torch.device("meta"):
        return freeze_learngenes(empty(shape, classes, structure), config.train_also)


def _plan(
    model: DiT,
    what: str,
    found: Expected,
    objective: ObjectiveConfig,
    config: TrainConfig,
    *,
    flip: bool,
    to_measure: Callable[[torch.device], DiT] | None,
    finished: DiT,
) -> Plan:
    """finished: what the model that trains becomes, where that is another."""
    cost, shape, device = total(cost_table(finished)), model.config, device_of(config.device)
    images = config.batch // (place()[1] * config.accumulate)
    seen = config.steps * config.batch
    epochs = "" if found.samples is None else f", {seen / len(found.samples):.1f} epochs"
    return Plan(
        data=found.note,
        model=f"width {shape.width}, depth {shape.depth}, {shape.tokens} tokens, {len(found.classes)} classes, {what}, "
        f"{shape.objective} objective",
        parameters=cost.parameters,
        trainable=total(cost_table(model)).trainable,
        macs=cost.macs,
        dense_macs=sum(closed_macs(shape).values()),
        memory=memory(model, config, images, device),
        images=images,
        training=f"{config.steps:,} steps of {config.batch}: {seen:,} images{epochs}",
        time=_time(model, found.samples, objective, config, device, flip, to_measure),
    )


def _time(
    model: DiT,
    samples: SampleSet | None,
    objective: ObjectiveConfig,
    config: TrainConfig,
    device: torch.device,
    flip: bool,
    to_measure: Callable[[torch.device], DiT] | None,
) -> str:
    if samples is None or to_measure is None:
        return f"not measured: the {'data' if samples is None else 'parts'} are missing"
    share = config.batch // place()[1]
    images = share // config.accumulate if device.type == "cuda" else min(share, CPU_IMAGES)
    needed, there = sum(memory(model, config, images, device).values()), free(device)
    if needed > 0.9 * there:
        return f"not measured: a step needs about {_gib(needed)} and {_gib(there)} are free on {device}"
    found = measure(to_measure(device), samples, objective, config, flip=flip, images=images)
    step = found.step(share, config.workers)
    plain = ", neither compiled nor recorded" if config.compile or config.record else ""
    return (
        f"{step:.3g} s a step, about {duration(step * config.steps)} in all (median of {STEPS} steps of {images} "
        f"images on {device}{plain}: loading {found.loading:.3g} s, passes {found.passes:.3g} s, "
        f"update {found.update:.3g} s)"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
