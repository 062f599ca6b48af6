"""Studies for tests of the report: the folder and finished models are real, the scores are made up."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from kindiff.config import DataConfig, to_dict
from kindiff.study.records import Figures, Record, write_record

# label, family, base, budget, trained parameters, GMACs, the distance that its scores lie around
METHODS = {
    "kind-1": ("KIND, rank 1 a class", "kind", "kind", "70k", 70_100, 0.0131, 5.0),
    "kind-2": ("KIND, rank 2 a class", "kind", "kind", "", 138_900, 0.0133, 4.4),
    "lora-6": ("LoRA, rank 6", "peft", "dense", "70k", 70_900, 0.0262, 9.1),
    "oft": ("OFT", "peft", "dense", "", 91_000, 0.0262, 8.3),
    "full": ("full fine-tuning", "full", "dense", "", 961_000, 0.0262, 7.7),
    "fine": ("FINE", "learngene", "dense", "", 402_000, 0.0262, 14.0),
    "scratch": ("from scratch", "scratch", "dense", "", 961_000, 0.0262, 31.0),
}
RATES = (0.001, 0.003, 0.01, 0.03)
SEEDS = (0, 1, 2)
BEST = 0.01
FLOOR = 2.9


def record(
    task: str,
    method: str,
    *,
    lr: float = BEST,
    seed: int = 0,
    distance: float | None = None,
    steps: int = 100,
    data: DataConfig | None = None,
    scored: bool = True,
    failed: str = "",
    model: str = "",
) -> Record:
    """One record; what is not said is made up, the same every time."""
    label, family, base, budget, trainable, gmacs, typical = METHODS[method]
    luck = random.Random(f"{task} {method} {lr} {seed}")
    typical *= (1.5 if lr != BEST else 1.0) * (1 + 30 / steps)
    value = typical + luck.uniform(-0.3, 0.3) if distance is None else distance
    figures = Figures(
        distance_name="FD (Lite0)", distance=value, floor=FLOOR, accuracy=1 / (1 + value / 40),
        real_accuracy=0.99, precision=0.7, recall=0.4, kid=0.01, count=80,
    )  # fmt: skip
    data = data or DataConfig(source="avatars:novel", size=16, per_class=20)
    held_out = replace(data, first=2 * data.per_class)
    return Record(
        study="made-up", task=task, method=method, lr=lr, seed=seed, label=label, family=family, budget=budget,
        base=base, config={"data": to_dict(data)}, trainable=trainable, parameters=961_000, gmacs=gmacs,
        steps=steps, batch=16, train_seconds=1.0, final_loss=0.2, failed=failed,
        validation=None if failed else figures, test=figures if scored and not failed else None,
        provenance={"versions": {"kindiff": "0.1.0"}, "hardware": {"cores": 2}, "test": to_dict(held_out)},
        model=model,
    )  # fmt: skip


def records_of(task: str, methods: tuple[str, ...] = tuple(METHODS), **options: object) -> list[Record]:
    """A finished study of a task: every rate with the first seed, every seed at the best rate."""
    return [
        record(task, method, lr=lr, seed=seed, scored=lr == BEST, **options)
        for method in methods
        for lr, seed in [*((lr, SEEDS[0]) for lr in RATES), *((BEST, seed) for seed in SEEDS[1:])]
    ]


def write_study(folder: Path, tasks: dict[str, int], data: DataConfig, methods: tuple[str, ...]) -> Path:
    """The TOML files of a study whose tasks (name -> steps) all have the same images."""
    for part in ("bases", "study/tasks", "study/methods"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for base in ("kind", "dense"):
        (folder / "bases" / f"{base}.toml").write_text(f'method = "{base}"\n[data]\nsource = "shapes"\n')
    (folder / "study" / "study.toml").write_text(
        'title = "New shapes"\nquestion = "Which method learns <new> shapes best?"\nbases = "../bases"\n'
        f"lrs = {list(RATES)}\nseeds = {list(SEEDS)}\n[sample]\nsteps = 2\n"
    )

    def images(where: str, first: int) -> str:
        return (
            f'[{where}]\nsource = "{data.source}"\nsize = {data.size}\nfirst = {first}\n'
            f"per_class = {data.per_class}\n"
        )

    for task, steps in tasks.items():
        parts = [images(where, i * data.per_class) for i, where in enumerate(("data", "validation", "test"))]
        (folder / "study" / "tasks" / f"{task}.toml").write_text(
            f'label = "Shapes, {steps} steps"\n' + "".join(parts) + f"[train]\nsteps = {steps}\n"
        )
    for name in methods:
        label, family, base, budget, *_ = METHODS[name]
        own = "[transfer]\nrank = 1\n" if family == "kind" else '[rival]\nmethod = "full"\n'
        (folder / "study" / "methods" / f"{name}.toml").write_text(
            f'label = "{label}"\nfamily = "{family}"\nbase = "{base}"\nbudget = "{budget}"\n{own}'
        )
    return folder / "study"


def write_records(study: Path, records: list[Record]) -> None:
    for one in records:
        write_record(study / "results", one)
