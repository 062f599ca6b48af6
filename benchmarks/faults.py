"""The fault campaign: real training runs that are killed, starved, damaged and poisoned, and resumed by their command.

    python benchmarks/faults.py            every part in its long form; again to go on where it stopped
    python benchmarks/faults.py --short    the form of the test suite, under a minute
    python benchmarks/faults.py --part kill_random --seconds 100

Each run is a process of its own, forked from this one after its imports, that calls the `kindiff` command; a kill is
SIGKILL. Faults are injected by replacing functions in that process: nothing of it is in the package. After each case
the run is started again with the same arguments, and every loss, weight, average and optimiser value is compared
to the bit with an uninterrupted run's. benchmarks/results/faults.json is written as the campaign goes.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import io
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # a fork has all imports: the optimiser asks for this one
import tyro  # noqa: F401

import kindiff.cli.pretrain  # noqa: F401
import kindiff.train.loop as loop
from kindiff import checkpoint, runtime
from kindiff.cli.main import main
from kindiff.train.rollback import Window
from kindiff.train.run import GROUPS, Run

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVE_EVERY, BATCH = 40, 5, 8
CLASSES = ("blobs", "rings", "shapes", "waves")
Failure = str
"""What was wrong with a case; empty when nothing was."""


# A run


def arguments(out: Path, data: str, **train: object) -> list[str]:
    """The command of the campaign's run: DiT-T/4 as components, 16 px, 40 steps, a checkpoint every 5."""
    settings = {
        "steps": STEPS, "batch": BATCH, "save_every": SAVE_EVERY, "log_every": 1, "warmup": 3, "lr": 0.003,
    } | train  # fmt: skip
    options = ["--data.source", data, "--data.size", "16", "--model.preset", "DiT-T/4"]
    options += ["--kind.learngene-rank", "16", "--kind.tailor-rank", "2"]
    for name, value in settings.items():
        options += [f"--train.{name.replace('_', '-')}", str(value)]
    return ["pretrain", str(out), *options]


def start(
    argv: list[str],
    log: Path,
    before: Callable[[], None] | None = None,
    environment: dict[str, str] | None = None,
) -> int:
    """Fork a process that runs the command after `before()`; its output goes to `log`. Returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setpgid(0, 0)
        os.environ |= environment or {}
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if before is not None:
            before()
        code = main(argv)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def finish(pid: int) -> int:
    """The exit code of a process; negative for the signal that killed it."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # loader processes that outlive it
    return code


def result(run: Path) -> dict[str, Any]:
    """All that a finished run computed: losses, and every tensor of its checkpoint and its model as bytes."""
    (place,) = (run / "checkpoints").iterdir()
    found: dict[str, Any] = {"checkpoint": place.name}
    for group in sorted(GROUPS):
        found |= {
            f"{group}/{k}": v for k, v in checkpoint.read_tensors(place / f"{group}.safetensors").items()
        }
    found |= checkpoint.read_tensors(run / "model" / "model.safetensors")
    found = {k: v.numpy().tobytes() if isinstance(v, torch.Tensor) else v for k, v in found.items()}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
    return found


def difference(run: Path, wanted: dict[str, Any]) -> Failure:
    if left := [str(p) for p in run.rglob(".*")]:
        return f"left over: {left[0]}"
    found = result(run)
    if found.keys() != wanted.keys():
        return "other tensors"
    return next((f"{name} differs" for name, value in wanted.items() if found[name] != value), "")


