"""Class names, class ids, the null id and label dropout: the only place that knows a class count.

Ids 0 .. C-1 are the classes in order, id C is the null class (the layout of DiT's published embedding, where
ImageNet's null row is 1000).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kindiff.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

MAX_NAME = 200


@dataclass(frozen=True)
class ClassSet:
    """An ordered set of class names.

    Raises UsageError for an empty set, a name that stands twice or one that cannot be a file name (a tailor
    is stored as `tailors/<class>.safetensors`).
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names:
            raise UsageError("a class set needs at least one class; none was given.")
        for name in self.names:
            if not isinstance(name, str) or any("\ud800" <= c <= "\udfff" for c in name):
                raise UsageError(f"class name {str(name)[:40]!r} cannot be used: names are text.")
            if not name or len(name) > MAX_NAME or name.startswith(".") or any(c in name for c in "/\\\0"):
                raise UsageError(
                    f"class name {name[:40]!r} cannot be used: names are 1 to {MAX_NAME} characters, without "
                    "slashes, not starting with a dot. Rename the class."
                )
        twice = _first_repeated(self.names)
        if twice is not None:
            raise UsageError(f"class {twice!r} is asked for twice; name each class once.")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def null_id(self) -> int:
        """Id of the null class (classifier-free guidance); also the number of real classes."""
        return len(self.names)

    @property
    def rows(self) -> int:
        """Rows of an embedding or gate table: the classes and the null class."""
        return len(self.names) + 1

    def id(self, name: str) -> int:
        """The id of one class; UsageError names the nearest known class when it is unknown."""
        try:
            return self.names.index(name)
        except ValueError:
            raise UsageError(
                f"class {name!r} is unknown{nearest(name, self.names)}; this model has "
                f"{len(self.names)} classes: {shorten(self.names)}."
            ) from None

    def ids(self, names: Iterable[str]) -> list[int]:
        """Ids of several classes, in the order asked; a class asked twice is an error."""
        wanted = tuple(names)
        twice = _first_repeated(wanted)
        if twice is not None:
            raise UsageError(f"class {twice!r} is asked for twice; name each class once.")
        return [self.id(name) for name in wanted]


def numbered(count: int) -> ClassSet:
    """Classes without names of their own: class_0 .. class_<count-1>."""
    if count < 1:
        raise UsageError(f"num_classes is {count}; it must be at least 1.")
    return ClassSet(tuple(f"class_{i}" for i in range(count)))


def drop_labels(ids: np.ndarray, uniform: np.ndarray, *, probability: float, null_id: int) -> np.ndarray:
    """Label dropout for classifier-free guidance: the one place where a label becomes null.

    ids (B,) class ids; uniform (B,) numbers in [0, 1), one a sample. Returns ids with the null id where
    uniform < probability.
    """
    dropped = ids.copy()
    dropped[uniform < probability] = null_id
    return dropped


def nearest(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def shorten(names: Iterable[str], limit: int = 8) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def _first_repeated(names: tuple[str, ...]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
