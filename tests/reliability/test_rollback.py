"""Numbers that are not finite: never stepped, kept in a capsule, left out for good; saving does not stop training."""

from __future__ import annotations

import itertools
import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kindiff import checkpoint
from kindiff.cli.main import main
from kindiff.config import AdaptConfig, DataConfig, RivalConfig, TrainConfig
from kindiff.errors import BadFileError
from kindiff.parallel import ALONE
from kindiff.train import Interrupted, NotFinite, adapt, loop, pretrain
from kindiff.train.capsule import replay
from kindiff.train.rollback import Window, read_windows
from kindiff.train.run import Run
from kindiff.train.state import Saver
from toys import SIZE, assert_same_tensors, toy, write_shapes

LOOP = {"steps": 20, "batch": 4, "save_every": 4, "log_every": 1, "skip_window": 3}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


def state_of(run: Path) -> dict[str, torch.Tensor]:
    (place,) = (run / "checkpoints").iterdir()
    files = {path.stem: checkpoint.read_tensors(path) for path in place.glob("*.safetensors")}
    files["written"] = checkpoint.read_tensors(run / "model" / "model.safetensors")
    return {f"{group}/{name}": t for group, tensors in files.items() for name, t in tensors.items()}


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


@pytest.fixture
def poison(monkeypatch) -> Callable[[int], None]:
    """From now on the input of a step holds a NaN."""

    def call(step: int) -> None:
        make = loop.batches

        def batches(*args, first_step: int, left_out=(), **kwargs):
            numbers = (s for s in itertools.count(first_step) if not any(s in w for w in left_out))
            drawn = make(*args, first_step=first_step, left_out=left_out, **kwargs)
            for number, batch in zip(numbers, drawn, strict=False):
                if number == step:
                    batch.x_BCHW[1, 0, 0, 0] = torch.nan
                yield batch

        monkeypatch.setattr(loop, "batches", batches)

    return call


