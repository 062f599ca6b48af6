"""One cell of a study: its base, its training, its scores, its record. Each part looks first whether it is there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kindiff import runtime
from kindiff.checkpoint import read_json, sha256
from kindiff.components import decompose, save_components
from kindiff.config import AdaptConfig, DataConfig, PretrainConfig, TransferConfig, to_dict
from kindiff.data import open_images
from kindiff.evaluate import reference as references
from kindiff.evaluate.cost import cost_table, total
from kindiff.evaluate.features import Features
from kindiff.evaluate.generated import GeneratedImages
from kindiff.evaluate.protocol import Score
from kindiff.evaluate.run import evaluate
from kindiff.evaluate.sources import from_set
from kindiff.pipeline import DiTPipeline
from kindiff.progress import say
from kindiff.study.config import Cell, Study
from kindiff.study.grid import Work
from kindiff.study.recombined import cut, smaller
from kindiff.study.records import Figures, Record, read_records, write_record
from kindiff.train import adapt, pretrain, transfer
from kindiff.train.rollback import NotFinite

VALIDATION_SEED = 1000
"""Samples for choosing a rate have other noise than those for the score."""


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process alone holds the name for now; a killed process holds nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where the cells of a study are run."""

    study: Study
    work: Path
    """Working folder: runs and models, shared by studies that share bases."""
    features: Features
    device: str
    known: dict[DataConfig, references.Reference] = field(default_factory=dict)
    """References that this process has scored against: their floors and probes are made once."""

    @property
    def locks(self) -> Path:
        return self.work / "locks"

    def do(self, work: Work) -> bool:
        """One piece of work; False when another process is at it, or at its base."""
        base = self.study.methods[work.cell.method].base
        with claim(self.locks / f"{self.study.name}--{work.cell.name}") as mine:
            if not mine:
                return False
            with claim(self.locks / base) as free:
                if not (free or self.prepared(base)):
                    return False
                say(f"{work.cell.name}{': score' if work.test else ''}")
                if free:
                    self.prepare(base)
            record = self.record_of(work.cell)
            score = work.test and not (record and (record.test or record.failed))
            if record is None or (score and not (self.work / record.model).is_dir()):
                record = self.train(work.cell)  # the model may be another machine's
            if score and not record.failed:
                record = record.with_test(self.score(record, "test"))
            write_record(self.study.results, record)
        return True

    def record_of(self, cell: Cell) -> Record | None:
        """What was written of a cell before."""
        return next((r for r in read_records(self.study.results, cell.name) if r.cell == cell), None)

    def prepared(self, base: str) -> bool:
        """Whether a base is trained and, where it can be, taken apart."""
        kind = self.study.bases[base].method == "kind"
        last = "parts" if kind else "model"
        return (self.work / "bases" / base / last / "config.json").is_file()

    def prepare(self, base: str) -> None:
        """Pre-train a base and take it apart; or do nothing where that is done."""
        if self.prepared(base):
            return
        folder, recipe = self.work / "bases" / base, self.study.bases[base]
        recipe = replace(recipe, train=replace(recipe.train, device=self.device))
        trained = pretrain(recipe, folder)
        if recipe.method == "kind":
            save_components(decompose(trained.model), folder / "parts", autoencoder=trained.autoencoder)

    def train(self, cell: Cell) -> Record:
        """Train a cell; score it on the validation images where there is a rate to choose (by the first seed)."""
        method, task = self.study.methods[cell.method], self.study.tasks[cell.task]
        base, folder = self.work / "bases" / method.base, self.work / self.study.name / cell.name
        train = runtime.settled(replace(task.train, lr=cell.lr, seed=cell.seed, device=self.device))
        again = replace(self.study.bases[method.base], data=task.data, train=train)
        recipe: TransferConfig | AdaptConfig | PretrainConfig = again
        failed = ""
        try:
            if method.transfer is not None:
                recipe, parts = replace(method.transfer, data=task.data, train=train), base / "parts"
                if method.cut:
                    parts = folder.with_name(f"{folder.name}--parts")
                    whole = cut(base, method.cut)
                    save_components(decompose(whole.model), parts, autoencoder=whole.autoencoder)
                transfer(parts, recipe, folder)
            elif method.rival is not None:
                recipe = AdaptConfig(data=task.data, rival=method.rival, train=train)
                adapt(base / "model", recipe, folder)
            else:
                assert method.recombine is not None
                recipe = smaller(again, base, method.recombine, folder)
        except NotFinite as error:
            failed = str(error).split(";")[0]
        trained = (folder / "run.json").is_file()
        pipeline = DiTPipeline.from_pretrained(base / "model" if failed else folder / "model")
        cost = total(cost_table(pipeline.model))
        seconds, loss = logged(folder)
        record = Record(
            study=self.study.name,
            task=cell.task,
            method=cell.method,
            lr=cell.lr,
            seed=cell.seed,
            label=method.label,
            family=method.family,
            budget=method.budget,
            base=method.base,
            config=self._portable(to_dict(recipe)),
            trainable=read_json(folder / "parameters.json")["trainable"] if trained else 0,
            parameters=cost.parameters,
            gmacs=cost.macs / 1e9,
            steps=train.steps if trained else 0,
            batch=train.batch,
            train_seconds=seconds,
            final_loss=loss,
            failed=failed,
            provenance={
                "versions": runtime.versions(),
                "hardware": runtime.hardware(),
                "run": self._portable(read_json(folder / "run.json")["description"]) if trained else {},
                "base": sha256(base / "model" / "model.safetensors"),
                "test": to_dict(task.test),
                "validation": to_dict(task.validation),
                "sample": to_dict(runtime.settled(self.study.config.sample)),
            },
            model=str((folder / "model").relative_to(self.work)),
        )
        if failed or not self.study.chooses(cell):
            return record
        return replace(record, validation=Figures.of(self.score(record, "validation")))

    def _portable(self, values: dict[str, Any]) -> dict[str, Any]:
        """The same with paths inside the working folder relative to it, as a record has them."""
        inside = json.dumps(f"{self.work}/")[1:-1]
        return json.loads(json.dumps(values).replace(f'"{inside}', '"'))  # type: ignore[no-any-return]

    def score(self, record: Record, which: str) -> Score:
        """Draw from a finished cell and compare with its task's validation or test images."""
        task, config = self.study.tasks[record.task], self.study.config
        validation = which == "validation"
        reference = self.reference(task.validation if validation else task.test)
        model = self.work / record.model
        seed = config.sample.seed + record.seed + (VALIDATION_SEED if validation else 0)
        samples = GeneratedImages(
            model,
            0,
            replace(config.sample, seed=seed, device=self.device),
            per_class=config.validation_per_class if validation else config.test_per_class,
        )
        work = model.parent / f"features-{which}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of few images: every table prints the floor and N
            score = evaluate(samples, reference, self.features, work=work, sampler=samples.sampler)
        shutil.rmtree(work)
        return score

    def reference(self, data: DataConfig) -> references.Reference:
        """Statistics of real images, made once and kept in the cache."""
        if data not in self.known:
            images, folder = from_set(open_images(data), data.source), runtime.cache_folder() / "references"
            self.known[data] = references.build(images, self.features, folder)
        return self.known[data]


def logged(folder: Path) -> tuple[float, float | None]:
    """Seconds of training, those of a method's own first stage (a run below the run) included, and the last loss."""
    seconds = 0.0
    for path in sorted(folder.rglob("metrics.jsonl")):
        before = 0
        for line in _lines(path):
            seconds += (line["images"] - before) / line["images_per_second"]
            before = line["images"]
    own = _lines(folder / "metrics.jsonl")
    return round(seconds, 2), own[-1]["loss"] if own else None


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
