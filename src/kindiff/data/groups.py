"""Merging similar classes into groups, and dealing the groups out to pre-training and downstream tasks.

The rule (ours; docs/imagenet.md): two concepts are as similar as their common hypernym is deep (Wu & Palmer 1994).
The hypernym that makes its two deepest classes most similar is merged first, and so on up, until the wanted number
of groups is left.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kindiff.classes import ClassSet, nearest, shorten
from kindiff.data.hierarchy import Hierarchy
from kindiff.errors import BadFileError, UsageError

FORMAT = 1
RULE = "wu-palmer, complete linkage"
IMAGENET_GROUPS = 611
IMAGENET_BASE = 150
IMAGENET_TASKS = (5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Group:
    """Classes that count as one: its name, the node that holds them, how alike they are, and their node ids."""

    name: str
    node: str
    similarity: float
    """Wu-Palmer similarity of its two deepest classes under the node, 0 to 1; 1 for a class by itself."""
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Grouping:
    """Groups of classes and named lists of groups (base, novel, tasks)."""

    groups: tuple[Group, ...]
    splits: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        names = ClassSet(tuple(group.name for group in self.groups)).names
        ClassSet(tuple(name for group in self.groups for name in group.classes))
        for split, members in self.splits.items():
            for name in ClassSet(members).names:
                if name not in names:
                    raise UsageError(
                        f"split {split!r} names the unknown group {name!r}{nearest(name, names)}."
                    )

    @property
    def of_class(self) -> dict[str, str]:
        """Class -> the name of its group."""
        return {name: group.name for group in self.groups for name in group.classes}

    def split(self, name: str) -> tuple[str, ...]:
        """The groups of a named list; empty or `all` for every group."""
        if name in ("", "all"):
            return tuple(group.name for group in self.groups)
        if name not in self.splits:
            raise UsageError(
                f"split {name!r} is unknown{nearest(name, self.splits)}; there are all, {', '.join(self.splits)}."
            )
        return self.splits[name]

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse."""
        groups = [
            {
                "name": g.name,
                "node": g.node,
                "similarity": round(g.similarity, 6),
                "classes": list(g.classes),
            }
            for g in self.groups
        ]
        splits = {name: list(members) for name, members in self.splits.items()}
        return {"format": FORMAT, "kind": "groups", "rule": RULE, "groups": groups, "splits": splits}

    @staticmethod
    def from_json(value: Mapping[str, Any], where: str) -> Grouping:
        """Raises BadFileError where the values are no grouping."""
        try:
            if value["kind"] != "groups" or value["format"] != FORMAT:
                raise UsageError(f"it describes {value['kind']!r}, format {value['format']!r}")
            groups = tuple(
                Group(str(g["name"]), str(g["node"]), float(g["similarity"]), tuple(map(str, g["classes"])))
                for g in value["groups"]
            )
            return Grouping(groups, {k: tuple(map(str, v)) for k, v in value["splits"].items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadFileError(
                f"{where} is no file of groups (as `kindiff classes` writes): {error}"
            ) from None


def merge(hierarchy: Hierarchy, count: int, classes: Sequence[str] = ()) -> tuple[Group, ...]:
    """Exactly `count` groups of similar classes (empty: all classes of the hierarchy).

    Deterministic: nodes in order of the falling similarity that they give the two deepest classes below them (a
    lower bound for any two), ties by node id; a node that would leave fewer than `count` groups is passed over.
    Groups come in the order of their first class. UsageError when there are fewer classes than groups, or no
    merging gives `count`.
    """
    names = tuple(classes) or hierarchy.classes
    ClassSet(names)
    if not 1 <= count <= len(names):
        raise UsageError(f"{count} groups of {len(names)} classes are not possible; use 1 to {len(names)}.")
    below = hierarchy.below(names)
    likeness = {name: _likeness(hierarchy, name, bits, names) for name, bits in below.items() if bits}
    order = sorted(
        (name for name in likeness if below[name].bit_count() > 1), key=lambda name: (-likeness[name], name)
    )
    found = {1 << place: (name, 1.0) for place, name in enumerate(names)}
    for name in order:
        if len(found) == count:
            break
        inside = [bits for bits in found if bits & ~below[name] == 0]
        if len(inside) < 2 or len(found) - len(inside) + 1 < count:
            continue
        for bits in inside:
            del found[bits]
        found[sum(inside)] = (name, likeness[name])
    if len(found) != count:
        raise UsageError(
            f"this hierarchy merges {len(names)} classes into {len(found)} groups, not into {count}."
        )
    whole = sorted(found.items(), key=lambda item: item[0] & -item[0])
    words = Counter(_word(hierarchy, node) for _, (node, _) in whole)
    return tuple(
        Group(
            name=_word(hierarchy, node) if words[_word(hierarchy, node)] == 1 else _unique(hierarchy, node),
            node=node,
            similarity=similarity,
            classes=tuple(name for place, name in enumerate(names) if bits >> place & 1),
        )
        for bits, (node, similarity) in whole
    )


def _likeness(hierarchy: Hierarchy, name: str, bits: int, classes: Sequence[str]) -> float:
    """Wu & Palmer 1994: 2 depth(common hypernym) / (depth a + depth b), for the two deepest classes below."""
    depths = sorted((hierarchy.depth[c] for i, c in enumerate(classes) if bits >> i & 1), reverse=True)
    return 2 * hierarchy.depth[name] / (depths[0] + depths[min(1, len(depths) - 1)])


def deal(groups: Iterable[Group], *, base: int, tasks: Sequence[int] = (), seed: int = 0) -> Grouping:
    """Split groups into `base` for pre-training and the rest, novel; of these, disjoint tasks of given sizes.

    A list is drawn in the order of SHA-256(seed, node) and written in the groups' own order; the splits are
    base, novel, and novel-<size> for each task. UsageError when there are not enough groups.
    """
    groups = tuple(groups)
    if not 0 <= base <= len(groups) or sum(tasks) > len(groups) - base or min(tasks, default=1) < 1:
        raise UsageError(
            f"{base} base groups and tasks of {list(tasks)} do not fit {len(groups)} groups; ask for fewer."
        )
    if len(set(tasks)) < len(tasks):
        raise UsageError(f"tasks of {list(tasks)} groups: each size makes one task, so name it once.")
    drawn = sorted(groups, key=lambda group: hashlib.sha256(f"{seed} {group.node}".encode()).hexdigest())
    places = {group.name: place for place, group in enumerate(groups)}
    splits = {"base": drawn[:base], "novel": drawn[base:]}
    start = base
    for size in tasks:
        splits[f"novel-{size}"] = drawn[start : start + size]
        start += size
    named = {
        split: tuple(sorted((g.name for g in members), key=places.__getitem__))
        for split, members in splits.items()
        if members
    }
    return Grouping(groups, named)


@functools.cache
def imagenet_grouping() -> Grouping:
    """ImageNet-1K as 611 groups: 150 base and 461 novel, and tasks of 5 to 100 of the novel ones."""
    from kindiff.data.hierarchy import imagenet

    groups = merge(imagenet(), IMAGENET_GROUPS)
    return deal(groups, base=IMAGENET_BASE, tasks=IMAGENET_TASKS)


def read_grouping(source: str | Path) -> Grouping:
    """Groups by name (`imagenet`, `avatars`) or from a JSON file that `kindiff classes` wrote."""
    if str(source) == "imagenet":
        return imagenet_grouping()
    if str(source) == "avatars":
        return avatar_grouping()
    from kindiff import checkpoint

    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"groups file {path} does not exist; use imagenet, avatars or a JSON file.")
    return Grouping.from_json(checkpoint.read_json(path), str(path))


def avatar_grouping() -> Grouping:
    """The drawn avatars by their related styles."""
    from kindiff.data.avatars import SUPERCLASSES

    groups = tuple(Group(name, name, 0.0, members) for name, members in SUPERCLASSES.items())
    return Grouping(groups, {})


def superclass_of(classes: Iterable[str], grouping: Grouping) -> dict[str, str]:
    """Class -> group for these classes; UsageError names those that no group holds."""
    known = grouping.of_class
    names = tuple(classes)
    if lacking := [name for name in names if name not in known]:
        raise UsageError(f"no group holds the class {shorten(lacking)}; give groups that cover every class.")
    return {name: known[name] for name in names}


def _word(hierarchy: Hierarchy, node: str) -> str:
    return hierarchy.nodes[node].lemma.replace("/", "-")


def _unique(hierarchy: Hierarchy, node: str) -> str:
    return f"{_word(hierarchy, node)}-{node}"
