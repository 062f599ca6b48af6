"""Running a study: processes that each take the next cell nobody is at, until none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kindiff import runtime
from kindiff.progress import Track, say
from kindiff.study.cells import Bench
from kindiff.study.config import Study
from kindiff.study.grid import Work, left, progress
from kindiff.study.records import read_records

PAUSE = 2.0
"""Seconds between looks at what the others have done."""


def pending(study: Study, only: Sequence[str]) -> list[Work]:
    """What is left to do; `only`: see Study.picks."""
    return [
        w for w in left(study, read_records(study.results)) if study.picks(w.cell.task, w.cell.method, only)
    ]


def run_alone(study: Study, work: Path, *, only: tuple[str, ...] = ()) -> None:
    """Do what is left in this process, beside others that may be doing the same."""
    works = pending(study, only)
    if not works:
        return
    from kindiff.evaluate.lite0 import Lite0Features

    device = str(runtime.device_of("auto"))
    bench = Bench(study=study, work=work, features=Lite0Features.load(device=device), device=device)
    while works:
        for piece in works:
            if bench.do(piece):
                break
        else:
            time.sleep(PAUSE)  # the rest is in other hands
        works = pending(study, only)


def run_workers(
    study: Study, work: Path, *, workers: int, command: Sequence[str], only: tuple[str, ...] = ()
) -> int:
    """Several processes that each run `command` (one that ends in run_alone of `only`), threads and GPUs shared out
    among them; returns the number that failed, each of which is told of at once.

    Each writes what it says to WORK/STUDY/worker-I.log. Asked to end (SIGTERM), it ends them too; the same call goes on
    where they were.
    """
    import torch

    logs = work / study.name
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // workers)
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = [names[i] if i < len(names) and names[i] else str(i) for i in range(torch.cuda.device_count())]
    processes: dict[Path, subprocess.Popen[bytes]] = {}
    failed: set[Path] = set()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for i in range(workers):
            own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
            if gpus:
                own["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)]
            path = logs / f"worker-{i}.log"
            with path.open("a") as log:
                processes[path] = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)
        already, units = progress(study, read_records(study.results), only)
        with Track(study.name, units, unit="cells", done=already) as track:
            while any(process.poll() is None for process in processes.values()):
                time.sleep(PAUSE)
                now, track.total = progress(study, read_records(study.results), only)
                if now != track.done:
                    track.advance(now - track.done)
                for path, process in processes.items():
                    if process.poll() and path not in failed:
                        failed.add(path)
                        say(f"a worker failed, {path} says why; the others go on")
    finally:
        for process in processes.values():
            process.terminate()  # it saves its checkpoint; nothing where it has ended
        codes = [process.wait() for process in processes.values()]
        signal.signal(signal.SIGTERM, before)
    return sum(code != 0 for code in codes)
