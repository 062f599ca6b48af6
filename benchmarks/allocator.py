"""Steps in processes of their own that keep freed memory and in ones that do not, taking turns (CPU, glibc, fp32).

    python benchmarks/allocator.py

Training and guided sampling steps of dense models and of components, printed: milliseconds a step (median) and page
faults a step of each process, and how many times as fast keeping is (ratio of the medians over the processes).
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
import tyro
from models import guided_run, make, step_run
from speed import model_pair, sampler

from kindiff.allocator import keep_memory

DEVICE = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Args:
    models: tuple[str, ...] = ("DiT-S", "DiT-B")
    """Which."""
    batch: int = 8
    """Images a batch (256 tokens each); guidance doubles them."""
    steps: int = 4
    """Timed steps of a process."""
    processes: int = 3
    """Of each kind."""
    one: tuple[str, ...] = ()
    """One process's part: model, variant, train or sample, keep or not."""


def step(args: Args, name: str, variant: str, mode: str, keep: str) -> None:
    """One process's measurement, printed as two numbers."""
    if keep == "keep":
        assert keep_memory(), "needs glibc, and no MALLOC_ settings of its own in the environment"
    model = make(name, variant)
    config = model_pair(name, 1, depth=1)[0].config
    if mode == "train":
        run = step_run(model, config, args.batch, torch.float32, DEVICE)
    else:
        run = guided_run(model, config, args.batch, DEVICE, False)
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
    rest = ["--batch", str(args.batch), "--steps", str(args.steps)]
    for name in args.models:
        for variant in ("dense", "kind"):
            for mode in ("train", "sample"):
                found: dict[str, list[tuple[float, float]]] = {"leave": [], "keep": []}
                for _ in range(args.processes):
                    for keep, rows in found.items():
                        command = [sys.executable, __file__, *rest, "--one", name, variant, mode, keep]
                        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                        milliseconds, faults = map(float, text.split())
                        rows.append((milliseconds, faults))
                left, kept = (statistics.median(row[0] for row in rows) for rows in found.values())
                print(f"{name}/2 {variant} {mode}: {left / kept:.2f}")
                for keep, rows in found.items():
                    print(
                        f"    {keep:<6}",
                        ", ".join(f"{ms:.0f} ms {n:.0f} faults" for ms, n in rows),
                        flush=True,
                    )


if __name__ == "__main__":
    main(tyro.cli(Args))
