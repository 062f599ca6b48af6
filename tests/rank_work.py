"""What each of two processes does for train/test_ranks.py: many runs in one start, for a start costs seconds.

RANK=0 WORLD_SIZE=2 ... python tests/rank_work.py FOLDER
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from kindiff.cli.main import main
from kindiff.components import decompose, save_components
from kindiff.config import DataConfig, PretrainConfig, SampleConfig, TransferConfig
from kindiff.data import open_prepared
from kindiff.data.batches import Batch
from kindiff.evaluate import store
from kindiff.evaluate.features import CallableFeatures
from kindiff.evaluate.generated import GeneratedImages
from kindiff.parallel import ALONE, Ranks, joined, leave
from kindiff.pipeline import DiTPipeline
from kindiff.train import Interrupted, loop, pretrain, transfer
from kindiff.train.pretraining import new_model
from kindiff.train.rollback import Window
from kindiff.train.run import Run
from toys import NEW_SHAPES, SIZE, toy, write_shapes

LOOP = {"steps": 9, "batch": 4, "save_every": 4, "log_every": 1, "warmup": 2, "skip_window": 2}
RUNS: dict[str, dict[str, Any]] = {
    "kind": {"steps": 4, "weight_decay": 0.1},
    "dense": {"steps": 4, "method": "dense", "objective": "epsilon"},
    "soft": {"steps": 3},
}
"""Runs in float64, which two ranks must repeat."""
WAYS = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "ddp-parts": {"parallel": "ddp", "accumulate": 2},
    "fsdp-parts": {"parallel": "fsdp", "accumulate": 2, "recompute": True},
}
EQUAL = (
    ("kind", "ddp"),
    ("kind", "fsdp"),
    ("kind", "ddp-parts"),
    ("kind", "fsdp-parts"),
    ("dense", "fsdp"),
    ("soft", "ddp"),
)
TRAINS: tuple[Literal["components", "mixture"], ...] = ("components", "mixture")
BAD, STOP = 3, 4
"""The steps of the number that is not finite and of the signal, on the second rank."""


def settings(shapes: Path, name: str, **train: object) -> PretrainConfig:
    config = toy(shapes, **{"precision": "fp32", **LOOP, **RUNS.get(name, {}), **train})
    return replace(config, kind=replace(config.kind, gate="soft")) if name == "soft" else config


def train_in_double(shapes: Path, out: Path, ranks: Ranks, name: str, **train: object) -> None:
    """A run in float64: losses in metrics.jsonl, the state in its checkpoint, the model's average beside them."""
    config, samples = settings(shapes, name, **train), open_prepared(shapes)
    make = loop.batches

    def doubled(*args: Any, **kwargs: Any) -> Any:
        for batch in make(*args, **kwargs):
            yield Batch(*(t.double() if t.is_floating_point() else t for t in batch))

    loop.batches = doubled  # type: ignore[assignment]
    try:
        with Run(out, {}, ranks) as run:
            model = loop.fit(
                new_model(config, samples).double(), samples, config.objective, config.train, run, True
            )
            ranks.on_first(lambda: model.save_pretrained(out / "model"))
    finally:
        loop.batches = make  # type: ignore[assignment]


def at_step(step: int, act: Any) -> Any:
    """batches(...) that call act(batch) before they give the batch of a step."""
    make = loop.batches

    def batches(*args: Any, first_step: int, left_out: Any = (), **kwargs: Any) -> Any:
        numbers = (s for s in itertools.count(first_step) if not any(s in w for w in left_out))
        drawn = make(*args, first_step=first_step, left_out=left_out, **kwargs)
        for number, batch in zip(numbers, drawn, strict=False):
            if number == step:
                act(batch)
            yield batch

    return batches


class patched:
    """A name of the loop, replaced within the block."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value, self.before = name, value, getattr(loop, name)

    def __enter__(self) -> None:
        setattr(loop, self.name, self.value)

    def __exit__(self, *error: object) -> None:
        setattr(loop, self.name, self.before)


def stopped(config: PretrainConfig, out: Path, ranks: Ranks, step: int) -> None:
    """A run that the last rank's SIGTERM ends after a step: on every rank alike."""

    def act(_: Batch) -> None:
        if ranks.rank == ranks.count - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with patched("batches", at_step(step, act)):
        with pytest.raises(Interrupted, match=f"stopped at step {step + 1} of") as stop:
            pretrain_on(config, out, ranks)
        assert stop.value.exit_code == 143