@pytest.mark.parametrize("step", [0, 6, 18])
def test_the_run_ends_as_one_that_left_the_window_out(
    shapes: Path, tmp_path: Path, monkeypatch, poison, capfd, step: int
) -> None:
    config = toy(shapes, **LOOP)
    with monkeypatch.context() as patch:
        window = Window(first=step, end=step + 3, cause="", capsule="")
        patch.setattr(loop, "read_windows", lambda _: [window])
        pretrain(config, tmp_path / "without")
    capfd.readouterr()
    poison(step)
    pretrain(config, tmp_path / "run")
    said = capfd.readouterr().err
    assert f"step {step}: the loss (nan)" in said
    assert (
        f"Rollback 1 of 3: going back to the newest checkpoint and leaving out steps {step} to {step + 2}"
        in said
    )
    assert_same_tensors(state_of(tmp_path / "run"), state_of(tmp_path / "without"))
    assert losses(tmp_path / "run") == losses(tmp_path / "without")
    assert {s for s, _ in losses(tmp_path / "run")} == {*range(1, step + 1), *range(step + 4, 21)}

    capsule = tmp_path / "run" / read_windows(tmp_path / "run")[0].capsule
    assert main(["replay", str(capsule), "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["inputs that are not finite"] == ["x_BCHW"]
    assert facts["positions whose loss is not finite"] == [4 * step + 1]
    assert facts["same batch drawn from the data"] is False
    assert "a fault of the machine" in facts["finding"]


def test_after_the_limit_the_run_stops_and_can_be_told_to_go_on(shapes: Path, tmp_path: Path, poison) -> None:
    for step in (5, 9, 13):
        poison(step)
    with pytest.raises(NotFinite, match=r"step 13: .*has gone back 2 times already"):
        pretrain(toy(shapes, **LOOP, rollbacks=2), tmp_path / "run")
    assert [w.first for w in read_windows(tmp_path / "run")] == [5, 9]
    (tmp_path / "run" / "capsules" / ".step-00000013.0123abcd.tmp").mkdir()  # killed while it was written
    pretrain(toy(shapes, **LOOP, rollbacks=3), tmp_path / "run")
    assert [w.first for w in read_windows(tmp_path / "run")] == [5, 9, 13]
    assert not list((tmp_path / "run").rglob(".*"))


def test_a_bad_weight_is_never_saved_and_heals(shapes: Path, tmp_path: Path, monkeypatch) -> None:
    """A weight that no sample of the next steps uses would go unseen into a checkpoint, and stay."""
    update, calls = loop.State.fault, itertools.count()

    def spoiled(state: loop.State) -> str:
        if next(calls) == 1:
            next(iter(state.ema.average.values())).view(-1)[3] = torch.inf
        return update(state)

    monkeypatch.setattr(loop.State, "fault", spoiled)
    pretrain(toy(shapes, **LOOP), tmp_path / "run")
    (window,) = read_windows(tmp_path / "run")
    assert (window.first, window.end) == (3, 6)
    assert window.cause.endswith("(ema) holds a number that is not finite")
    assert all(t.isfinite().all() for t in state_of(tmp_path / "run").values() if t.is_floating_point())


@pytest.mark.parametrize(
    ("method", "rival"),
    [
        ("kind", None),
        ("wave", None),
        ("tleg", None),
        ("fine", RivalConfig(method="fine", sigma_share=0.5)),
        ("dense", RivalConfig(method="svdiff")),
        ("dense", RivalConfig(method="heur-lg", inherit=1)),
        ("dense", RivalConfig(method="pissa", rank=4)),
        ("dense", RivalConfig(method="vera", rank=4)),
    ],
)
def test_the_capsule_of_any_model_is_replayed(
    shapes: Path, tmp_path: Path, poison, method: str, rival: RivalConfig | None
) -> None:
    """It holds what a step needs, wherever the run is: all is finite but the input that was not."""
    if rival is None:
        poison(5)
    pretrain(toy(shapes, method=method, **LOOP), tmp_path / "base")
    if rival is not None:
        poison(5)
        data = DataConfig(source=str(shapes), size=SIZE)
        config = AdaptConfig(data=data, rival=rival, train=TrainConfig(**LOOP))
        adapt(tmp_path / "base" / "model", config, tmp_path / "new")
    capsules = sorted(tmp_path.rglob("step-00000005"))  # FINE's first stage is a run inside the run
    assert len(capsules) == (2 if method == "fine" else 1)
    capsules[-1].rename(tmp_path / "capsule")
    facts = replay(tmp_path / "capsule")
    assert facts["weights that are not finite"] == []
    assert facts["inputs that are not finite"] == ["x_BCHW"]
    assert facts["positions whose loss is not finite"] == [21]

    path = tmp_path / "capsule" / "batch.safetensors"
    mended = {name: tensor.nan_to_num() for name, tensor in checkpoint.read_tensors(path).items()}
    checkpoint.write_tensors(path, mended)
    assert "everything is finite this time" in replay(tmp_path / "capsule")["finding"]


def test_a_damaged_capsule_or_list_is_named(shapes: Path, tmp_path: Path, poison, capfd) -> None:
    poison(5)
    pretrain(toy(shapes, **LOOP), tmp_path / "run")
    capsule = tmp_path / "run" / "capsules" / "step-00000005"
    for path in (capsule / "capsule.json", capsule / "batch.safetensors", capsule / "model" / "config.json"):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert main(["replay", str(capsule)]) == 1
        assert str(path) in capfd.readouterr().err
        path.write_bytes(whole)
    description = json.loads((capsule / "capsule.json").read_text())
    for run in ({"config": {"rival": {"method": "none such"}}}, {"config": 3}):
        (capsule / "capsule.json").write_text(json.dumps(description | {"run": run}))
        assert main(["replay", str(capsule)]) == 1
        assert "what it says of its run cannot be" in capfd.readouterr().err
    assert main(["replay", str(tmp_path)]) == 1
    assert "is no capsule" in capfd.readouterr().err
    (tmp_path / "run" / "rollbacks.json").write_text('{"windows": [{"first": 3, "end": 1}]}')
    with pytest.raises(BadFileError, match="rollbacks"):
        read_windows(tmp_path / "run")


# Saving in the background


class Slow:
    """A run whose disk takes its time."""

    ranks = ALONE

    def __init__(self, fail: bool = False) -> None:
        self.go, self.fail = threading.Event(), fail
        self.saved: list[tuple[int, float]] = []

    def save(self, step: int, tensors, *, last: bool = False) -> None:
        self.go.wait()
        if self.fail:
            raise OSError("the disk is gone")
        self.saved.append((step, float(tensors["model"]["x"])))


def test_a_save_writes_what_was_there_when_it_was_asked_for() -> None:
    run, x = Slow(), torch.zeros(())
    with Saver(run) as saver:
        saver.save(1, {"model": {"x": x}})
        x += 1  # training goes on while the disk writes
        assert run.saved == []
        run.go.set()
        saver.save(2, {"model": {"x": x}})
    assert run.saved == [(1, 0.0), (2, 1.0)]
    assert len(saver.waits) == 2


def test_a_failed_save_is_raised_once() -> None:
    run = Slow(fail=True)
    run.go.set()
    saver = Saver(run)
    saver.save(1, {"model": {"x": torch.zeros(())}})
    deadline = time.monotonic() + 10
    with pytest.raises(OSError, match="the disk is gone"):  # noqa: PT012
        while time.monotonic() < deadline:
            saver.check()
    saver.wait()
    with pytest.raises(OSError, match="the disk is gone"), saver:
        saver.save(2, {"model": {"x": torch.zeros(())}})


@pytest.mark.parametrize("save_every", [1, 2, 5])
def test_a_kill_at_any_moment_costs_at_most_save_every_steps(
    shapes: Path, tmp_path: Path, monkeypatch, save_every: int
) -> None:
    """With a disk that is done only when training waits for it: how far each step is from the newest checkpoint."""
    save, wait, keep_up, waiting, behind = Run.save, Saver.wait, Saver.keep_up, threading.Event(), []

    def slow(self, step, tensors, *, last=False) -> None:
        assert waiting.wait(60)
        save(self, step, tensors, last=last)

    def watched_wait(self) -> None:
        waiting.set()
        wait(self)
        waiting.clear()

    def watched(self, done, most) -> None:
        keep_up(self, done, most)
        whole = max(int(p.name[-8:]) for p in (tmp_path / "run" / "checkpoints").glob("step-*"))
        behind.append(done + 1 - whole)

    monkeypatch.setattr(Run, "save", slow)
    monkeypatch.setattr(Saver, "wait", watched_wait)
    monkeypatch.setattr(Saver, "keep_up", watched)
    pretrain(toy(shapes, **{**LOOP, "save_every": save_every, "steps": 12}), tmp_path / "run")
    assert len(behind) == 12
    assert max(behind) == save_every


def test_a_stop_while_a_save_is_running_loses_no_step(shapes: Path, tmp_path: Path, monkeypatch) -> None:
    save, running = Run.save, threading.Event()

    def slow(self, step, tensors, *, last=False) -> None:
        if step == 4:
            running.set()
            time.sleep(0.3)
        save(self, step, tensors, last=last)

    def watch() -> None:
        running.wait()
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "save", slow)
    threading.Thread(target=watch).start()
    with pytest.raises(Interrupted) as stopped:
        pretrain(toy(shapes, **LOOP), tmp_path / "run")
    done = losses(tmp_path / "run")[-1][0]
    assert f"stopped at step {done} of 20, saved" in str(stopped.value)
    assert max((tmp_path / "run" / "checkpoints").iterdir()).name == f"step-{done:08d}"
    pretrain(toy(shapes, **LOOP), tmp_path / "run")
    monkeypatch.undo()
    pretrain(toy(shapes, **LOOP), tmp_path / "whole")
    assert_same_tensors(state_of(tmp_path / "run"), state_of(tmp_path / "whole"))


def test_a_disk_that_gives_other_bytes_back_is_found_before_the_older_checkpoint_goes(
    tmp_path: Path, monkeypatch
) -> None:
    tensors = {group: {"x": torch.arange(4.0)} for group in ("model", "ema", "optimiser", "log")}
    run = Run(tmp_path / "run", {"seed": 1})
    run.save(1, tensors)
    sound = checkpoint.write_tensors

    def lying(path: Path, *rest) -> str:
        hashed = sound(path, *rest)
        if path.name == "ema.safetensors":
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        return hashed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", lying)
        with pytest.raises(BadFileError, match=r"ema\.safetensors does not hold what was written"):
            run.save(2, tensors)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    for step in (2, 3, 4):
        run.save(step, tensors)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000004",
    ]


def test_a_disk_that_cannot_be_read_now_is_no_damage(tmp_path: Path, monkeypatch) -> None:
    """Passing over every checkpoint because of a disk that is away for a minute would throw days of work away."""
    tensors = {group: {"x": torch.arange(4.0)} for group in ("model", "ema", "optimiser", "log")}
    Run(tmp_path / "run", {"seed": 1}).save(1, tensors)

    def away(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(checkpoint, "sha256", away)
    with pytest.raises(OSError, match="Input/output error"):
        Run(tmp_path / "run", {"seed": 1}).newest()
