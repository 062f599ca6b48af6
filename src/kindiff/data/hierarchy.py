"""Class hierarchies: a graph of nodes under their hypernyms, some of which are the classes of a data set.

A file is tab-separated, a node a line: node, class index (empty for an inner node), lemma, hypernyms (node ids
with commas between; none for a root). The classes of ImageNet-1K in WordNet 3.0 come with the package.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from kindiff.classes import ClassSet, nearest
from kindiff.errors import BadFileError, UsageError

MAX_BYTES = 32 * 2**20
MAX_NODES = 50_000
MAX_FIELD = 200
IMAGENET = "imagenet"
"""Name of the hierarchy that comes with the package."""


@dataclass(frozen=True)
class Node:
    """One concept: its id (for a class, the name of its folder), its word, and the ids of what it is a kind of."""

    id: str
    lemma: str
    hypernyms: tuple[str, ...]
    index: int | None = None
    """Class index in the data set; None for an inner node."""


@dataclass(frozen=True)
class Hierarchy:
    """A graph without cycles of nodes under their hypernyms; a node may have several.

    Raises BadFileError, naming the node, for a node or class index that stands twice, a hypernym that is not
    there, a cycle, no class at all, or more nodes than any hierarchy of images has.
    """

    nodes: Mapping[str, Node]
    where: str = "the hierarchy"
    """The file, for messages."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.nodes) <= MAX_NODES:
            raise BadFileError(f"{self.where} has {len(self.nodes)} nodes; 1 to {MAX_NODES} are possible.")
        indices: dict[int, str] = {}
        for node in self.nodes.values():
            for above in node.hypernyms:
                if above not in self.nodes:
                    raise BadFileError(
                        f"{self.where}: node {node.id!r} names the unknown hypernym {above!r}"
                        f"{nearest(above, self.nodes)}; add a line for it or mend the name."
                    )
            if node.index is not None and indices.setdefault(node.index, node.id) != node.id:
                raise BadFileError(
                    f"{self.where}: class index {node.index} stands twice, at {indices[node.index]!r} and at "
                    f"{node.id!r}; number each class once."
                )
        if not indices:
            raise BadFileError(f"{self.where} has no class: no line has a class index.")
        assert len(self.top_down) == len(self.nodes)

    @functools.cached_property
    def top_down(self) -> tuple[str, ...]:
        """All nodes, each after its hypernyms."""
        waiting = {node.id: len(node.hypernyms) for node in self.nodes.values()}
        ready = [name for name, count in waiting.items() if count == 0]
        done: list[str] = []
        while ready:
            done.append(ready.pop())
            for below in self.children[done[-1]]:
                waiting[below] -= 1
                if waiting[below] == 0:
                    ready.append(below)
        if len(done) < len(self.nodes):
            cycle = self._cycle(set(self.nodes) - set(done))
            raise BadFileError(
                f"{self.where} has a cycle: {' -> '.join(cycle)}; a node cannot be a kind of itself."
            )
        return tuple(done)

    @functools.cached_property
    def children(self) -> dict[str, list[str]]:
        """Node -> the nodes right below it, in the order of the file."""
        below: dict[str, list[str]] = {name: [] for name in self.nodes}
        for node in self.nodes.values():
            for above in node.hypernyms:
                below[above].append(node.id)
        return below

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """Node ids of the classes, by their index."""
        found = [node for node in self.nodes.values() if node.index is not None]
        return tuple(node.id for node in sorted(found, key=lambda node: node.index or 0))

    @functools.cached_property
    def depth(self) -> dict[str, int]:
        """Steps from a root down to a node, the longest way; a root has 1."""
        depth: dict[str, int] = {}
        for name in self.top_down:
            depth[name] = 1 + max((depth[above] for above in self.nodes[name].hypernyms), default=0)
        return depth

    def below(self, classes: tuple[str, ...]) -> dict[str, int]:
        """For each node, which of `classes` are at or below it: bit i of the number is classes[i]."""
        bits = dict.fromkeys(self.nodes, 0)
        for place, name in enumerate(classes):
            bits[self.node(name).id] |= 1 << place
        for name in reversed(self.top_down):
            for above in self.nodes[name].hypernyms:
                bits[above] |= bits[name]
        return bits

    def node(self, name: str) -> Node:
        """A node by id; UsageError names the nearest."""
        if name not in self.nodes:
            raise UsageError(f"{name!r} is no node of {self.where}{nearest(name, self.nodes)}.")
        return self.nodes[name]

    def _cycle(self, stuck: set[str]) -> list[str]:
        """One cycle among nodes that each have a hypernym in the same set."""
        path = [min(stuck)]
        while len(path) == len(set(path)):
            path.append(next(a for a in self.nodes[path[-1]].hypernyms if a in stuck))
        return path[path.index(path[-1]) :]


def read_hierarchy(path: str | Path) -> Hierarchy:
    """A hierarchy from its file, or ImageNet's for `imagenet`; BadFileError names the line or node at fault."""
    if str(path) == IMAGENET:
        return imagenet()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"hierarchy file {path} does not exist.")
    if path.stat().st_size > MAX_BYTES:
        raise BadFileError(f"{path} has {path.stat().st_size} bytes; a hierarchy is never that large.")
    return _parse(path.read_bytes(), str(path))


@functools.cache
def imagenet() -> Hierarchy:
    """The 1000 classes of ImageNet-1K and all their hypernyms in WordNet 3.0; node ids are the folder names."""
    content = (resources.files("kindiff.data") / "imagenet_wordnet.tsv").read_bytes()
    return _parse(content, "imagenet_wordnet.tsv")


def read_names(source: str) -> ClassSet:
    """Class names by number: `imagenet` (the folder names of ImageNet-1K) or a text file, one a line."""
    if source == IMAGENET:
        return ClassSet(imagenet().classes)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"names {path} do not exist; give a text file, one class a line, or imagenet."
        )
    lines = _lines(path.read_bytes(), f"names {path}")
    return ClassSet(tuple(line.strip() for line in lines if line.strip()))


def hierarchy_of(groups: Mapping[str, tuple[str, ...]], *, root: str) -> Hierarchy:
    """Two levels: a root, its groups, their classes."""
    nodes = {root: Node(root, root, ())}
    for group, members in groups.items():
        nodes[group] = Node(group, group, (root,))
        for name in members:
            nodes[name] = Node(name, name, (group,), sum(n.index is not None for n in nodes.values()))
    return Hierarchy(nodes)


def _lines(content: bytes, where: str) -> list[str]:
    try:
        return content.decode().splitlines()
    except UnicodeDecodeError:
        raise BadFileError(f"{where} is not text in UTF-8.") from None


def _parse(content: bytes, where: str) -> Hierarchy:
    lines = _lines(content, where)
    nodes: dict[str, Node] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) != 4 or not fields[0] or max(map(len, fields[:3])) > MAX_FIELD:
            raise BadFileError(
                f"{where}, line {number}: a line is node, class index, lemma and hypernyms with tabs between, each "
                f"at most {MAX_FIELD} characters, not {line[:60]!r}."
            )
        name, index, lemma, hypernyms = fields
        if index and not (index.isascii() and index.isdigit() and int(index) < MAX_NODES):
            raise BadFileError(
                f"{where}, line {number}: class index {index!r} is no number from 0 to {MAX_NODES - 1}."
            )
        if name in nodes:
            raise BadFileError(f"{where}, line {number}: node {name!r} stands twice; give it one line.")
        above = tuple(word for word in hypernyms.split(",") if word)
        nodes[name] = Node(name, lemma or name, above, int(index) if index else None)
    return Hierarchy(nodes, where)
