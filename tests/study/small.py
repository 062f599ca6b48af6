"""A study of seconds on drawn shapes, and made-up records for tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kindiff.study.records import Figures, Record
from toys import NEW_SHAPES, write_shapes

BASE = """
method = "{method}"
[data]
source = "{source}"
size = 16
[model]
width = 32
depth = 2
heads = 2
patch = 4
[kind]
learngene_rank = 8
tailor_rank = 2
[train]
steps = 6
batch = 8
"""
TASK = """
label = "new shapes"
[data]
source = "{source}"
size = 16
per_class = 6
[validation]
source = "{source}"
size = 16
first = 6
per_class = 6
[test]
source = "{source}"
size = 16
first = 12
per_class = 8
[train]
steps = 4
batch = 6
log_every = 2
"""
STUDY = """
title = "Shapes"
question = "Does the machinery work?"
lrs = [0.001, 0.003, 0.01, 0.03]
seeds = [0, 1]
validation_per_class = 3
test_per_class = 4
[sample]
steps = 2
"""
METHODS = {
    "kind": 'label = "KIND"\nfamily = "kind"\nbase = "kind"\nbudget = "a"\n[transfer]\nrank = 1\n',
    "lora": 'label = "LoRA"\nfamily = "peft"\nbase = "dense"\nbudget = "a"\n[rival]\nmethod = "lora"\nrank = 2\n',
}


def write_study(folder: Path) -> Path:
    """A whole study below `folder`; returns its folder."""
    old = write_shapes(folder / "shapes", per_class=6)
    new = write_shapes(folder / "new-shapes", NEW_SHAPES, per_class=20)
    study = folder / "small"
    for name in ("bases", "tasks", "methods"):
        (study / name).mkdir(parents=True)
    (study / "study.toml").write_text(STUDY)
    for method in ("kind", "dense"):
        (study / "bases" / f"{method}.toml").write_text(BASE.format(method=method, source=old))
    (study / "tasks" / "new.toml").write_text(TASK.format(source=new))
    for name, text in METHODS.items():
        (study / "methods" / f"{name}.toml").write_text(text)
    return study


def figures(distance: float, accuracy: float = 0.5) -> Figures:
    return Figures(
        distance_name="FD (Lite0)",
        distance=distance,
        floor=1.0,
        accuracy=accuracy,
        real_accuracy=0.99,
        precision=0.5,
        recall=0.4,
        kid=0.01,
        count=8,
    )


def record(
    method: str,
    lr: float,
    seed: int = 0,
    *,
    task: str = "new",
    validation: float = 5.0,
    test: float | None = None,
) -> Record:
    """A made-up result."""
    one = Record(
        study="small",
        task=task,
        method=method,
        lr=lr,
        seed=seed,
        label=method.upper(),
        family="kind" if method == "kind" else "peft",
        budget="a",
        base="kind",
        config={},
        trainable=1000,
        parameters=5000,
        gmacs=0.01,
        steps=4,
        batch=6,
        train_seconds=1.0,
        final_loss=0.5,
        validation=figures(validation),
        provenance={},
    )
    return one if test is None else replace(one, test=figures(test))