class Place:
    """The campaign's data, and the uninterrupted run that all are compared with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["KINDIFF_CACHE"] = str(folder / "cache")
        self.data = str(folder / "data")
        if not Path(self.data).exists():
            pid = os.fork()
            if not pid:
                _draw(Path(self.data))
                os._exit(0)
            assert finish(pid) == 0
        self.seconds = 0.0
        began = time.monotonic()
        shutil.rmtree(folder / "reference", ignore_errors=True)
        assert self.go(folder / "reference") == 0, (folder / "log").read_text()
        self.seconds = time.monotonic() - began
        self.wanted = result(folder / "reference")

    @functools.cache  # noqa: B019
    def wanted_of_two(self, parallel: str) -> dict[str, Any]:
        """The uninterrupted run of two ranks."""
        out = self.folder / f"reference-{parallel}"
        shutil.rmtree(out, ignore_errors=True)
        assert self.go_two(out, parallel=parallel) == [0, 0], self.log()
        return result(out)

    def start_two(
        self, out: Path, before: Callable[[int], None] = lambda rank: None, **train: object
    ) -> list[int]:
        """Two ranks, each after before(rank), as a launcher starts them; the second's output goes to log-1."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        argv = self.command(out, **train)
        return [
            start(argv, self.folder / log, functools.partial(before, rank), place | {"RANK": str(rank)})
            for rank, log in enumerate(("log", "log-1"))
        ]

    def go_two(
        self, out: Path, before: Callable[[int], None] = lambda rank: None, **train: object
    ) -> list[int]:
        return [finish(pid) for pid in self.start_two(out, before, **train)]

    def command(self, out: Path, **train: object) -> list[str]:
        return arguments(out, self.data, **train)

    def start(self, out: Path, before: Callable[[], None] | None = None, **train: object) -> int:
        return start(self.command(out, **train), self.folder / "log", before)

    def go(self, out: Path, before: Callable[[], None] | None = None, **train: object) -> int:
        return finish(self.start(out, before, **train))

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def fresh(self) -> Path:
        out = self.folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        return out

    def resume(
        self, out: Path, counts: dict[str, Any], *, most: int = SAVE_EVERY, two: str = "", **train: object
    ) -> Failure:
        """Start the same command again; '' when it repeats at most `most` steps and ends as the uninterrupted run."""
        wanted = self.wanted_of_two(two) if two else self.wanted
        done = _last_step(out)
        if any(codes := self.go_two(out, parallel=two) if two else [self.go(out, **train)]):
            return f"exit codes {codes}: {self.log()[-300:]}"
        words = self.log().partition("resuming at step ")[2].split()
        if not (out / "model").exists() or "finished already" not in self.log():
            repeated = max(0, done - (int(words[0]) if words else 0))
            counts["most_steps_repeated"] = max(repeated, counts.get("most_steps_repeated", 0))
            if repeated > most:
                return f"{repeated} steps were repeated"
        return difference(out, wanted)


def _draw(target: Path) -> None:
    """A prepared set: avatars where the extra is installed, else noise of the same shape."""
    from kindiff.data.prepared import write_prepared

    try:
        from kindiff.config import DataConfig
        from kindiff.data import open_images

        images = open_images(DataConfig(source="avatars:base", size=16, per_class=40, classes=CLASSES))
        chunks = [(name, images.images[images.labels == i]) for i, name in enumerate(images.classes.names)]
        source = "avatars"
    except ImportError:
        random = np.random.default_rng(0)
        chunks = [(name, random.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)) for name in CLASSES]
        source = "noise"
    write_prepared(target, chunks, size=16, source=source)


