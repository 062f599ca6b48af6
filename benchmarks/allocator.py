"""Steps in processes of their own that keep freed memory and in ones that do not, taking turns (CPU, glibc, fp32).

    python benchmarks/allocator.py

Guided sampling steps, or training steps, of dense models and of components: milliseconds a step (median) and page
faults a step of each process, and how many times as fast keeping is (ratio of the medians over the processes). Results
go to benchmarks/results/allocator.json.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from models import guided_run, make, step_run
from speed import sampler, save

from kindiff.allocator import keep_memory

DEVICE = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Args:
    models: tuple[str, ...] = ("DiT-S", "DiT-B")
    """Which."""
    modes: tuple[Literal["sample", "train"], ...] = ("sample",)
    """What they do."""
    batch: int = 8
    """Images a batch (256 tokens each); guidance doubles them."""
    steps: int = 4
    """Timed steps of a process."""
    processes: int = 3
    """Of each kind."""
    one: tuple[str, ...] = ()
    """One process's part: model, variant, train or sample, keep or leave."""
    out: Path | None = None
    """Where the JSON goes."""


def step(args: Args, name: str, variant: str, mode: str, keep: str) -> None:
    """One process's measurement, printed as two numbers."""
    if keep == "keep":
        assert keep_memory(), "needs glibc, and no MALLOC_ settings of its own in the environment"
    model = make(name, variant)
    if mode == "train":
        run = step_run(model, model.config, args.batch, torch.float32, DEVICE)
    else:
        run = guided_run(model, model.config, args.batch, DEVICE, False)
    times = []
    with sampler(torch.float32, DEVICE) if mode == "sample" else contextlib.nullcontext():
        run()
        run()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(args.steps):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(1e3 * statistics.median(times), faults / args.steps)


def main(args: Args) -> None:
    if args.one:
        step(args, *args.one)
        return
    rest, rows = ["--batch", str(args.batch), "--steps", str(args.steps)], []
    for name, variant, mode in itertools.product(args.models, ("dense", "kind"), args.modes):
        found: dict[str, list[list[float]]] = {"leave": [], "keep": []}
        for _ in range(args.processes):
            for keep, processes in found.items():
                command = [sys.executable, __file__, *rest, "--one", name, variant, mode, keep]
                text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                processes.append([float(number) for number in text.split()])
        left, kept = (statistics.median(ms for ms, _ in processes) for processes in found.values())
        row = {"what": f"{name}/2", "variant": variant, "mode": mode, "leave / keep": left / kept}
        rows.append(row | {f"{keep}: milliseconds, page faults": numbers for keep, numbers in found.items()})
        print(json.dumps(rows[-1]), flush=True)
        save("allocator", DEVICE, args.out, rows=rows, batch=args.batch, steps=args.steps)  # as it comes


if __name__ == "__main__":
    main(tyro.cli(Args))
