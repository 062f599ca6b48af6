"""Several ranks are one: losses, weights, the optimiser's rows, what is decided, what is left on the disk.

Two processes with gloo do all of rank_work.py in one start; these tests read what they left. A SIGKILL needs starts of
its own, by torchrun.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import rank_work
from kindiff import checkpoint
from kindiff.cli.main import main
from kindiff.parallel import ALONE
from kindiff.train import pretrain, transfer
from kindiff.train.run import _read
from toys import assert_same_tensors, one_thread, toy, toy_arguments

pytestmark = pytest.mark.slow
WORK = Path(rank_work.__file__)


def state(run: Path) -> dict[str, torch.Tensor]:
    (place,) = (run / "checkpoints").iterdir()
    groups = _read(place)[1] | {"written": checkpoint.read_tensors(run / "model" / "model.safetensors")}
    return {f"{group}/{name}": tensor for group, some in groups.items() for name, tensor in some.items()}


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def assert_same_run(found: Path, wanted: Path) -> None:
    """To the bit."""
    assert_same_tensors(state(found), state(wanted))
    assert metrics(found) == metrics(wanted)


def assert_equal_up_to(tolerance: float, found: Path, wanted: Path) -> None:
    """Every loss and every tensor; the counts of steps exactly."""
    for one, other in zip(metrics(found), metrics(wanted), strict=True):
        assert one == pytest.approx(other, rel=tolerance)
    ours, theirs = state(found), state(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        if "steps" in name:
            assert torch.equal(ours[name], tensor), name
        torch.testing.assert_close(ours[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def two_ranks(*arguments: object) -> list[str]:
    """What two ranks of a Python command say to standard error; both must end well."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    both = [
        subprocess.Popen(
            [sys.executable, "-W", "error", *map(str, arguments)],
            env={**one_thread(), **place, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said[0][-3000:] + said[1][-3000:]
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two ranks left."""
    folder = tmp_path_factory.mktemp("ranks")
    rank_work.prepare(folder)
    assert not two_ranks(WORK, folder)[1], "the second rank is silent"
    return folder


@pytest.mark.parametrize(("name", "way"), rank_work.EQUAL)
def test_two_ranks_are_one_in_float64(folder: Path, name: str, way: str) -> None:
    """Losses, gradient norms, weights, average and optimiser; RowAdam's counts say whose rows were stepped."""
    if not (folder / name).exists():
        rank_work.train_in_double(folder / "shapes", folder / name, ALONE, name)
    if name == "soft":  # its gate's softmax is float32, and Adam lets small gradients' roundings grow
        pairs = zip(metrics(folder / f"{name}-{way}"), metrics(folder / name), strict=True)
        assert all(one["loss"] == pytest.approx(other["loss"], rel=1e-6) for one, other in pairs)
    else:
        assert_equal_up_to(1e-10, folder / f"{name}-{way}", folder / name)
    steps = state(folder / name)["optimiser/tailors.steps" if name != "dense" else "optimiser/classes.steps"]
    assert steps.dtype == torch.float64
    assert steps.min() < 4 or name == "soft", "no class was absent from any step"


def test_parts_and_recomputation_on_one_process(folder: Path) -> None:
    """Micro-batches: equal up to rounding. Recomputed blocks: the same bits."""
    shapes = folder / "shapes"
    rank_work.train_in_double(shapes, folder / "parts-alone", ALONE, "kind", accumulate=4)
    rank_work.train_in_double(shapes, folder / "whole-alone", ALONE, "kind")
    assert_equal_up_to(1e-10, folder / "parts-alone", folder / "whole-alone")
    for precision in ("fp32", "bf16"):
        runs = []
        for again in (False, True):
            runs.append(folder / f"recompute-{precision}-{again}")
            pretrain(rank_work.settings(shapes, "kind", precision=precision, recompute=again), runs[-1])
        assert_same_run(*runs)


def test_bf16_and_transfer(folder: Path) -> None:
    config = rank_work.settings(folder / "shapes", "", precision="bf16")
    pretrain(config, folder / "bf16-one")
    for one, other in zip(metrics(folder / "bf16-two"), metrics(folder / "bf16-one"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
    for trains in rank_work.TRAINS:
        transfer(folder / "parts", rank_work.transfer_config(folder, trains), folder / f"{trains}-one")
        assert_equal_up_to(2e-5, folder / f"{trains}-two", folder / f"{trains}-one")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_nan_on_one_rank_is_never_stepped(folder: Path, how: str) -> None:
    run = folder / f"{how}-nan"
    (window,) = checkpoint.read_json(run / "rollbacks.json")["windows"]
    assert (window["first"], window["end"]) == (rank_work.BAD, rank_work.BAD + 2)
    assert_same_run(run, folder / f"{how}-without")
    # The capsule has the inputs of both ranks: the second one's are bad.
    batch = checkpoint.read_tensors(run / window["capsule"] / "batch.safetensors")
    assert [not x.isfinite().all() for x in batch["x_BCHW"]] == [False, False, False, True]
    model = checkpoint.read_tensors(run / window["capsule"] / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in model.values())


def test_the_capsule_of_two_ranks_is_replayed(folder: Path, capsys) -> None:
    capsule = folder / "fsdp-nan" / "capsules" / f"step-{rank_work.BAD:08d}"
    assert main(["replay", str(capsule)]) == 0
    assert "x_BCHW" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_stops_both_and_loses_nothing(folder: Path, how: str) -> None:
    assert_same_run(folder / f"{how}-stopped", folder / f"{how}-whole")


def test_two_ranks_then_one_then_two(folder: Path) -> None:
    assert_equal_up_to(2e-4, folder / "changing", folder / "ddp-whole")
    assert_equal_up_to(2e-4, folder / "fsdp-whole", folder / "ddp-whole")


def test_a_sample_folder_does_not_depend_on_the_ranks(folder: Path) -> None:
    model = str(folder / "ddp-whole" / "model")
    options = ["--per-class", "3", "--steps", "3", "--batch", "5", "--device", "cpu"]
    for target in ("images-one", "grid-one.png"):
        assert main(["sample", model, str(folder / target), *options]) == 0
    one, two = folder / "images-one", folder / "images-two"
    names = sorted(p.relative_to(one) for p in one.rglob("*.png"))
    assert len(names) == 12
    assert names == sorted(p.relative_to(two) for p in two.rglob("*.png"))
    assert all((one / n).read_bytes() == (two / n).read_bytes() for n in names)
    assert (folder / "grid-one.png").read_bytes() == (folder / "grid-two.png").read_bytes()


def test_features_do_not_depend_on_the_ranks(folder: Path) -> None:
    one = rank_work.features_of_samples(folder, folder / "features-one", ALONE)
    assert one.shape == (12, 3)
    names = sorted(p.name for p in (folder / "features-one").iterdir())
    assert names == sorted(p.name for p in (folder / "features-two").iterdir())
    assert len(names) == 4
    for name in names:
        assert (folder / "features-one" / name).read_bytes() == (folder / "features-two" / name).read_bytes()


UNWILLING = """
import sys, torch
from kindiff.parallel import joined, leave
sys.setswitchinterval(1000)
with joined():
    torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
leave(0)
"""
"""Ranks whose other threads get the interpreter only when the main one waits: most pairs aborted at their end before
`leave` was there."""


def test_ranks_end_while_a_thread_still_holds_a_tensor() -> None:
    for _ in range(3):
        two_ranks("-c", UNWILLING)


def test_one_rank_killed_and_resumed_by_the_same_command(folder: Path, tmp_path: Path) -> None:
    """torchrun, the second rank dies by SIGKILL; the same command again ends as two ranks that were left alone."""
    shapes, run = folder / "shapes", tmp_path / "run"
    train = {key: value for key, value in rank_work.LOOP.items() if key != "skip_window"} | {"steps": 60}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
        "-m", "kindiff.cli.main", "pretrain",
    ]  # fmt: skip
    options = [*toy_arguments(shapes, **train), "--train.precision", "fp32"]

    def begin(out: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, out, *options], env=one_thread(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    process = begin(run)
    while not (run / "metrics.jsonl").is_file() or len((run / "metrics.jsonl").read_text().splitlines()) < 9:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    second = next(int(pid) for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(second, signal.SIGKILL)
    _, stderr = process.communicate()
    assert process.returncode != 0
    assert not (run / "model").exists()
    assert "File" not in stderr.partition("kindiff: another rank has ended")[0], "one sentence, no traceback"

    process = begin(run)
    out, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert out.splitlines() == [str(run / "model")]
    assert "resuming at step" in stderr
    pretrain(toy(shapes, **train, precision="fp32"), tmp_path / "one")
    assert_equal_up_to(2e-3, run, tmp_path / "one")
