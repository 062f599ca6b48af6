"""Numbers that are not finite: the step is not taken, its capsule is written, the run goes back and leaves it out.

A window of steps that is left out once is left out for good: rollbacks.json lists them, so that the run stays a
function of the position, its data and that list.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from kindiff import checkpoint
from kindiff.config import TrainConfig
from kindiff.errors import BadFileError
from kindiff.progress import say

FILE = "rollbacks.json"


class NotFinite(RuntimeError):
    """Loss, gradient or state is not finite and the run has used up its rollbacks; the step was not taken."""

    exit_code = 1


class BadStepError(RuntimeError):
    """A step that must not be taken."""

    def __init__(self, step: int, cause: str, capsule: Path) -> None:
        super().__init__(f"step {step}: {cause}")
        self.step, self.cause, self.capsule = step, cause, capsule


@dataclass(frozen=True, kw_only=True)
class Window:
    """Steps that a run leaves out."""

    first: int
    end: int
    """The step after the last one that is left out."""
    cause: str
    """What was not finite."""
    capsule: str
    """Directory of the step's capsule, below the run's."""

    @property
    def steps(self) -> range:
        return range(self.first, self.end)


def read_windows(folder: Path) -> list[Window]:
    """The windows of a run so far; BadFileError when the list is damaged."""
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        windows = [Window(**entry) for entry in checkpoint.read_json(path)["windows"]]
        if not all(type(w.first) is int and type(w.end) is int and 0 <= w.first < w.end for w in windows):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise BadFileError(f"{path} is damaged; it lists the steps that the run leaves out.") from None
    return windows


def roll_back(folder: Path, bad: BadStepError, config: TrainConfig) -> None:
    """Add the window of a bad step to the run's list, and say so; NotFinite when the limit is reached."""
    windows = read_windows(folder)
    if len(windows) >= config.rollbacks:
        gone_back = f"the run has gone back {len(windows)} times already" if windows else "rollbacks is 0"
        raise NotFinite(
            f"{bad}; the step was not taken and {gone_back}. See `kindiff replay {bad.capsule}`; then try a lower "
            "rate or fp32 in a new run, or go on with a higher train.rollbacks."
        )
    window = Window(
        first=bad.step,
        end=bad.step + config.skip_window,
        cause=bad.cause,
        capsule=str(bad.capsule.relative_to(folder)),
    )
    windows.append(window)
    checkpoint.write_json(folder / FILE, {"windows": [asdict(w) for w in windows]})
    say(
        f"{bad}; the step was not taken. Rollback {len(windows)} of {config.rollbacks}: going back to the newest "
        f"checkpoint and leaving out steps {window.first} to {window.end - 1}; the step is kept in {bad.capsule}"
    )
