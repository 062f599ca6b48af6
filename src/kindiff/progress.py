"""Progress on stderr: a live bar on a terminal, a line now and then elsewhere. Results go to stdout.

Of several ranks the first one speaks.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kindiff.parallel import place

LINE_EVERY = 10.0
"""Seconds between lines where there is no terminal."""


class Track:
    """Counts work with a rate and an estimate of the time left.

    Use as `with Track("sampling", total, unit="images") as track: track.advance(8)`.
    """

    def __init__(self, label: str, total: int, *, unit: str, done: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self.first = self.lines_at = done
        self.note = ""
        """Stands beside the count: a loss, say."""
        self.started = self.said = time.monotonic()
        self.bar: Progress | None = None
        if sys.stderr.isatty() and place()[0] == 0:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit + "  {task.fields[note]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> Track:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()
        elif error is None and self.done > self.lines_at:
            self._line("")

    def advance(self, count: int) -> None:
        """Some more is done."""
        self.done += count
        rate = self.rate()
        pace = f"{rate:.0f} {self.unit}/s" if rate >= 1 else f"{rate * 3600:.0f} {self.unit}/hour"
        note = f"{self.note}  {pace}".strip()
        if self.bar:
            self.bar.update(self.task, completed=self.done, total=self.total, note=note)
        elif time.monotonic() - self.said > LINE_EVERY:
            self._line(note)

    def rate(self) -> float:
        """Units a second since the start."""
        return (self.done - self.first) / max(time.monotonic() - self.started, 1e-9)

    def _line(self, note: str) -> None:
        self.said, self.lines_at = time.monotonic(), self.done
        if place()[0] != 0:
            return
        left = (self.total - self.done) / max(self.rate(), 1e-9)
        end = f"about {duration(left)} left" if left > 0 else f"done in {duration(self.said - self.started)}"
        print(
            f"{self.label}: {self.done}/{self.total} {self.unit}{note and '  ' + note}, {end}",
            file=sys.stderr,
        )


def duration(seconds: float) -> str:
    """In the largest unit that it fills."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def show(result: object) -> None:
    """A result, as one line to stdout."""
    if place()[0] == 0:
        print(result)


def say(text: str) -> None:
    """One line to stderr."""
    if place()[0] == 0:
        print(text, file=sys.stderr, flush=True)
