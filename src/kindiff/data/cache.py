"""Where prepared sets that kindiff makes itself are kept, and how one is made once."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from kindiff.data.manifest import MANIFEST

try:
    import fcntl
except ImportError:  # Windows: two processes may both do the work; the later one's result stays
    fcntl = None  # type: ignore[assignment]


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, after `make(target)` if it is no prepared set yet.

    Of several processes that ask at once (ranks, two terminals) one makes it and the others wait. OSError
    with advice when the cache cannot be written.
    """
    if (target / MANIFEST).is_file():
        return target
    with alone(target):
        if not (target / MANIFEST).is_file():
            # Only a killed process leaves these, and nobody else works on this target now.
            for left_over in target.parent.glob(f".{target.name}.*.tmp"):
                shutil.rmtree(left_over, ignore_errors=True)
            make(target)
    return target


@contextlib.contextmanager
def alone(target: Path) -> Iterator[None]:
    """For one process at a time: what makes `target`. OSError with advice when its folder cannot be written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = (target.parent / f".{target.name}.lock").open("w")
    except OSError as error:
        raise OSError(
            f"the cache {target.parent} cannot be written ({error.strerror}); set KINDIFF_CACHE to a folder "
            "that can."
        ) from None
    with lock:  # closing the file, or the end of the process, releases the lock
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"kindiff: waiting for another process that prepares {target}", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
