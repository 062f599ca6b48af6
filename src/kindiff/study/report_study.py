"""A study's report: first who won, then tables and figures, then pictures and components of the finished models."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kindiff.config import DataConfig, from_dict
from kindiff.errors import UsageError
from kindiff.pipeline import DiTPipeline
from kindiff.progress import Track
from kindiff.report.page import bullets, figures, folded, heading, page, paragraph, sheet
from kindiff.study import report_figures as made
from kindiff.study.config import Study, read_study
from kindiff.study.grid import left
from kindiff.study.records import Record, read_records
from kindiff.study.report_components import components_view, has_several, has_tailors
from kindiff.study.report_pictures import (
    CLASSES,
    DRAWN,
    SHOWN,
    draw,
    exchange_sheet,
    images_of,
    neighbours_sheet,
    pipeline_at,
    zoom_of,
)
from kindiff.study.report_words import convergence, headline, sentence, verdict
from kindiff.study.tables import Row, best_rows, by_steps, sweep


@dataclass(frozen=True)
class Material:
    """What a study's report is made of."""

    study: Study
    records: list[Record]
    rows: list[Row]
    work: Path
    """Working folder that the records' models are relative to."""

    @functools.cached_property
    def tasks(self) -> dict[str, list[Row]]:
        """The rows of each task, best first; tasks by name, numbers in it by size."""
        names = sorted({row.task for row in self.rows}, key=_by_numbers)
        return {task: [row for row in self.rows if row.task == task] for task in names}

    @functools.cached_property
    def labels(self) -> dict[str, str]:
        """What the tasks are called."""
        return {name: task.label for name, task in self.study.tasks.items()}

    @property
    def sides(self) -> bool:
        """Whether KIND stands against other people's methods here, not variants and controls against each other."""
        return any(method.rival is not None for method in self.study.methods.values())

    def label(self, task: str) -> str:
        return self.labels.get(task, task)

    def record(self, row: Row) -> Record:
        """The record of a row's first seed."""
        own = [r for r in self.records if (r.task, r.method, r.lr) == (row.task, row.method, row.lr)]
        return min((r for r in own if r.test is not None), key=lambda r: r.seed)

    def pipeline(self, row: Row) -> DiTPipeline | None:
        """A row's model, where it is on this machine."""
        return pipeline_at(self.work / self.record(row).model)


def _by_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def study_page(folder: Path, *, work: Path) -> str:
    """The page of a study, of what is finished of it. UsageError when nothing is."""
    study = read_study(folder)
    records = read_records(study.results)
    rows = best_rows(records)
    if not rows:
        raise UsageError(
            f"{study.results} has no scored cell yet; run `kindiff study run {folder}`, then make the report."
        )
    m = Material(study, records, rows, work)
    body = [*_first_screen(m), *_tasks(m), *_pictures(m), *_bases(m), *_appendix(m)]
    return page(f"{study.config.title}: report", body)


def _first_screen(m: Material) -> list[str]:
    open_work = len(left(m.study, m.records))
    unfinished = f"The study is not finished: {open_work} pieces of work are left (`kindiff study plan`)."
    return [
        heading(m.study.config.title, 1),
        paragraph(m.study.config.question),
        paragraph(headline(m.tasks, sides=m.sides), strong=True),
        *([paragraph(unfinished)] if open_work else []),
        *map(paragraph, _protocol(m)),
        made.winners(m.tasks, m.labels, sides=m.sides),
    ]


def _protocol(m: Material) -> list[str]:
    """What was compared and how, for a reader who has not seen the project."""
    one, count, rates = m.rows[0], len({row.method for row in m.rows}), len(m.study.config.lrs)
    base = m.record(one).base
    start = m.study.bases[base].data.source if base in m.study.bases else base
    seeds = max(row.seeds for row in m.rows)
    tasks = f"{len(m.tasks)} tasks" if len(m.tasks) > 1 else "one task"
    if m.sides:
        what = (
            f"{count} methods were compared on {tasks}: from a few images each, teach new classes to a diffusion "
            f"transformer that was pre-trained on other classes ({start}). "
        )
        new = "; a new class gets a fresh tailor and everything else stays frozen. "
    else:
        what = (
            f"{count} variants, controls and sizes of models were compared on {tasks}; all come from pre-training on "
            f"{start}, and are scored as they are or after the same short training. "
        )
        new = ", so that smaller models can be put together from the parts. "
    return [
        what
        + "KIND, this project's method, pre-trains a model whose weights come apart into shared learngenes and a "
        f"small tailor for each class{new}On a task all trainings have the same images, batches and steps and the same "
        f"{rates} learning rates to choose from"
        + (", and the next where the last was the best" if m.study.config.lrs_beyond else "")
        + ", by images held out for that.",
        f"{one.distance_name} is a Fréchet distance between features of samples and of real test images: lower is "
        f"better; mean ± standard deviation over {seeds} seeds. The floor is that distance between two sets of real "
        "images. Class accuracy is the share of samples that a classifier takes for the class they were asked to be.",
    ]


