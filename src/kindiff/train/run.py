"""A run's directory: what was asked, the metrics, checkpoints, and how a run is found again.

run.json                    the config, the data's hash, versions, hardware
parameters.json             how many the model has, and how many of them train
run.lock                    held by the process that trains
metrics.jsonl               one line every few steps
checkpoints/step-0000500/   model, ema and optimiser tensors (a file each, or a file each and rank), state.json; the
                            newest two are kept, one at the end
rollbacks.json, capsules/   steps that were left out because a number was not finite, and why
model/                      the finished model (EMA weights)
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kindiff import checkpoint, runtime
from kindiff.config import to_dict, with_defaults
from kindiff.errors import BadFileError, UsageError
from kindiff.parallel import ALONE, Ranks
from kindiff.progress import say

GROUPS = {"model", "ema", "optimiser", "log"}
"""The tensor files of a checkpoint."""

# Settings that may differ between the parts of one run: they do not change its result.
# The windows that a run has left out are on record (rollbacks.json), so its limit and their length may change.
FREE = (
    "workers", "save_every", "log_every", "tensorboard", "device", "rollbacks", "skip_window", "parallel",
    "accumulate", "recompute", "record", "checkpoints",
)  # fmt: skip

LOCK = "run.lock"
KEPT = 2
"""Checkpoints of a running run: were the newest damaged after it was verified, the one before is there."""


class Run:
    """The files of one training run. Opening an existing run checks that it is the same one.

    All ranks read them (from one file system); the first one writes.
    """

    def __init__(self, folder: Path, description: dict[str, Any], ranks: Ranks = ALONE) -> None:
        """description: what determines the result, in plain values; `config` may be the config itself.

        UsageError when the folder holds another run, or another process trains it.
        """
        self.folder = Path(folder)
        self.ranks = ranks
        self._whole: list[int] = []
        """Steps of the checkpoints that this process has read or written, oldest first."""
        self._locked: int | None = None
        ranks.on_first(lambda: self._open(description))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        if self._locked is not None:
            os.close(self._locked)

    def _open(self, description: dict[str, Any]) -> None:
        path, config = self.folder / "run.json", description.get("config")
        if is_dataclass(config):
            description = description | {"config": to_dict(config)}
        if path.is_file():
            before = checkpoint.read_json(path).get("description")
            if is_dataclass(config) and isinstance(before, dict):
                before = before | {"config": with_defaults(before.get("config"), type(config))}
            if difference := _difference(before, description):
                trained = self.finished and description.get("command") == "pretrain"
                further = f" (with `--init {self.model}` to go on from its model)" if trained else ""
                raise UsageError(
                    f"{self.folder} holds a run with other settings ({difference}); use another folder{further}, or "
                    "the same settings to resume."
                )
            if not self.finished:
                self._lock()
                self._clean()
            return
        if self.folder.exists() and not all(
            path.name == LOCK or path.match(".run.json.*.tmp") for path in self.folder.iterdir()
        ):
            raise UsageError(f"{self.folder} is not empty and holds no run; use another folder.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        self._clean()
        checkpoint.write_json(
            path, {"description": description, "versions": runtime.versions(), "hardware": runtime.hardware()}
        )

    def _lock(self) -> None:
        """Until the block or this process ends. A record lock: loader processes that outlive it do not hold it."""
        descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(
                f"another process trains in {self.folder}; wait for its end or stop it, or use another folder."
            ) from None
        self._locked = descriptor

    @property
    def model(self) -> Path:
        """Where the finished model is."""
        return self.folder / "model"

    @property
    def finished(self) -> bool:
        return is_finished(self.folder)

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], *, last: bool = False) -> None:
        """Write a checkpoint and read it back; then drop older ones, all but one, or all with `last`.

        On failure the older ones are still there. BadFileError when the disk gives back other bytes.
        """
        with checkpoint.new_directory(self._place(step), overwrite=True) as folder:
            _write_state(folder, step, _write_groups(folder, tensors))
        self._retire(step, last=last)

    def save_part(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write this rank's pieces and read them back; they are no checkpoint before all ranks' are put together."""
        folder = self._parts(step)
        folder.mkdir(parents=True, exist_ok=True)
        files = _write_groups(folder, tensors, self.ranks)
        checkpoint.write_json(folder / f"files-{self.ranks.rank}.json", files)

    def put_together(self, step: int, *, last: bool = False) -> None:
        """Make the pieces of all ranks a checkpoint; then drop older ones, as `save` does."""
        with checkpoint.new_directory(self._place(step), overwrite=True) as folder:
            files: dict[str, Any] = {}
            for listing in sorted(self._parts(step).glob("files-*.json")):
                files |= checkpoint.read_json(listing)
                listing.unlink()
            for path in self._parts(step).iterdir():
                path.rename(folder / path.name)
            self._parts(step).rmdir()
            _write_state(folder, step, files)
        self._retire(step, last=last)

    def _retire(self, step: int, *, last: bool) -> None:
        self._whole = [*(s for s in self._whole if s < step), step][-1 if last else -KEPT :]
        for other in self._places():
            if other not in map(self._place, self._whole):
                retired = other.with_name(f".{other.name}.old")  # a kill from here on leaves no half of it
                other.rename(retired)
                shutil.rmtree(retired)

    def newest(self) -> tuple[int, dict[str, dict[str, Tensor]]] | None:
        """Step and tensors of the newest whole checkpoint; damaged ones are named and passed over."""
        found = None
        for place in reversed(self._places()) if self.ranks.first else ():
            try:
                found = _read(place)
                self._whole = [found[0]]
                break
            except (BadFileError, FileNotFoundError) as error:  # a disk that cannot be read now is not damage
                say(f"passing over a checkpoint: {error}")
        step = self.ranks.most(found[0] if found else -1)
        return found or (None if step < 0 else _read(self._place(step)))

    def metrics_until(self, step: int) -> None:
        """Drop metrics of steps that will be done again."""
        path = self.folder / "metrics.jsonl"
        if self.ranks.first and path.is_file():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            checkpoint.write_file(path, "".join(line + "\n" for line in kept).encode())

    def count(self, model: nn.Module) -> None:
        """Write parameters.json: numbers of the model as it trains."""
        numbers = {"all": 0, "trainable": 0}
        for parameter in model.parameters():
            numbers["all"] += parameter.numel()
            numbers["trainable"] += parameter.numel() * parameter.requires_grad
        if self.ranks.first:
            checkpoint.write_json(self.folder / "parameters.json", numbers)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl."""
        if self.ranks.first:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(metrics) + "\n")

    def _clean(self) -> None:
        """Remove what only a killed process leaves: files and directories under a temporary name."""
        for folder in (self.folder, self.folder / "checkpoints", self.folder / "capsules"):
            for path in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _place(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:08d}"

    def _parts(self, step: int) -> Path:
        return self.folder / "checkpoints" / f".step-{step:08d}.parts.tmp"

    def _places(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-*"))


def is_finished(folder: str | Path) -> bool:
    """Whether a run's directory holds its finished model."""
    return (Path(folder) / "model" / "config.json").is_file()


