"""Hours that studies take here, from measured parts: pre-training, training, drawing and scoring of every method.

    python benchmarks/study_hours.py

Every base and every method is trained for some steps and scored on some images, in as many processes side by side as
`kindiff study run --workers` would have, cores shared out as there. What that is multiplied with is what the records of
the studies say was done: trainings, their steps, images scored (validation only where a rate is chosen); a training is
taken to grow with its steps and a score with its images. Results go to benchmarks/results/study-hours.json, the parts
too (seconds; under `again` what `kindiff study repeat` does).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from speed import save

from kindiff.allocator import keep_memory
from kindiff.config import TrainConfig
from kindiff.data import open_images
from kindiff.evaluate.lite0 import Lite0Features
from kindiff.progress import Track
from kindiff.study.cells import Bench, logged
from kindiff.study.config import Cell, Study, read_study
from kindiff.study.records import Figures, read_records

ROOT = Path(__file__).parents[1]
STUDIES = tuple(ROOT / "studies" / name for name in ("novel", "shift", "convergence", "sizes", "diversion"))
Parts = dict[str, float]
Piece = tuple[Path, str, str]
"""A study, a base or a task, and a method or nothing."""


@dataclass(frozen=True, kw_only=True)
class Args:
    studies: tuple[Path, ...] = STUDIES
    """Which; their results say what is to be done."""
    workers: int = 2
    """Processes side by side."""
    steps: int = 40
    """Of each training."""
    per_class: int = 5
    """Images of a class that are drawn and scored; then three times as many."""
    methods: tuple[str, ...] = ()
    """These alone, and their bases."""
    out: Path | None = None
    """Where the JSON goes."""


def shortened(study: Study, steps: int) -> Study:
    """The study with trainings of few steps."""

    def short(train: TrainConfig) -> TrainConfig:
        return replace(train, steps=steps, warmup=min(train.warmup, steps // 2))

    bases = {name: replace(recipe, train=short(recipe.train)) for name, recipe in study.bases.items()}
    tasks = {name: replace(task, train=short(task.train)) for name, task in study.tasks.items()}
    return replace(study, bases=bases, tasks=tasks)


@functools.cache
def bench_of(folder: Path, work: Path, steps: int) -> Bench:
    """A process's bench of a study."""
    keep_memory()
    study = shortened(read_study(folder), steps)
    return Bench(study=study, work=work, features=Lite0Features.load(device="cpu"), device="cpu")


def base_parts(piece: Piece, work: Path, args: Args) -> tuple[Piece, Parts]:
    """Seconds of a base's step, and of its pre-training besides."""
    folder, base, _ = piece
    start = time.perf_counter()
    bench_of(folder, work, args.steps).prepare(base)
    whole, training = time.perf_counter() - start, logged(work / "bases" / base)[0]
    return piece, {"step": training / args.steps, "start": whole - training}


def method_parts(piece: Piece, work: Path, args: Args) -> tuple[Piece, Parts]:
    """Seconds of a step, of a training besides, of an image drawn and scored, of a score besides."""
    folder, task, method = piece
    bench = bench_of(folder, work, args.steps)
    study = bench.study
    bench.reference(study.tasks[task].test)  # made once, not for each score
    start = time.perf_counter()
    record = bench.train(
        Cell(task=task, method=method, lr=study.rates(task, method)[0], seed=study.config.seeds[-1])
    )
    whole = time.perf_counter() - start
    found = []
    for per_class in (args.per_class, args.per_class, 3 * args.per_class):  # the first for what is made once
        some = replace(bench, study=replace(study, config=replace(study.config, test_per_class=per_class)))
        start = time.perf_counter()
        count = Figures.of(some.score(record, "test")).count
        found.append((count, time.perf_counter() - start))
    _, (few, before), (more, after) = found
    image = (after - before) / (more - few)
    return piece, {
        "step": record.train_seconds / args.steps,
        "start": whole - record.train_seconds,
        "image": image,
        "score": max(before - image * few, 0.0),
    }


def parts_of(study: Study, seconds: dict[str, Parts]) -> Iterator[tuple[str, float, bool]]:
    """Of each training and score of a study's records: which it is, its seconds, and whether a repetition does it."""
    pairs = study.pairs()
    for record in read_records(study.results):
        if (record.task, record.method) not in pairs or record.method not in seconds:
            continue
        part = seconds[record.method]
        again = record.test is not None
        yield "trainings", part["start"] + record.steps * part["step"], again
        if record.validation is not None and study.chooses(record.cell):
            yield "scores", part["score"] + record.validation.count * part["image"], False
        if record.test is not None:
            yield "scores", part["score"] + record.test.count * part["image"], True


def main(args: Args) -> None:
    threads = max(1, (os.cpu_count() or 1) // args.workers)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}  # of the processes
    studies = {path: read_study(path) for path in args.studies}
    methods: list[Piece] = []
    bases: dict[str, Piece] = {}
    for path, study in studies.items():
        for task in study.tasks.values():
            open_images(task.data)  # drawn once; and a folder that is not there is missed now
        first = {method: task for task, method in reversed(study.pairs())}
        picked = {m: t for m, t in first.items() if not args.methods or m in args.methods}
        methods += [(path, task, method) for method, task in picked.items()]
        bases |= {study.methods[m].base: (path, study.methods[m].base, "") for m in picked}

    base_seconds: dict[str, Parts] = {}
    seconds: dict[Path, dict[str, Parts]] = {path: {} for path in studies}
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, spawn.Pool(args.workers) as pool:
        work = Path(folder)
        with Track("study hours", len(bases) + len(methods), unit="measured") as track:
            measured = functools.partial(base_parts, work=work, args=args)
            for (_, base, _), parts in pool.imap_unordered(measured, bases.values()):
                base_seconds[base] = parts
                track.advance(1)
            measured = functools.partial(method_parts, work=work, args=args)
            for (path, _, method), parts in pool.imap_unordered(measured, methods):
                seconds[path][method] = parts
                track.advance(1)

    rows = []
    for path, study in studies.items():
        every: Counter[str] = Counter()
        again: Counter[str] = Counter()
        for kind, took, repeated in parts_of(study, seconds[path]):
            every[kind] += took / 3600
            again[kind] += took / 3600 if repeated else 0.0
        rows.append({"study": study.name, "hours": dict(every), "again": dict(again)})
    steps = {base: studies[piece[0]].bases[base].train.steps for base, piece in bases.items()}
    training = sum(part["start"] + steps[base] * part["step"] for base, part in base_seconds.items()) / 3600
    for row in rows:
        print(
            f"{row['study']:<12} trainings {row['hours']['trainings']:.2f}  scores {row['hours']['scores']:.2f}  "
            f"(what a repetition does: {row['again']['trainings']:.2f} and {row['again']['scores']:.2f})"
        )
    totals = {key: training + sum(sum(row[key].values()) for row in rows) for key in ("hours", "again")}
    side_by_side = {key: total / args.workers for key, total in totals.items()}
    print(
        f"pre-trainings {training:.2f}; all {totals['hours']:.1f} hours of one process, {side_by_side['hours']:.1f} of "
        f"{args.workers} side by side; a repetition {totals['again']:.1f} and {side_by_side['again']:.1f}"
    )
    parts = {study.name: seconds[path] for path, study in studies.items()}
    save(
        "study-hours", torch.device("cpu"), args.out, rows=rows, pretraining=training, hours=totals, parts=parts,
        bases=base_seconds, workers=args.workers, threads=threads,
    )  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Args))