def _tasks(m: Material) -> list[str]:
    body = []
    for task, rows in m.tasks.items():
        floor = "" if math.isnan(rows[0].floor) else f"; floor {rows[0].floor:.3g}"
        body += [
            heading(m.label(task)),
            *([paragraph(sentence(found))] if (found := verdict(rows, sides=m.sides)) else []),
            paragraph(
                f"{rows[0].count} samples a score{floor}. Choose a column's head to sort by it. Edge: the best "
                "rate is the lowest or highest tried, so a better one may lie beyond. In the figures a dotted line "
                "joins the methods that no other one beats both ways.",
                soft=True,
            ),
            made.task_table(rows),
            made.legend(rows),
            figures(made.paretos(rows, m.records)),
        ]
    for name, lines in by_steps(m.rows).items():
        body += [
            heading(f"Convergence: {name}"),
            paragraph(convergence(lines)),
            figures([made.courses(lines, "steps"), made.courses(lines, "seconds")]),
        ]
    return body


def _pictures(m: Material) -> list[str]:
    body = []
    shorter = {row.task for lines in by_steps(m.rows).values() for own in lines for row in own[:-1]}
    tasks = {task: rows for task, rows in m.tasks.items() if task not in shorter}
    with Track("drawing samples", sum(map(len, tasks.values())), unit="models") as track:
        for task, rows in tasks.items():
            body += _pictures_of(m, task, rows, track)
    return body


def _pictures_of(m: Material, task: str, rows: Sequence[Row], track: Track) -> list[str]:
    record = m.record(rows[0])
    training = images_of(from_dict(DataConfig, record.config["data"]))
    config = replace(m.study.config.sample, device="auto")
    lines, absent, best = [], [], None
    names: tuple[str, ...] = ()
    for row in rows:
        pipeline = m.pipeline(row)
        track.advance(1)
        if pipeline is None:
            absent.append(row.label)
            continue
        names = names or pipeline.model.classes.names[:CLASSES]
        compared = row.family == "kind" and best is None
        images = draw(pipeline, names, DRAWN if compared else SHOWN, config)
        lines.append((row.label, list(images[:, :SHOWN])))
        if compared:
            best = (row, pipeline, dict(zip(names, images, strict=True)))
    body = [heading(f"{m.label(task)}: pictures")]
    if absent:
        body.append(
            paragraph(
                f"Models that are not on this machine, so without samples: {', '.join(absent)}.", soft=True
            )
        )
    if not lines:
        return body
    size = lines[0][1][0].shape[1]
    if isinstance(training, str):
        body.append(paragraph(training, soft=True))
    else:
        real = [training.select([name], per_class=SHOWN).images for name in names]
        lines.insert(0, ("real", real))
    body += [
        paragraph(
            "Every method from the same noise, none picked; best method first; real training images on top."
        ),
        sheet(names, lines, zoom=zoom_of(size), wide=True),
    ]
    if best is None:
        return body
    row, pipeline, drawn = best
    held_out = images_of(from_dict(DataConfig, record.provenance["test"]))
    if not isinstance(training, str) and not isinstance(held_out, str):
        body += neighbours_sheet(drawn, training, held_out, row.label)
    if has_several(pipeline.model):
        body += exchange_sheet(pipeline, config, training)
    if has_tailors(pipeline.model):
        body += components_view(pipeline.model, title=f"Components of {row.label}")
    return body


def _bases(m: Material) -> list[str]:
    """The components of the pre-trained models."""
    body = []
    for name in sorted({record.base for record in m.records}):
        pipeline = pipeline_at(m.work / "bases" / name / "model")
        if pipeline is not None and has_tailors(pipeline.model):
            body += components_view(
                pipeline.model, title=f"Components of the pre-trained model `{name}`".replace("`", "")
            )
    return [heading("The pre-trained models"), *body] if body else []


def _appendix(m: Material) -> list[str]:
    swept = sweep(m.records)
    drawings = [made.rates(rows, swept, title=m.label(task)) for task, rows in m.tasks.items()]
    one = m.record(m.rows[0])
    versions = ", ".join(f"{k} {v}" for k, v in one.provenance.get("versions", {}).items())
    hardware = ", ".join(f"{k} {v}" for k, v in one.provenance.get("hardware", {}).items() if v)
    failed = sorted({f"{r.label}, rate {r.lr:g}: {r.failed}" for r in m.records if r.failed})
    return [
        heading("Appendix: learning rates"),
        paragraph(
            "Each method's distance on validation images at every rate, first seed; the lowest was taken."
        ),
        figures(drawings),
        *([folded(f"{len(failed)} trainings that failed", [bullets(failed)])] if failed else []),
        paragraph(f"Made from {len(m.records)} records. {versions}; {hardware}.", soft=True),
    ]