def _file(group: str, rank: int = 0, count: int = 1) -> str:
    return f"{group}.safetensors" if count == 1 else f"{group}.{rank}-of-{count}.safetensors"


def _write_groups(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Write a file a group and read it back; the files' lengths and hashes by name."""
    files = {}
    for group in sorted(tensors):
        path = folder / _file(group, ranks.rank, ranks.count)
        hashed = checkpoint.write_tensors(path, tensors[group])
        files[path.name] = {"bytes": path.stat().st_size, "sha256": hashed}
    for name, facts in files.items():
        if checkpoint.sha256_on_disk(folder / name) != facts["sha256"]:
            raise BadFileError(
                f"{folder / name} does not hold what was written to it: the disk or memory is faulty. The "
                "checkpoint is not used; earlier ones are whole."
            )
    return files


def _write_state(folder: Path, step: int, files: dict[str, Any]) -> None:
    state = {"step": step, "files": files}
    checkpoint.write_json(folder / "state.json", state)
    if checkpoint.read_json(folder / "state.json") != state:
        raise BadFileError(f"{folder / 'state.json'} does not hold what was written to it.")


def _read(place: Path) -> tuple[int, dict[str, dict[str, Tensor]]]:
    state = checkpoint.read_json(place / "state.json")
    try:
        step = int(state["step"])
        files = {name: (facts["bytes"], facts["sha256"]) for name, facts in state["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise BadFileError(f"{place / 'state.json'} is damaged.") from None
    count = max(1, len(files) // len(GROUPS))
    wanted = {group: [_file(group, rank, count) for rank in range(count)] for group in GROUPS}
    if place.name != f"step-{step:08d}" or {name for names in wanted.values() for name in names} != set(
        files
    ):
        raise BadFileError(f"{place / 'state.json'} is damaged: it is not the description of {place.name}.")
    for name, facts in files.items():
        path = place / name
        if not path.is_file():
            raise BadFileError(f"{path} is missing.")
        if (path.stat().st_size, checkpoint.sha256(path)) != facts:
            raise BadFileError(f"{path} is damaged (its length or hash is not the recorded one).")
    return step, {
        group: _joined([checkpoint.read_tensors(place / name) for name in names])
        for group, names in wanted.items()
    }


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors: the first rank has a piece, or all, of each, and the others' rows follow."""
    if len(parts) == 1:
        return parts[0]
    rows = {name: [part[name] for part in parts if name in part] for name in parts[0]}
    return {name: torch.cat(some) if len(some) > 1 else some[0] for name, some in rows.items()}


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, OverflowError):
        return 2**62  # a line cut short by a kill


def _difference(before: Any, after: Any, where: str = "") -> str:
    """The first setting that differs, in words; free ones are passed over."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after} - set(FREE)):
            if found := _difference(before.get(key), after.get(key), f"{where}.{key}" if where else key):
                return found
        return ""
    return "" if before == after else f"{where} was {before!r}, now {after!r}"
