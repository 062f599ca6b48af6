"""kindiff study"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from kindiff.errors import UsageError
from kindiff.progress import say

if TYPE_CHECKING:
    from kindiff.study.config import Study


@dataclass(frozen=True, kw_only=True)
class Args:
    """Compare methods: tasks x methods x learning rates x seeds, described by a folder of TOML files. To resume, run
    the same command again; several may run at once, on machines that share the folders."""

    action: tyro.conf.Positional[Literal["run", "table", "plot", "plan", "repeat"]]
    """run: train and score what is missing. table: Markdown tables of the results. plot: figures (PNG). plan: what is
    left to do, and how long it takes. repeat: train and score again what the tables show, each method at its chosen
    rate, below WORK, and print both side by side; the study's results stay as they are."""
    study: tyro.conf.Positional[Path]
    """The study's folder, with study.toml, tasks/ and methods/; results go to STUDY/results."""
    work: Path = Path("runs/studies")
    """Working folder of bases, runs and models."""
    workers: int = 1
    """Processes; cores and GPUs are shared out among them."""
    only: tuple[str, ...] = ()
    """Only these tasks and methods, by name; tasks alone stand for all of their methods, and the other way round."""
    sweep: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """table: the learning rates that were tried, instead of the scores."""
    out: Path | None = None
    """plot: folder of the figures; STUDY/figures when not given."""


def run(args: Args) -> None:
    """Run, or print."""
    from kindiff.study.config import read_study
    from kindiff.study.grid import spent
    from kindiff.study.records import read_records

    study = read_study(args.study)
    names = {*study.tasks, *study.methods}
    if unknown := set(args.only) - names:
        raise UsageError(
            f"--only {min(unknown)!r} is no task or method of the study; it has {', '.join(sorted(names))}."
        )
    if args.workers < 1:
        raise UsageError(f"workers is {args.workers}; it must be at least 1.")
    if args.action == "run":
        _work(study, args)
        print(study.results)
        return
    if args.action == "repeat":
        from kindiff.study.repeating import compared, repetition

        before = [r for r in read_records(study.results) if study.picks(r.task, r.method, args.only)]
        again = repetition(study, before, args.work.absolute())
        _work(again, args)
        print(compared(before, read_records(again.results)))
        return
    if args.action == "plan":
        from kindiff.study.runner import pending

        for work in pending(study, args.only):
            print(f"{work.cell.name}{'  score' if work.test else ''}")
        say(spent(study, read_records(study.results), args.only))
        return
    records = [r for r in read_records(study.results) if study.picks(r.task, r.method, args.only)]
    if not records:
        raise FileNotFoundError(
            f"{study.results} holds no result yet; `kindiff study run {args.study}` makes them."
        )
    if args.action == "table":
        from kindiff.study.tables import markdown, sweep_markdown

        print(sweep_markdown(records) if args.sweep else markdown(records))
        return
    from kindiff.study.plots import plot

    for path in plot(records, args.out or study.folder / "figures"):
        print(path)


def _work(study: Study, args: Args) -> None:
    """Do what is left, in this process or in several; ChildProcessError when one of them failed."""
    from kindiff.study.runner import run_alone, run_workers

    work = args.work.absolute()
    if args.workers == 1:
        run_alone(study, work, only=args.only)
        return
    command = [sys.executable, "-m", "kindiff.cli.main", "study", args.action, str(args.study)]
    command += ["--work", str(args.work), *(["--only", *args.only] if args.only else [])]
    if failed := run_workers(study, work, workers=args.workers, command=command, only=args.only):
        raise ChildProcessError(
            f"{failed} of {args.workers} workers failed; {args.work / study.name}/worker-*.log say why."
        )
