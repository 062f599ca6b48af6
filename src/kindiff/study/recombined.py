"""Models of the base's own classes at a smaller size, scored as they are or after a short training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kindiff.classes import ClassSet
from kindiff.components import Components, factorize, load_components
from kindiff.config import KindConfig, PretrainConfig
from kindiff.data import open_samples
from kindiff.pipeline import DiTPipeline
from kindiff.study.config import RecombineConfig
from kindiff.train import pretrain
from kindiff.train.starting import with_classes


def smaller(recipe: PretrainConfig, base: Path, config: RecombineConfig, folder: Path) -> PretrainConfig:
    """Make the smaller model of a base's directory for the classes of the recipe's data, into folder/model.

    A decomposable base is recombined; a dense one is cut by SVD. With config.train it is trained as the recipe says,
    into the run directory `folder`. Returns the recipe of that training.
    """
    classes = open_samples(recipe.data).classes.names
    kind, before = recipe.kind, DiTPipeline.from_pretrained(base / "model")
    if recipe.method == "kind":
        parts = load_components(base / "parts", classes)
        if not config.tailors:
            parts = without_tailors(parts)
        model = parts.recombine(
            classes,
            learngene_rank=config.learngene_rank or None,
            tailor_rank=config.tailor_rank or None,
            layers="factored",
        )
        kind = dataclasses.replace(
            kind,
            learngene_rank=config.learngene_rank or kind.learngene_rank,
            tailor_rank=config.tailor_rank or kind.tailor_rank,
            targets=parts.targets,
        )
    else:
        whole = before.model
        shape = dataclasses.replace(whole.config, num_classes=len(classes))
        model = with_classes(whole, shape, ClassSet(classes), base / "model")
        if config.learngene_rank:
            kind = cut_config(config.learngene_rank)
            model = factorize(model, kind)
    if not config.train:
        DiTPipeline(model, before.autoencoder).save_pretrained(folder / "model")
        return recipe
    start = folder.with_name(f"{folder.name}--start")
    model.save_pretrained(start)
    recipe = dataclasses.replace(
        recipe,
        method="dense" if model.structure is None else "kind",
        kind=kind,
        init=str(start),
    )
    pretrain(recipe, folder)
    return recipe


def cut(base: Path, rank: int) -> DiTPipeline:
    """A dense base with the largest `rank` components of each of its model's matrices (SVD) and no tailors."""
    whole = DiTPipeline.from_pretrained(base / "model")
    return DiTPipeline(factorize(whole.model, cut_config(rank)), whole.autoencoder)


def cut_config(rank: int) -> KindConfig:
    """The components of such a cut."""
    return KindConfig(learngene_rank=rank, tailor_rank=0, init="svd")


def without_tailors(parts: Components) -> Components:
    """The same parts with nothing of a class but its embedding: the learngenes alone."""
    names = {name: {"class_embed": tensors["class_embed"]} for name, tensors in parts.tailors.items()}
    return dataclasses.replace(parts, targets=(), tailors=names)