def pretrain_on(config: PretrainConfig, out: Path, ranks: Ranks) -> None:
    """`pretrain`, also for one rank of a connected group by itself."""
    if ranks.count > 1:
        pretrain(config, out)
        return
    samples = open_prepared(Path(config.data.source))
    with Run(out, {"command": "pretrain"} | described(config, out), ranks) as run:
        model = loop.fit(
            new_model(config, samples), samples, config.objective, config.train, run, config.data.flip
        )
        DiTPipeline(model).save_pretrained(run.model)


def described(config: PretrainConfig, out: Path) -> dict[str, Any]:
    from kindiff.checkpoint import read_json

    return read_json(out / "run.json")["description"]


def nan_on_the_second_rank(folder: Path, ranks: Ranks, how: str) -> None:
    config = settings(folder / "shapes", "", parallel=how)
    window = Window(first=BAD, end=BAD + 2, cause="", capsule="")
    with patched("read_windows", lambda _: [window]):
        pretrain(config, folder / f"{how}-without")

    def act(batch: Batch) -> None:
        if ranks.rank == 1:
            batch.x_BCHW[1, 0, 0, 0] = torch.nan

    with patched("batches", at_step(BAD, act)):
        pretrain(config, folder / f"{how}-nan")


def work(folder: Path, ranks: Ranks) -> None:
    """All of it; the test looks at what is left."""
    shapes = folder / "shapes"
    for name, way in EQUAL:
        train_in_double(shapes, folder / f"{name}-{way}", ranks, name, **WAYS[way])
    for trains in TRAINS:
        transfer(folder / "parts", transfer_config(folder, trains), folder / f"{trains}-two")

    for how in ("ddp", "fsdp"):
        config = settings(shapes, "", parallel=how, checkpoints={"ddp": "full", "fsdp": "sharded"}[how])
        pretrain(config, folder / f"{how}-whole")
        nan_on_the_second_rank(folder, ranks, how)
        stopped(config, folder / f"{how}-stopped", ranks, STOP)
        pretrain(config, folder / f"{how}-stopped")
    pretrain(settings(shapes, "", precision="bf16", recompute=True), folder / "bf16-two")

    # Two ranks, one, two.
    changing = folder / "changing"
    stopped(settings(shapes, "", parallel="fsdp", checkpoints="sharded"), changing, ranks, 2)
    if ranks.first:
        stopped(settings(shapes, ""), changing, ALONE, 5)
    ranks.wait()
    pretrain(settings(shapes, "", parallel="ddp"), changing)

    model = str(folder / "ddp-whole" / "model")
    options = ["--per-class", "3", "--steps", "3", "--batch", "5", "--device", "cpu"]
    for target in ("images-two", "grid-two.png"):
        assert main(["sample", model, str(folder / target), *options]) == 0
    features_of_samples(folder, folder / "features-two", ranks)


def features_of_samples(folder: Path, target: Path, ranks: Ranks) -> np.ndarray:
    """Mean colours of samples drawn while they are evaluated, in shards of five; each rank computes some."""
    images = GeneratedImages(folder / "ddp-whole" / "model", 12, SampleConfig(steps=2, batch=4, device="cpu"))
    network = CallableFeatures(
        name="colours", function=lambda x: {"pool": x.mean((1, 2), dtype=np.float32)}, version="1"
    )
    usual, store.SHARD = store.SHARD, 5
    try:
        return store.compute(images, network, target, batch=4, ranks=ranks).rows("pool")
    finally:
        store.SHARD = usual


def transfer_config(folder: Path, trains: Literal["components", "mixture"]) -> TransferConfig:
    train = toy(folder / "new", **{**LOOP, "steps": 4, "precision": "fp32"}).train
    data = DataConfig(source=str(folder / "new"), size=SIZE)
    init = "fresh" if trains == "components" else "nearest"
    return TransferConfig(data=data, rank=2, init=init, trains=trains, mixes=3, train=train)


def prepare(folder: Path) -> None:
    """Data and parts, by the test before the two start."""
    shapes = write_shapes(folder / "shapes")
    write_shapes(folder / "new", NEW_SHAPES)
    model = new_model(settings(shapes, "kind"), open_prepared(shapes))
    save_components(decompose(model), folder / "parts")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined() as both:
        work(Path(sys.argv[1]), both)
    leave(0)