def _last_step(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
    except (FileNotFoundError, ValueError):
        return 0


# Injection


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Operations:
    """Counts writes, syncs, renames, new and removed directories a thread; does something at one of them."""

    def __init__(self, at: tuple[str, int] | None = None, act: Callable[[], None] = kill_self) -> None:
        self.at, self.act = at, act
        self.seen: dict[str, list[str]] = {}

    def here(self, kind: str) -> bool:
        thread = threading.current_thread().name
        done = self.seen.setdefault(thread, [])
        done.append(kind)
        return (thread, len(done) - 1) == self.at

    def install(self) -> None:
        for owner, name, kind in (
            (os, "fsync", "sync"), (Path, "rename", "rename"), (Path, "mkdir", "mkdir"),
            (shutil, "rmtree", "rmtree"),
        ):  # fmt: skip
            setattr(owner, name, self._wrapped(getattr(owner, name), kind))
        path_open = Path.open

        def opened(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
            file = path_open(path, mode, *rest, **more)
            return _File(file, self) if mode in ("wb", "a") else file

        Path.open = opened  # type: ignore[method-assign,assignment]

    def _wrapped(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.here(kind):
                self.act()
            return function(*args, **kwargs)

        return call


class _File:
    """A file whose write can stop halfway."""

    def __init__(self, file: Any, operations: Operations) -> None:
        self.file, self.operations = file, operations

    def write(self, content: Any) -> Any:
        if self.operations.here("write"):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            self.operations.act()
        return self.file.write(content)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def operations_of_a_run(place: Place) -> dict[str, list[str]]:
    """Thread -> kinds of its operations, in order, of the uninterrupted run."""
    listing = place.folder / "operations.json"
    operations = Operations()

    def before() -> None:
        operations.install()
        real_exit = os._exit

        def leave(code: int) -> None:
            listing.write_text(json.dumps(operations.seen))
            real_exit(code)

        os._exit = leave  # type: ignore[assignment]

    assert place.go(place.fresh(), before) == 0
    seen: dict[str, list[str]] = json.loads(listing.read_text())
    return seen


def points(place: Place, short: bool) -> list[tuple[str, int, str]]:
    """(thread, number, kind): all of one save and of the main thread, and an even choice of the other saves."""
    seen = operations_of_a_run(place)
    whole = {"MainThread", "checkpoint 9"}
    chosen = [(t, i, kind) for t in sorted(whole) for i, kind in enumerate(seen[t])]
    rest = [(t, i, kind) for t in sorted(seen.keys() - whole) for i, kind in enumerate(seen[t])]
    if short:
        kinds = {kind: (t, i, kind) for t, i, kind in chosen}  # one of each kind
        return [*kinds.values(), *chosen[:: max(1, len(chosen) // 3)]][:8]
    return chosen + rest[:: max(1, len(rest) // 120)]


# Parts: each yields its cases as functions that return what was wrong


Case = Callable[[dict[str, Any]], Failure]


def kill_random(place: Place, short: bool) -> Iterator[Case]:
    """SIGKILL at times uniform over the run."""

    def case(i: int, counts: dict[str, Any]) -> Failure:
        out = place.fresh()
        pid = place.start(out)
        time.sleep(np.random.default_rng([1, i]).uniform(0, place.seconds))
        os.kill(pid, signal.SIGKILL)
        killed = finish(pid) == -signal.SIGKILL
        counts["killed_before_the_end"] = counts.get("killed_before_the_end", 0) + killed
        return place.resume(out, counts)

    for i in range(6 if short else 200):
        yield functools.partial(case, i)


def kill_operations(place: Place, short: bool) -> Iterator[Case]:
    """SIGKILL at every write (halfway), sync, rename, new and removed directory."""

    def case(thread: str, number: int, kind: str, counts: dict[str, Any]) -> Failure:
        out = place.fresh()
        code = place.go(out, Operations((thread, number)).install)
        if code != -signal.SIGKILL:
            return f"{thread} {number} was not reached (exit code {code})"
        counts[f"at_{kind}"] = counts.get(f"at_{kind}", 0) + 1
        return place.resume(out, counts)

    for thread, number, kind in points(place, short):
        yield functools.partial(case, thread, number, kind)


def slow_writes(place: Place, short: bool) -> Iterator[Case]:
    """SIGKILL while a checkpoint is written so slowly that training has to wait for it."""

    def case(step: int, counts: dict[str, Any]) -> Failure:
        out = place.fresh()

        def before() -> None:
            save = Run.save

            def slow(self: Run, number: int, *rest: Any, **more: Any) -> None:
                if number == step:
                    time.sleep(max(1.0, place.seconds / 2))
                    kill_self()
                save(self, number, *rest, **more)

            Run.save = slow  # type: ignore[method-assign]

        if (code := place.go(out, before)) != -signal.SIGKILL:
            return f"exit code {code}: {place.log()[-300:]}"
        return place.resume(out, counts)

    for step in (9,) if short else range(3, STEPS, 3):
        yield functools.partial(case, step)


def full_operations(place: Place, short: bool) -> Iterator[Case]:
    """The same operations fail with "no space left": the run says so in one sentence and goes on later."""

    def case(thread: str, number: int, counts: dict[str, Any]) -> Failure:
        out = place.fresh()
        code = place.go(out, Operations((thread, number), disk_full).install)
        text = place.log()
        if code != 1 or "Traceback" in text:
            return f"{thread} {number}: exit code {code}: {text[-300:]}"
        return place.resume(out, counts)

    chosen = points(place, short)
    for thread, number, _ in chosen if short else chosen[::4]:
        yield functools.partial(case, thread, number)


def stop_signals(place: Place, short: bool) -> Iterator[Case]:
    """SIGTERM and SIGINT at random times: exit 143 or 130 with nothing lost, also while a save is running."""

    def case(i: int, counts: dict[str, Any]) -> Failure:
        out, signum = place.fresh(), (signal.SIGTERM, signal.SIGINT)[i % 2]
        pid = place.start(out)
        while _last_step(out) < 1 + i % (STEPS - 10):
            time.sleep(0.001)
        os.kill(pid, signum)
        code, done = finish(pid), _last_step(out)
        if code != 128 + signum:
            return f"exit code {code}: {place.log()[-200:]}" if code or not (out / "model").exists() else ""
        newest = max((out / "checkpoints").iterdir()).name
        if newest != f"step-{done:08d}":
            return f"step {done} was done and {newest} is the newest"
        return place.resume(out, counts)

    for i in range(4 if short else 60):
        yield functools.partial(case, i)


def other_workers(place: Place, short: bool) -> Iterator[Case]:
    """Killed with one number of loader processes, resumed with another."""

    def case(i: int, counts: dict[str, Any]) -> Failure:
        out, workers = place.fresh(), ((0, 2), (2, 0), (1, 3), (3, 1))[i % 4]
        pid = place.start(out, workers=workers[0])
        while _last_step(out) < 1 + i % (STEPS - 5) and os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        finish(pid)
        return place.resume(out, counts, workers=workers[1])

    for i in range(1 if short else 30):
        yield functools.partial(case, i)


def damage(place: Place, short: bool) -> Iterator[Case]:
    """Each file of the newest checkpoint cut at several lengths, and with single bits flipped."""
    whole = place.folder / "two"
    shutil.rmtree(whole, ignore_errors=True)
    place.go(whole, Operations(("checkpoint 36", 0)).install)
    older, newest = sorted(whole.glob("checkpoints/step-*"))

    def case(name: str, kind: str, where: float, finished: bool, counts: dict[str, Any]) -> Failure:
        out = place.fresh()
        shutil.copytree(whole, out)
        path = out / "checkpoints" / newest.name / name
        content = bytearray(path.read_bytes())
        if kind == "cut":
            path.write_bytes(content[: int(where * len(content))])
        else:
            bit = int(where * 8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
        counts[kind] = counts.get(kind, 0) + 1
        if name == "state.json" and _same_json(path, newest / name):  # a final newline is no content
            counts["still_the_same_json"] = counts.get("still_the_same_json", 0) + 1
            return ""
        if finished:
            failure = place.resume(out, counts, most=STEPS)  # the newest is lost
            said = place.log()
        else:
            said, found = _newest(out)
            failure = "" if found == int(older.name.removeprefix("step-")) else f"took step {found}"
        # A flipped bit in state.json may look like damage of the file whose hash it records: its directory is named.
        named = path.parent if name == "state.json" else path
        return failure or (
            "" if f"passing over a checkpoint: {named}" in said else f"not named: {named.name}"
        )

    random = np.random.default_rng(4)
    for name in sorted(p.name for p in newest.iterdir()):
        cuts = [0.0, 0.5] if short else [0.0, 1e-9, 0.01, 0.1, 0.5, 0.9, 0.999999]
        for j, where in enumerate([*cuts, *random.uniform(0, 1, 2 if short else 60)]):
            kind = "cut" if j < len(cuts) else "flip"
            yield functools.partial(case, name, kind, float(where), j == 1 if short else j % 20 == 1)


def _same_json(path: Path, other: Path) -> bool:
    try:
        return json.loads(path.read_bytes()) == json.loads(other.read_bytes())
    except ValueError:
        return False


def _newest(out: Path) -> tuple[str, int]:
    described = checkpoint.read_json(out / "run.json")["description"]
    with contextlib.redirect_stderr(io.StringIO()) as said, Run(out, described) as run:
        found = run.newest()
    return said.getvalue(), found[0] if found else -1


def small_disk(place: Place, short: bool) -> Iterator[Case]:
    """Files limited in length (RLIMIT_FSIZE), and a small tmpfs: said in a sentence; with room, it goes on."""
    sizes = [
        p.stat().st_size for p in sorted((place.folder / "reference" / "checkpoints").rglob("*.safetensors"))
    ]

    def limited(limit: int, counts: dict[str, Any]) -> Failure:
        def before() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        out = place.fresh()
        code = place.go(out, before)
        if code != 1 or "too large" not in place.log() or "Traceback" in place.log():
            return f"limit {limit}: exit code {code}: {place.log()[-300:]}"
        return place.resume(out, counts)

    for share in [0.5] if short else np.linspace(0.05, 0.98, 12):
        yield functools.partial(limited, int(max(sizes) * share))

    def on_tmpfs(room: float, counts: dict[str, Any]) -> Failure:
        disk = place.folder / "disk"
        disk.mkdir(exist_ok=True)
        size = int(sum(sizes) * room)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if (
            shutil.which("mount") is None
            or subprocess.run(mount, capture_output=True, check=False).returncode
        ):
            counts["tmpfs_not_permitted"] = counts.get("tmpfs_not_permitted", 0) + 1
            return ""
        try:
            out = disk / "run"
            code, text = place.go(out), place.log()
            if code != 1 or "the disk is full" not in text or "Traceback" in text:
                return f"tmpfs of {size}: exit code {code}: {text[-300:]}"
            subprocess.run(["mount", "-o", f"remount,size={sum(sizes) * 20}", str(disk)], check=True)
            counts["tmpfs"] = counts.get("tmpfs", 0) + 1
            return place.resume(out, counts)
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    for room in [2.5] if short else [0.5, 1.2, 1.9, 2.2, 2.5, 2.8]:
        yield functools.partial(on_tmpfs, room)


def not_finite(place: Place, short: bool) -> Iterator[Case]:
    """NaN in the loss, a gradient, a weight, an input, the average: never stepped; the end is that of a run which
    left the window out."""

    def reference(first: int, window: int) -> dict[str, Any]:
        out = place.folder / f"without-{first}-{window}"
        if not (out / "model").exists():
            shutil.rmtree(out, ignore_errors=True)
            left_out = [Window(first=first, end=first + window, cause="", capsule="")]
            assert place.go(out, lambda: setattr(loop, "read_windows", lambda _: left_out)) == 0
        return result(out)

    def case(kind: str, step: int, window: int, kill: bool, counts: dict[str, Any]) -> Failure:
        out = place.fresh()
        poison = functools.partial(_poison, kind, step)
        if kill:  # right after the list is written, before the run has gone back

            def before() -> None:
                poison()
                loop.roll_back = lambda *a: (real(*a), kill_self())  # type: ignore[assignment]

            real = loop.roll_back
            if (code := place.go(out, before, skip_window=window)) != -signal.SIGKILL:
                return f"exit code {code}: {place.log()[-300:]}"
        code = place.go(out, poison, skip_window=window)
        if code:
            return f"exit code {code}: {place.log()[-300:]}"
        windows = checkpoint.read_json(out / "rollbacks.json")["windows"]
        if [w["first"] for w in windows] != [_found_at(kind, step)]:
            return f"windows {windows}"
        counts[kind] = counts.get(kind, 0) + 1
        if failure := difference(out, reference(windows[0]["first"], window)):
            return failure
        return "" if _replayed(place, out / windows[0]["capsule"]) else f"replay: {place.log()[-300:]}"

    kinds = ("loss", "gradient", "weight", "input", "average")
    steps = (7,) if short else (0, 3, 7, 18, 24, 36)
    for kind, step in itertools.product(kinds, steps):
        yield functools.partial(case, kind, step, 4, False)
    for step in () if short else (7, 24):
        yield functools.partial(case, "input", step, 3, True)


def _found_at(kind: str, step: int) -> int:
    """The step that is not taken: a bad average shows when it is to be saved, a bad weight at the step after."""
    every = -(-SAVE_EVERY // 2)
    return step if kind != "average" else step - step % every + every - 1


def _poison(kind: str, step: int) -> None:
    """Replace what the loop calls: at one step (the first time, but for the input: data stays bad) there is a NaN."""
    calls = itertools.count()
    make = loop.batches

    def batches(*args: Any, first_step: int, **kwargs: Any) -> Any:
        left_out = kwargs.get("left_out", ())
        numbers = (s for s in itertools.count(first_step) if not any(s in w for w in left_out))
        for number, batch in zip(numbers, make(*args, first_step=first_step, **kwargs), strict=False):
            if number == step and kind == "input":
                batch.x_BCHW[0, 0, 0, 0] = float("nan")
            elif number == step and next(calls) == 0:
                now[0] = True
            yield batch

    now = [False]
    loop.batches = batches  # type: ignore[assignment]
    real_loss = loop.loss_of

    def loss_of(config: Any) -> Any:
        function = real_loss(config)

        def loss(predict: Any, *rest: Any) -> Any:
            value = function(predict, *rest)
            if now[0] and kind in ("loss", "gradient"):
                now[0] = False
                # finite with a gradient that is not: sqrt at zero
                return (
                    value * float("nan") if kind == "loss" else value + (value - value.detach()).abs().sqrt()
                )
            return value

        return loss

    loop.loss_of = loss_of  # type: ignore[assignment]
    real_train = loop._train

    def train(job: Any, state: Any, *rest: Any) -> None:
        update, forward = state.ema.update, state.model.forward

        def spoiled(number: int) -> None:
            update(number)
            if now[0] and kind == "average":
                now[0] = False
                next(iter(state.ema.average.values())).view(-1)[0] = float("nan")

        def poisoned(*args: Any) -> Any:
            if now[0] and kind == "weight":
                now[0] = False
                with torch.no_grad():
                    state.model.patch_embed.weight[0, 0] = float("nan")
            return forward(*args)

        state.ema.update, state.model.forward = spoiled, poisoned
        try:
            real_train(job, state, *rest)
        finally:
            state.ema.update, state.model.forward = update, forward

    loop._train = train  # type: ignore[assignment]


def _replayed(place: Place, capsule: Path) -> bool:
    code = finish(start(["replay", str(capsule)], place.folder / "log"))
    return code == 0 and "finding" in place.log()


def broken_images(place: Place, short: bool) -> Iterator[Case]:
    """A folder of which a tenth is broken: all listed, nothing else; training is that of the good images alone."""

    def case(counts: dict[str, Any]) -> Failure:
        from PIL import Image

        total, bad = (200, 20) if short else (5000, 500)
        mixed, good = place.folder / "mixed", place.folder / "good"
        for folder in (mixed, good):
            shutil.rmtree(folder, ignore_errors=True)
        random = np.random.default_rng(5)
        broken = set(random.choice(total, bad, replace=False).tolist())
        wanted = set()
        for i in range(total):
            name = f"{CLASSES[i % 4]}/{i:05d}.png"
            for folder in (mixed, good):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(mixed / name)
            if i in broken:
                wanted.add(name)
                _break(mixed / name, i, mixed / f"{CLASSES[0]}")
            else:
                shutil.copy(mixed / name, good / name)
        before = place.folder / "log"
        if finish(start(["data", "check", str(mixed)], before)):
            return f"data check: {place.log()[-300:]}"
        listed = {e["file"] for e in checkpoint.read_json(mixed / "quarantine.json")["files"]}
        counts |= {"images": total, "broken": bad, "listed": len(listed & wanted)}
        if listed != wanted:
            return f"{len(wanted - listed)} not listed, {len(listed - wanted)} listed and whole"
        for folder in (mixed, good):
            shutil.rmtree(place.folder / f"run-{folder.name}", ignore_errors=True)
            if finish(start(arguments(place.folder / f"run-{folder.name}", str(folder)), before)):
                return place.log()[-300:]
        return difference(place.folder / "run-mixed", result(place.folder / "run-good"))

    yield case


def _break(path: Path, i: int, others: Path) -> None:
    """One of six sorts of broken file."""
    from PIL import Image

    content, sort = path.read_bytes(), i % 6
    if sort == 0:
        path.write_bytes(b"")
    elif sort == 1:
        path.write_bytes(content[: len(content) // 2])
    elif sort == 2:
        path.write_bytes(b"<html>not found</html>")
    elif sort == 3:  # the bytes of an image that comes before it
        Image.new("RGB", (20, 20), (1, 2, 3)).save(path)
        first = others / ".." / CLASSES[0] / "00000-first.png"
        if not first.exists():
            shutil.copy(path, first)
            good = others.parent.parent / "good" / CLASSES[0]
            shutil.copy(first, good / first.name)
    elif sort == 4:
        Image.fromarray(np.ones((20, 20), np.int32)).save(path, format="TIFF")
    else:
        Image.new("1", (20000, 20000)).save(path)


def soak(place: Place, short: bool) -> Iterator[Case]:
    """Many steps and checkpoints: resident memory and open files after a tenth and at the end; how long saves stall."""

    def case(counts: dict[str, Any]) -> Failure:
        out = place.fresh()
        steps, every = (200, 10) if short else (10_000, 50)
        facts = place.folder / "soak.json"
        facts.unlink(missing_ok=True)

        def before() -> None:
            samples: list[tuple[int, int, int]] = []
            writes: list[float] = []
            real, wait, save = loop.Saver.save, loop.Saver.wait, Run.save

            def watched(self: Any, step: int, tensors: Any, *, last: bool = False) -> None:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                samples.append(
                    (step, pages * resource.getpagesize(), len(list(Path("/proc/self/fd").iterdir())))
                )
                real(self, step, tensors, last=last)
                if last:
                    wait(self)
                    written = {"samples": samples, "waits": self.waits, "writes": writes}
                    facts.write_text(json.dumps(written))

            def timed(self: Any, *args: Any, **kwargs: Any) -> None:
                began = time.monotonic()
                save(self, *args, **kwargs)
                writes.append(time.monotonic() - began)

            loop.Saver.save, Run.save = watched, timed  # type: ignore[method-assign]

        began = time.monotonic()
        if code := place.go(out, before, steps=steps, save_every=every, batch=2, log_every=50):
            return f"exit code {code}: {place.log()[-300:]}"
        found = json.loads(facts.read_text())
        samples = [s for s in found["samples"] if s[0] >= steps // 10]
        memory, files = [s[1] for s in samples], [s[2] for s in samples]
        counts |= {
            "steps": steps, "checkpoints": len(found["samples"]), "seconds": round(time.monotonic() - began, 1),
            "resident_mib_after_a_tenth": round(memory[0] / 2**20, 1),
            "resident_mib_at_the_end": round(memory[-1] / 2**20, 1), "resident_mib_most": round(max(memory) / 2**20, 1),
            "open_files_after_a_tenth": files[0], "open_files_most": max(files),
            "training_waits_for_a_save_ms": {
                "median": round(1e3 * float(np.median(found["waits"])), 2),
                "most": round(1e3 * max(found["waits"]), 2),
            },
            "a_save_takes_ms": {
                "median": round(1e3 * float(np.median(found["writes"])), 2),
                "most": round(1e3 * max(found["writes"]), 2),
            },
        }  # fmt: skip
        if max(files) > files[0] + 2:  # a save that is running has a file or two open
            return f"open files grow: {files[0]} to {max(files)}"
        grown = memory[-1] - memory[0]
        return f"memory grows by {grown} bytes" if grown > 16 * 2**20 else ""

    yield case


def two_ranks_killed(place: Place, short: bool) -> Iterator[Case]:
    """SIGKILL of the first, the second or both of two ranks: after random steps, and in the first one's saver."""

    def case(i: int, how: str, counts: dict[str, Any]) -> Failure:
        out, who = place.fresh(), ((0,), (1,), (0, 1))[i % 3]
        random = np.random.default_rng([9, i])
        step = int(random.integers(0, STEPS - 3))
        pids = place.start_two(out, parallel=how)
        while _last_step(out) < step and os.waitpid(pids[0], os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.03))
        for rank in who:
            os.kill(pids[rank], signal.SIGKILL)
        codes = [finish(pid) for pid in pids]  # the other one ends by itself
        _count(counts, "killed_before_the_end", any(codes[rank] == -signal.SIGKILL for rank in who))
        return place.resume(out, counts, two=how)

    def in_the_saver(number: int, counts: dict[str, Any]) -> Failure:
        out = place.fresh()

        def before(rank: int) -> None:
            if rank == 0:
                Operations(("checkpoint 9", number)).install()

        codes = place.go_two(out, before)
        if codes[0] != -signal.SIGKILL:
            return f"exit codes {codes}"
        _count(counts, "killed_in_the_saver")
        return place.resume(out, counts, two="ddp")

    for i in range(1 if short else 16):
        yield functools.partial(case, i + short, "fsdp" if i % 4 == 3 else "ddp")
    for number in (120,) if short else (0, 60, 120, 180, 240):
        yield functools.partial(in_the_saver, number)


def two_ranks_stopped(place: Place, short: bool) -> Iterator[Case]:
    """SIGTERM and SIGINT to one of two ranks, or to both: both end after the same step, with 143 or 130."""

    def case(i: int, counts: dict[str, Any]) -> Failure:
        out, signum = place.fresh(), (signal.SIGTERM, signal.SIGINT)[i % 2]
        pids = place.start_two(out)
        while _last_step(out) < 1 + 5 * i:
            time.sleep(0.001)
        for rank in ((1,), (0,), (0, 1))[i % 3]:
            os.kill(pids[rank], signum)
        codes, done = [finish(pid) for pid in pids], _last_step(out)
        if codes != [128 + signum] * 2:
            return f"exit codes {codes}: {place.log()[-300:]}"
        if (newest := max((out / "checkpoints").iterdir()).name) != f"step-{done:08d}":
            return f"step {done} was done and {newest} is the newest"
        return place.resume(out, counts, two="ddp")

    for i in range(1 if short else 6):
        yield functools.partial(case, i)


def two_ranks_not_finite(place: Place, short: bool) -> Iterator[Case]:
    """NaN on one of two ranks: neither steps; the end is that of two ranks that left the window out."""

    def reference(first: int, window: int) -> dict[str, Any]:
        out = place.folder / f"two-without-{first}-{window}"

        def before(rank: int) -> None:
            loop.read_windows = lambda _: [Window(first=first, end=first + window, cause="", capsule="")]

        if not (out / "model").exists():
            shutil.rmtree(out, ignore_errors=True)
            assert place.go_two(out, before) == [0, 0], place.log()
        return result(out)

    def case(kind: str, step: int, bad_rank: int, counts: dict[str, Any]) -> Failure:
        out = place.fresh()

        def before(rank: int) -> None:
            if rank == bad_rank:
                _poison(kind, step)

        if any(codes := place.go_two(out, before, skip_window=4)):
            return f"exit codes {codes}: {place.log()[-300:]}"
        windows = checkpoint.read_json(out / "rollbacks.json")["windows"]
        if [w["first"] for w in windows] != [_found_at(kind, step)]:
            return f"windows {windows}"
        _count(counts, kind)
        if failure := difference(out, reference(windows[0]["first"], 4)):
            return failure
        return "" if _replayed(place, out / windows[0]["capsule"]) else f"replay: {place.log()[-300:]}"

    for i, kind in enumerate(("input", "loss", "gradient", "weight", "average")[: 1 if short else None]):
        for step in (7,) if short else (7, 24):
            yield functools.partial(case, kind, step, 1 if step == 7 else i % 2)


def _count(counts: dict[str, Any], name: str, times: int = 1) -> None:
    counts[name] = counts.get(name, 0) + int(times)


def fuzz(place: Place, short: bool) -> Iterator[Case]:
    """Mutated descriptions, headers, recipes, lists: refused in one of our sentences, in time, without memory."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import fuzzing

    seeds = place.folder / "seeds"
    if not (seeds / "done").exists():
        pid = os.fork()
        if not pid:
            try:
                fuzzing.make_seeds(seeds)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        assert finish(pid) == 0
    for i in range(1 if short else 100):
        yield functools.partial(fuzzing.batch_in_child, seeds, i, 3000 if short else 10_000)


PARTS = (
    kill_random, kill_operations, slow_writes, full_operations, stop_signals, other_workers, damage, small_disk,
    not_finite, broken_images, soak, fuzz, two_ranks_killed, two_ranks_stopped,
    two_ranks_not_finite,
)  # fmt: skip


def campaign(out: Path, work: Path, *, short: bool, parts: list[str], seconds: float) -> bool:
    """Go on with the campaign for some seconds (0: to its end); True when every case so far held."""
    facts: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    facts |= {
        "form": "short" if short else "long", "versions": runtime.versions(), "hardware": runtime.hardware(),
        "run": f"DiT-T/4, {STEPS} steps of {BATCH} at 16 px, a checkpoint every {SAVE_EVERY}",
    }  # fmt: skip
    place, began = Place(work), time.monotonic()
    facts["uninterrupted_seconds"] = round(place.seconds, 2)
    for part in PARTS:
        name = part.__name__
        so_far = facts.setdefault("parts", {}).setdefault(
            name, {"done": 0, "held": 0, "failures": [], "seen": {}}
        )
        if name not in parts or so_far.get("complete"):
            continue
        for number, case in enumerate(part(place, short)):
            if number < so_far["done"]:
                continue
            if seconds and time.monotonic() - began > seconds:
                return _all_held(facts)
            failure = case(so_far["seen"])
            so_far["done"] += 1
            so_far["held"] += not failure
            if failure:
                so_far["failures"].append(f"case {number}: {failure}")
                print(f"{name} case {number}: {failure}", file=sys.stderr)
            checkpoint.write_json(out, facts)
        so_far["complete"] = True
        print(f"{name}: {so_far['held']} of {so_far['done']} held {so_far['seen']}", file=sys.stderr)
        checkpoint.write_json(out, facts)
    return _all_held(facts)


def _all_held(facts: dict[str, Any]) -> bool:
    return all(part["held"] == part["done"] for part in facts["parts"].values())


def table(facts: dict[str, Any]) -> str:
    """The figures as the table of docs/reliability.md."""
    rows = ["| part | cases | held | seen |", "|---|---|---|---|"]
    for part in PARTS:
        found = facts["parts"].get(part.__name__, {"done": 0, "held": 0, "seen": {}})
        seen = "; ".join(
            f"{k.replace('_', ' ')} {_words(v)}" for k, v in found["seen"].items() if k != "inputs_by_file"
        )
        rows.append(f"| {part.__name__} | {found['done']} | {found['held']} | {seen} |")
    return "\n".join(rows)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)
    )


def command() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.__name__ for part in PARTS]
    parser.add_argument("--short", action="store_true", help="the form of the test suite")
    parser.add_argument("--part", action="append", choices=names, help="only this part; may be given again")
    parser.add_argument("--seconds", type=float, default=0, help="stop after so many; run again to go on")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "faults.json")
    parser.add_argument(
        "--work", type=Path, default=None, help="folder for the runs (default: a temporary one)"
    )
    parser.add_argument("--table", action="store_true", help="print what is in --out as a table, and end")
    asked = parser.parse_args()
    if asked.table:
        print(table(json.loads(asked.out.read_text())))
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        held = campaign(asked.out, work, short=asked.short, parts=asked.part or names, seconds=asked.seconds)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(command())
