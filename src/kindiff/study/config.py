"""What a study is: a folder of TOML files. Methods x tasks x learning rates x seeds are its cells.

STUDY/study.toml        the question, the grid, how samples are drawn and scored
STUDY/tasks/*.toml      images to learn from, held-out ones to choose by, others to be judged on
STUDY/methods/*.toml    a way to learn a task from a pre-trained base
BASES/*.toml            pre-training recipes, which several studies may share (study.toml says where)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Literal, TypeVar

from kindiff.classes import nearest
from kindiff.config import (
    DataConfig,
    PretrainConfig,
    RivalConfig,
    SampleConfig,
    TrainConfig,
    TransferConfig,
    load_recipe,
)
from kindiff.errors import UsageError

T = TypeVar("T")

MIN_RATES = 4
"""Learning rates that every method of a study is given, at least."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """study.toml."""

    title: str
    """What it is called."""
    question: str
    """What it is to answer, in a sentence."""
    bases: str = "bases"
    """Folder of the pre-training recipes, relative to the study's."""
    lrs: tuple[float, ...]
    """Peak learning rates; every method tries each, and the best on the validation images counts."""
    lrs_beyond: tuple[float, ...] = ()
    """Lower and higher ones, for a method whose best is the lowest or the highest it tried: it tries the next too."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the transfer (order, noise, fresh weights); rates are chosen with the first."""
    validation_per_class: int = 30
    """Samples of a class for choosing the rate."""
    test_per_class: int = 50
    """Samples of a class for the score."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """How samples are drawn."""

    def __post_init__(self) -> None:
        if len(set(self.lrs)) < MIN_RATES:
            raise UsageError(f"lrs are {self.lrs}; a comparison needs {MIN_RATES} learning rates or more.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"seeds are {self.seeds}; give one or more, each once.")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """tasks/NAME.toml: new classes to learn. The three sets of images share no image."""

    label: str
    """What tables call it."""
    data: DataConfig
    """Images to learn from."""
    validation: DataConfig
    """Real images by which learning rates are chosen."""
    test: DataConfig
    """Real images on which the result is scored."""
    train: TrainConfig
    """The loop, the same for every method; lr and seed come from the grid."""

    def __post_init__(self) -> None:
        for one, other in combinations((self.data, self.validation, self.test), 2):
            if one.source == other.source and _overlap(one, other):
                raise UsageError(
                    f"task {self.label!r}: images {_range(one)} and {_range(other)} of {one.source} overlap; learning, "
                    "choosing and judging need images of their own (set first and per_class)."
                )


@dataclass(frozen=True, kw_only=True)
class RecombineConfig:
    """A smaller model of the base's own classes: put together from a decomposable base's parts, or cut from a dense
    base by SVD (the control)."""

    learngene_rank: int = 0
    """Components that every matrix keeps; 0 for the base as it is."""
    tailor_rank: int = 0
    """Components that every tailor keeps in each matrix; 0 for all."""
    tailors: bool = True
    """False: the learngenes alone, with the class embeddings."""
    train: bool = False
    """Train it as the task says; else it is scored as it is."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """methods/NAME.toml: one of `transfer` (KIND), `rival` and `recombine`."""

    label: str
    """What tables call it."""
    family: Literal["kind", "full", "peft", "learngene", "scratch"]
    """Sort of method."""
    base: str
    """Pre-training recipe that it starts from."""
    budget: str = ""
    """Group of methods with like numbers of trainable parameters; empty for none."""
    transfer: TransferConfig | None = None
    """KIND's transfer; its data and train come from the task."""
    rival: RivalConfig | None = None
    """Another method."""
    cut: int = 0
    """With transfer from a dense base: components of every matrix that SVD leaves it as its learngenes (a control)."""
    recombine: RecombineConfig | None = None
    """A smaller model of the base's classes, for tasks that are made of these."""
    tasks: tuple[str, ...] = ()
    """Only these tasks; empty for all."""

    def __post_init__(self) -> None:
        if sum(table is not None for table in (self.transfer, self.rival, self.recombine)) != 1:
            raise UsageError(
                f"method {self.label!r} needs one of the tables [transfer], [rival] and [recombine]."
            )
        if self.cut and self.transfer is None:
            raise UsageError(f"method {self.label!r}: cut goes with the table [transfer].")
        blank = TransferConfig()
        if self.transfer is not None and (self.transfer.data, self.transfer.train) != (
            blank.data,
            blank.train,
        ):
            raise UsageError(f"method {self.label!r}: data and train of a transfer come from the task.")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run of a study."""

    task: str
    method: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Also the name of its files."""
        return f"{self.task}--{self.method}--lr{self.lr:g}--seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study's folder, read and checked."""

    folder: Path
    config: StudyConfig
    bases: dict[str, PretrainConfig]
    tasks: dict[str, TaskConfig]
    methods: dict[str, MethodConfig]
    name: str
    results: Path
    """One JSON file a cell."""
    chosen: dict[tuple[str, str], float] | None = None
    """The rate of each (task, method) of a repetition, which has these alone; None for those of the config."""

    def picks(self, task: str, method: str, only: Sequence[str]) -> bool:
        """Whether a list of names picks this pair: where it names tasks, of these, and where methods, of these."""
        tasks, methods = set(only) & set(self.tasks), set(only) & set(self.methods)
        return (not tasks or task in tasks) and (not methods or method in methods)

    def rates(self, task: str, method: str) -> tuple[float, ...]:
        """The learning rates that a method is tried with at the least: lrs, or one where nothing trains."""
        if self.chosen is not None:
            return (self.chosen[task, method],)
        recombine = self.methods[method].recombine
        return self.config.lrs if recombine is None or recombine.train else self.config.lrs[:1]

    def chooses(self, cell: Cell) -> bool:
        """Whether a cell is one of those that choose a rate, which are scored on the validation images."""
        return cell.seed == self.config.seeds[0] and len(self.rates(cell.task, cell.method)) > 1

    def pairs(self) -> list[tuple[str, str]]:
        """Every (task, method), the methods of a task together."""
        every = [(t, m) for t in self.tasks for m, c in self.methods.items() if not c.tasks or t in c.tasks]
        return every if self.chosen is None else [pair for pair in every if pair in self.chosen]


