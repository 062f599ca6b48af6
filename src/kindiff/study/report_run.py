"""A training run's report: how it went, what was asked, what the model draws, its components."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from kindiff.checkpoint import read_json
from kindiff.config import DataConfig, SampleConfig, from_dict
from kindiff.data import ImageSet
from kindiff.errors import BadFileError, UsageError
from kindiff.evaluate.cost import cost_table, total
from kindiff.pipeline import DiTPipeline
from kindiff.progress import Track
from kindiff.report.charts import Axis, Series, chart
from kindiff.report.page import figures, folded, heading, page, paragraph, sheet, table
from kindiff.study.report_components import components_view, has_several, has_tailors
from kindiff.study.report_pictures import exchange_sheet, images_of, pipeline_at, zoom_of

CLASSES = 40
"""Rows of the sheet at most."""
STRIP = 4
"""Samples of each class."""
WORDS = {
    "pretrain": "Pre-training",
    "transfer": "Transfer to new classes: learngenes frozen, fresh tailors",
    "adapt": "A rival's training on new classes",
}


def run_page(folder: Path) -> str:
    """The page of a run, finished or not. BadFileError for a damaged run.json."""
    described = read_json(folder / "run.json")
    try:
        asked = described["description"]
        command, config = asked["command"], asked["config"]
        data = from_dict(DataConfig, config["data"])
        steps = config["train"]["steps"]
    except (KeyError, TypeError, UsageError) as error:
        raise BadFileError(f"{folder / 'run.json'} does not describe a training run ({error}).") from None
    lines = metrics(folder / "metrics.jsonl")
    pipeline = pipeline_at(folder / "model")
    done = lines[-1]["step"] if lines else 0
    batch = config["train"]["batch"]
    said = f"{WORDS.get(command, command)}: {done:g} of {steps} steps of {batch} images from {data.source}"
    if lines:
        said += f"; loss {lines[0]['loss']:.4f} at first, {lines[-1]['loss']:.4f} at last"
    if pipeline is not None:
        cost = total(cost_table(pipeline.model))
        said += f". The model has {len(pipeline.model.classes)} classes, {cost.parameters:,} parameters and "
        said += f"{cost.macs / 1e9:.4f} GMACs an image"
    body = [heading(f"Run {folder.resolve().name}", 1), paragraph(f"{said}.")]
    if pipeline is None:
        body.append(paragraph("The run is not finished, so there are no samples and components to show yet."))
    body += [_course(lines)] if lines else []
    if pipeline is not None:
        body += _pictures(pipeline, data)
        if has_tailors(pipeline.model):
            body += components_view(pipeline.model, title="Components")
    machine = [
        [key, str(value)]
        for part in ("versions", "hardware")
        for key, value in described.get(part, {}).items()
    ]
    body += [
        heading("Settings"),
        folded("what was asked", [table(("setting", "value"), _flat(config))]),
        folded("versions and hardware", [table(("", "value"), machine)]),
    ]
    return page(f"Run {folder.resolve().name}", body)


def metrics(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl; one that a kill cut short is passed over."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _course(lines: list[dict[str, float]]) -> str:
    steps = Axis(name="steps")

    def course(key: str, name: str) -> str:
        points = [(line["step"], line[key]) for line in lines]
        return chart(name, [Series(name=name, points=points)], x=steps, y=Axis(name=name, log=key != "lr"))

    return figures(
        [course("loss", "loss"), course("gradient_norm", "gradient norm"), course("lr", "learning rate")]
    )


def _pictures(pipeline: DiTPipeline, data: DataConfig) -> list[str]:
    every = pipeline.model.classes.names
    names = every[:CLASSES]
    ids = [i for i in range(len(names)) for _ in range(STRIP)]
    config = SampleConfig(steps=15, precision="auto", batch=128)
    real = images_of(data)
    tailored = has_tailors(pipeline.model)
    with Track("drawing samples", len(ids) * (1 + tailored), unit="images") as track:
        columns = ["samples"]
        strips = [np.split(pipeline.sample(ids, config, advance=track.advance), len(names))]
        if tailored:
            columns.append("learngenes alone")
            bare = pipeline.sample(ids, config, tailors=False, advance=track.advance)
            strips.append(np.split(bare, len(names)))
    if isinstance(real, ImageSet):
        columns.insert(0, "real")
        strips.insert(0, [real.select([name], per_class=STRIP).images for name in names])
    shown = f"The first {len(names)} of {len(every)} classes" if len(every) > len(names) else "Every class"
    lines = [(name, [column[i] for column in strips]) for i, name in enumerate(names)]
    return [
        heading("Samples"),
        paragraph(
            f"{shown}; guidance {config.guidance}, {config.steps} steps, seed {config.seed}, none picked."
        ),
        *([] if isinstance(real, ImageSet) else [paragraph(real, soft=True)]),
        sheet(columns, lines, zoom=zoom_of(strips[-1][0].shape[1])),
        *(exchange_sheet(pipeline, config, real) if has_several(pipeline.model) else []),
    ]


def _flat(values: dict[str, Any], where: str = "") -> list[list[str]]:
    rows = []
    for key, value in values.items():
        name = f"{where}.{key}" if where else key
        rows += _flat(value, name) if isinstance(value, dict) else [[name, str(value)]]
    return rows
