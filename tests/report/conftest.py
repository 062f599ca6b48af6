"""A study and runs of toys, trained for real; the study's scores are made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kindiff.components import decompose, save_components
from kindiff.config import AdaptConfig, DataConfig, RivalConfig, TransferConfig
from kindiff.study.report import write_report
from kindiff.train import adapt, pretrain, transfer
from report.made_up import METHODS, records_of, write_records, write_study
from toys import NEW_SHAPES, SIZE, toy, write_shapes

TASKS = {"shapes-50s": 50, "shapes-100s": 100, "shapes-200s": 200}


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """A working folder: bases kind and dense, and two models of the new shapes."""
    place = tmp_path_factory.mktemp("work")
    write_shapes(place / "shapes")
    write_shapes(place / "new-shapes", NEW_SHAPES, per_class=12)
    for method in ("kind", "dense"):
        trained = pretrain(toy(place / "shapes", method=method), place / "bases" / method)
        if method == "kind":
            save_components(decompose(trained.model), place / "bases" / "kind" / "parts")
    data = DataConfig(source=str(place / "new-shapes"), size=SIZE, per_class=4)
    train = replace(toy(place / "shapes").train, steps=4)
    transfer(
        place / "bases/kind/parts", TransferConfig(data=data, rank=1, train=train), place / "made-up/kind-2"
    )
    rival = AdaptConfig(data=data, rival=RivalConfig(method="full"), train=train)
    adapt(place / "bases/dense/model", rival, place / "made-up/full")
    return place


@pytest.fixture(scope="session")
def study(work: Path) -> Path:
    """A study whose records name those two models; the other methods' are on no machine."""
    data = DataConfig(source=str(work / "new-shapes"), size=SIZE, per_class=4)
    folder = write_study(work, TASKS, data, tuple(METHODS))
    for task, steps in TASKS.items():
        records = records_of(task, steps=steps, data=data)
        write_records(folder, [replace(r, model=f"made-up/{r.method}/model") for r in records])
    return folder


@pytest.fixture(scope="session")
def study_page(study: Path, work: Path) -> Path:
    return write_report(study, work=work)


@pytest.fixture(scope="session")
def run_page(work: Path) -> Path:
    """The page of the decomposable base."""
    return write_report(work / "bases" / "kind")
