"""A set whose classes are groups of another set's classes: ImageNet's 1000 folders as superclass groups.

N samples of the set.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from kindiff.classes import ClassSet
from kindiff.config import DataConfig
from kindiff.data.groups import Grouping, read_grouping
from kindiff.data.latents import LatentSet
from kindiff.data.prepared import ImageSet
from kindiff.errors import UsageError

Set = TypeVar("Set", ImageSet, LatentSet)


def open_merged(config: DataConfig, open_plain: Callable[[DataConfig], Set]) -> Set:
    """What `config` asks for with its groups as classes: `open_plain` opens the classes that they are made of.

    config.split picks the groups, config.classes some of them by name; per_class counts within a group.
    UsageError for an unknown split or group, and what `open_plain` raises for a class that is not there.
    """
    grouping = read_grouping(config.groups)
    listed = grouping.split(config.split)
    names = ClassSet(tuple(config.classes) or listed).names
    ClassSet(listed).ids(names)
    wanted = {group.name: group.classes for group in grouping.groups}
    plain = tuple(member for name in names for member in wanted[name])
    own = dataclasses.replace(config, classes=plain, groups="", split="", per_class=0)
    return merged(open_plain(own), grouping, names, per_class=config.per_class)


def merged(samples: Set, grouping: Grouping, groups: tuple[str, ...], *, per_class: int = 0) -> Set:
    """The samples of these groups, labelled by group; of each the first per_class (0: all).

    Samples of a group stand by turns of its classes' order, so that a few of them hold every class: first of
    class a, first of class b, ..., second of class a. UsageError for a class that the set lacks.
    """
    members = {group.name: group.classes for group in grouping.groups}
    rows, labels = [], []
    hashes: list[str] = []
    for label, name in enumerate(groups):
        columns = [np.flatnonzero(samples.labels == i) for i in samples.classes.ids(members[name])]
        turns = np.concatenate([np.arange(len(column)) for column in columns])
        chosen = np.concatenate(columns)[np.argsort(turns, kind="stable")][: per_class or None]
        if not len(chosen):
            raise UsageError(f"group {name!r} has no samples; its classes are {', '.join(members[name])}.")
        rows.append(samples.rows[chosen])
        labels.append(np.full(len(chosen), label, dtype=np.int64))
        hashes.append(f"{name}: {','.join(members[name])}")
    described = "\n".join([samples.sha256, str(per_class), *hashes])
    changed: dict[str, Any] = {
        "classes": ClassSet(groups),
        "rows": np.concatenate(rows),
        "labels": np.concatenate(labels),
        "sha256": hashlib.sha256(described.encode()).hexdigest(),
    }
    if isinstance(samples, ImageSet):
        changed["class_sha256"] = _class_hashes(samples, hashes)
    return dataclasses.replace(samples, **changed)


def _class_hashes(samples: ImageSet, described: list[str]) -> tuple[str, ...]:
    """What takes the place of the hashes of the classes' pixels."""
    return tuple(hashlib.sha256(f"{samples.sha256} {text}".encode()).hexdigest() for text in described)
