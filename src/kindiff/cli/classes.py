"""kindiff classes"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from kindiff.errors import UsageError

if TYPE_CHECKING:
    from kindiff.data.groups import Grouping
    from kindiff.data.hierarchy import Hierarchy


@dataclass(frozen=True, kw_only=True)
class Args:
    """Show a class hierarchy as a tree, or merge its classes into groups and deal those out to tasks."""

    source: tyro.conf.Positional[str] = "imagenet"
    """imagenet, avatars, a hierarchy file (tab-separated: node, class index, lemma, hypernyms) or a groups file."""
    groups: int = 0
    """Merge the classes into that many groups; 0 for 611 of ImageNet, the file's own groups, else no merging."""
    base: int | None = None
    """Groups for pre-training, the rest are novel; ImageNet's 150 when not given."""
    tasks: tuple[int, ...] = ()
    """Sizes of disjoint downstream tasks among the novel groups."""
    seed: int = 0
    """Seed of the dealing."""
    tree: str = ""
    """Draw the tree below this node (a node id, or `root`) instead of listing groups."""
    depth: int = 4
    """Levels of the tree that are drawn; 0 for all."""
    out: Path | None = None
    """Write the groups as JSON, for data.groups and the superclass gate."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a JSON object."""


def run(args: Args) -> None:
    """Print the tree or the groups; write the file."""
    from kindiff import checkpoint

    if args.tree:
        print("\n".join(draw(_hierarchy(args.source), args.tree, args.depth)))
        return
    grouping = _grouping(args)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(args.out, grouping.to_json())
    if args.json:
        print(json.dumps(grouping.to_json(), indent=1))
        return
    files = args.source == "avatars" or args.source.endswith(".json")
    words = {} if files else {n.id: n.lemma for n in _hierarchy(args.source).nodes.values()}
    print("\n".join(listing(grouping, words)))


def draw(hierarchy: Hierarchy, start: str, depth: int) -> Iterator[str]:
    """The tree below a node as lines; a class shows its index, a cut branch the number of its classes."""
    below = hierarchy.below(hierarchy.classes)
    tops = [n for n in hierarchy.top_down if not hierarchy.nodes[n].hypernyms]
    names = tops if start == "root" else [hierarchy.node(start).id]
    stack = [(name, "", "", 1) for name in reversed(names)]
    drawn: set[str] = set()
    while stack:
        name, lead, branch, level = stack.pop()
        node, count = hierarchy.nodes[name], below[name].bit_count()
        number = f" [{node.index}]" if node.index is not None else ""
        children = [child for child in hierarchy.children[name] if below[child]]
        cut = bool(children) and (level == depth or name in drawn)  # under two hypernyms: drawn at the first
        drawn.add(name)
        yield f"{lead}{branch}{node.lemma}{number} ({name}){f': {count} classes' if children else ''}" + (
            " ..." if cut else ""
        )
        if cut:
            continue
        deeper = lead + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        for place, child in reversed(list(enumerate(children))):
            stack.append((child, deeper, "└─ " if place == len(children) - 1 else "├─ ", level + 1))


def listing(grouping: Grouping, words: Mapping[str, str]) -> Iterator[str]:
    """The groups that hold several classes, largest first, and the sizes of the splits."""
    merged = sorted((g for g in grouping.groups if len(g.classes) > 1), key=lambda g: -len(g.classes))
    for group in merged:
        alike = f", alike {group.similarity:.2f}" if group.similarity else ""
        yield f"{group.name} ({len(group.classes)} classes{alike}): {', '.join(words.get(c, c) for c in group.classes)}"
    classes = sum(len(g.classes) for g in grouping.groups)
    yield (
        f"\n{classes} classes in {len(grouping.groups)} groups: {len(merged)} of several classes, "
        f"{len(grouping.groups) - len(merged)} of one"
    )
    for name, members in grouping.splits.items():
        yield f"{name:<12}{len(members):>5} groups"


def _hierarchy(source: str) -> Hierarchy:
    from kindiff.data.hierarchy import hierarchy_of, read_hierarchy

    if source == "avatars":
        from kindiff.data.avatars import SUPERCLASSES

        return hierarchy_of(SUPERCLASSES, root="avatar")
    if source.endswith(".json"):
        raise UsageError(
            f"{source} holds groups, not a hierarchy; leave out --tree and --groups, or give the hierarchy."
        )
    return read_hierarchy(source)


def _grouping(args: Args) -> Grouping:
    from kindiff.data.groups import IMAGENET_BASE, IMAGENET_GROUPS, IMAGENET_TASKS, deal, merge, read_grouping

    if not args.groups and (args.source == "avatars" or args.source.endswith(".json")):
        grouping = read_grouping(args.source)
        if args.base is None and not args.tasks:
            return grouping
        return deal(grouping.groups, base=args.base or 0, tasks=args.tasks, seed=args.seed)
    hierarchy = _hierarchy(args.source)
    ours = args.source == "imagenet" and args.groups in (0, IMAGENET_GROUPS)
    base = args.base if args.base is not None else (IMAGENET_BASE if ours else 0)
    tasks = args.tasks or (IMAGENET_TASKS if ours and args.base is None else ())
    count = args.groups or (IMAGENET_GROUPS if ours else len(hierarchy.classes))
    return deal(merge(hierarchy, count), base=base, tasks=tasks, seed=args.seed)
