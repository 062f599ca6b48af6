"""Where a pre-training run starts: random weights, or a model that is there already (`init`)."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import torch

from kindiff import checkpoint
from kindiff.classes import ClassSet, nearest, numbered
from kindiff.components import decompose, factorize, load_components
from kindiff.config import DiTConfig, PretrainConfig
from kindiff.data.groups import read_grouping, superclass_of
from kindiff.errors import UsageError
from kindiff.models.dit import DiT
from kindiff.rivals.learngenes import BANKS, constrained


def starting_model(config: PretrainConfig, shape: DiTConfig, classes: ClassSet) -> DiT:
    """The model at step 0: a function of the config, the data's shape and classes, and the seed.

    With config.init, the weights of that model or components directory: dense ones are factorised (method kind)
    or taken as they are (method dense); components must have the ranks, targets and gate that config.kind says.
    UsageError names what does not fit.
    """
    if config.init:
        model = _initial(Path(config.init), shape, classes)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            if config.method in BANKS:
                return constrained(shape, classes, config.method)
            model = DiT(shape, classes=classes)
    if model.structure is not None:
        _check_structure(config, model)
        return model
    if config.method == "dense":
        return model
    superclasses = None
    if config.superclasses:
        superclasses = superclass_of(classes.names, read_grouping(config.superclasses))
    kind = config.kind
    if kind.init == "auto" and not config.init:
        kind = replace(kind, init="svd-rescaled")
    return factorize(model, kind, superclasses=superclasses, seed=config.train.seed)


def init_hash(config: PretrainConfig) -> str:
    """SHA-256 of the weights that a run starts from, for its description; empty for random ones."""
    if not config.init:
        return ""
    folder = Path(config.init)
    name = "learngenes.safetensors" if (folder / "tailors").is_dir() else "model.safetensors"
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"init {folder} holds no {name}; give a model directory (RUN/model, or what `kindiff convert` wrote) "
            "or a components directory."
        )
    return checkpoint.sha256(folder / name)


def _initial(folder: Path, shape: DiTConfig, classes: ClassSet) -> DiT:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"init {folder} has no config.json; give a model or components directory (`kindiff convert` makes one "
            "from a released checkpoint)."
        )
    if checkpoint.read_json(folder / "config.json").get("kind") == "components":
        model = load_components(folder).recombine(layers="factored")
    else:
        model = DiT.from_pretrained(folder)
    for field in dataclasses.fields(DiTConfig):
        old, new = getattr(model.config, field.name), getattr(shape, field.name)
        unknown = field.name == "autoencoder" and not old  # a converted checkpoint does not name its own
        if old != new and field.name != "num_classes" and not unknown:
            raise UsageError(
                f"init {folder} has {field.name} {old!r}, this run {new!r}; set the recipe's model, objective and "
                "data to what the checkpoint was made for."
            )
    return with_classes(model, shape, classes, folder)


def with_classes(model: DiT, shape: DiTConfig, classes: ClassSet, folder: Path) -> DiT:
    """The model for these classes: the same ones, some of its own, or as many under names of their own."""
    names = model.classes.names
    if names == numbered(len(names)).names and names != classes.names:
        if len(names) != len(classes):
            raise UsageError(
                f"init {folder} has {len(names)} classes without names and the data {len(classes)}; their numbers "
                "must be equal, or name the classes when converting."
            )
        names = classes.names  # by number
    if lacking := [name for name in classes.names if name not in names]:
        raise UsageError(
            f"init {folder} lacks the class {lacking[0]!r}{nearest(lacking[0], names)} "
            f"({len(lacking)} of {len(classes)} are missing); choose data.classes among its {len(names)}."
        )
    if model.structure is not None and names != classes.names:
        some = decompose(model).recombine(classes.names, layers="factored")
        some.config = shape
        return some
    ids = [names.index(name) for name in classes.names] + [len(names)]
    state = model.state_dict()
    state["class_embed.weight"] = state["class_embed.weight"][ids].clone()
    if model.structure is not None:
        model.config, model.classes = shape, classes
        return model
    with torch.device("meta"):
        new = DiT(shape, classes=classes)
    new.load_state_dict(state, assign=True)
    new.positions_TD = model.positions_TD
    return new.requires_grad_(True)


def _check_structure(config: PretrainConfig, model: DiT) -> None:
    structure = model.structure or {}
    if config.method == "dense":
        raise UsageError(f"init {config.init} is made of components and method is dense; use method kind.")
    gate = (
        "soft" if structure["gate"] == "soft" else "superclass" if structure["gate_width"] == 2 else "class"
    )
    have = (structure["rank"], structure["tailor_rank"], tuple(structure["targets"]), gate)
    kind = config.kind
    want = (kind.learngene_rank, kind.tailor_rank, tuple(kind.targets), kind.gate)
    for name, old, new in zip(("learngene_rank", "tailor_rank", "targets", "gate"), have, want, strict=True):
        if old != new:
            raise UsageError(
                f"init {config.init} has {name} {old!r} and kind.{name} is {new!r}; set it to what the components "
                "have, or start from a dense model."
            )