def read_study(folder: Path) -> Study:
    """Read a study. FileNotFoundError when it is none, UsageError that names the file and what is wrong in it."""
    folder = Path(folder).absolute()
    if not (folder / "study.toml").is_file():
        raise FileNotFoundError(f"{folder} is no study: it has no study.toml.")
    config = load_recipe(folder / "study.toml", StudyConfig)
    study = Study(
        folder=folder,
        config=config,
        bases=_read_all(folder / config.bases, PretrainConfig),
        tasks=_read_all(folder / "tasks", TaskConfig),
        methods=_read_all(folder / "methods", MethodConfig),
        name=folder.name,
        results=folder / "results",
    )
    for name, method in study.methods.items():
        _check_known(f"methods/{name}.toml: base", (method.base,), study.bases)
        _check_known(f"methods/{name}.toml: task", method.tasks, study.tasks)
    return study


def _overlap(one: DataConfig, other: DataConfig) -> bool:
    a, b = sorted((one, other), key=lambda data: data.first)
    return not a.per_class or a.first + a.per_class > b.first


def _range(data: DataConfig) -> str:
    return f"{data.first} to {data.first + data.per_class - 1 if data.per_class else 'the last'}"


def _check_known(where: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise UsageError(
                f"{where} {name!r} is not there{nearest(name, known)}; there are: {', '.join(known)}."
            )


def _read_all(folder: Path, cls: type[T]) -> dict[str, T]:
    found = {path.stem: load_recipe(path, cls) for path in sorted(folder.glob("*.toml"))}
    if not found:
        raise FileNotFoundError(f"{folder} holds no recipe (*.toml).")
    return found
