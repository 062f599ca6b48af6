"""A run that is killed, stopped or damaged, and resumed by the same command, is the uninterrupted run to the bit."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kindiff import checkpoint
from kindiff.cli.main import main
from kindiff.config import PretrainConfig
from kindiff.data import open_prepared
from kindiff.data.batches import batches
from kindiff.data.prepared import ImageSet
from kindiff.errors import BadFileError, UsageError
from kindiff.train import pretrain
from kindiff.train.run import GROUPS, _read
from toys import assert_same_tensors, files_of, no_file_longer_than, start, toy, toy_arguments, write_shapes

LONG = {"steps": 120, "batch": 4, "save_every": 4, "log_every": 3}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def long_run(shapes: Path, tmp_path_factory) -> Path:
    """The uninterrupted run that the killed and stopped ones are compared with."""
    out = tmp_path_factory.mktemp("long") / "run"
    assert main(["pretrain", str(out), *toy_arguments(shapes, **LONG)]) == 0
    return out


@pytest.fixture(scope="module")
def short_run(shapes: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("short") / "run"
    pretrain(toy(shapes), out)
    return out


def everything(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a finished run: model, EMA and optimiser of its checkpoint, and the model it wrote."""
    (place,) = (run / "checkpoints").iterdir()
    tensors = {}
    for group in GROUPS:
        tensors |= {
            f"{group}/{k}": v for k, v in checkpoint.read_tensors(place / f"{group}.safetensors").items()
        }
    return tensors | checkpoint.read_tensors(run / "model" / "model.safetensors")


def metrics(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def assert_same_run(found: Path, wanted: Path) -> None:
    assert_same_tensors(everything(found), everything(wanted))
    assert metrics(found) == metrics(wanted)
    assert not list(found.rglob(".*")), "a temporary file is left behind"


def steps_done(run: Path) -> int:
    """The newest step that the running process has saved."""
    try:
        names = [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith("step-")]
    except FileNotFoundError:
        return 0
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while steps_done(run) < step:
        assert process.poll() is None, f"ended before step {step}: {process.communicate()[1]}"
        assert time.monotonic() < deadline, f"no step {step} in two minutes"
        time.sleep(0.001)


def test_killed_at_three_random_moments(shapes: Path, long_run: Path, tmp_path: Path, capfd) -> None:
    random = np.random.default_rng(0)
    arguments = ["pretrain", tmp_path / "run", *toy_arguments(shapes, **LONG)]
    for low, high in ((1, 20), (30, 50), (60, 84)):
        process = start(*arguments)
        wait_for_step(process, tmp_path / "run", int(random.integers(low, high)))
        time.sleep(random.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert "Traceback" not in stderr
    # What a kill in the middle of writing leaves, in case these three moments missed it.
    left_over = tmp_path / "run" / "checkpoints" / ".step-00000112.0123abcd.tmp"
    left_over.mkdir()
    (left_over / "model.safetensors").write_bytes(b"half")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    assert main([str(a) for a in arguments]) == 0
    assert "resuming at step" in capfd.readouterr().err
    assert_same_run(tmp_path / "run", long_run)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stop_signals_save_and_say_how_to_resume(
    shapes: Path, long_run: Path, tmp_path: Path, signum, code
) -> None:
    settings = {**LONG, "save_every": 20}
    arguments = ["pretrain", tmp_path / "run", *toy_arguments(shapes, **settings)]
    process = start(*arguments)
    wait_for_step(process, tmp_path / "run", 20)
    process.send_signal(signum)
    _, stderr = process.communicate()
    assert process.returncode == code
    assert "to resume, run the same command again" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    saved = steps_done(tmp_path / "run")
    assert saved > 20
    assert f"stopped at step {saved} of 120" in stderr
    assert main([str(a) for a in arguments]) == 0
    assert_same_run(tmp_path / "run", long_run)


def test_interrupted_before_the_first_step(shapes: Path, tmp_path: Path, short_run: Path) -> None:
    """A process killed between making the directory and describing the run does not block the next one."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".run.json.0123abcd.tmp").write_text("{")
    pretrain(toy(shapes), run)
    assert_same_run(run, short_run)


def test_loader_workers_change_no_batch_and_no_weight(shapes: Path, short_run: Path, tmp_path: Path) -> None:
    config, samples = toy(shapes), open_prepared(shapes)
    drawn = [
        list(
            batches(
                samples, config.objective, seed=3, first_step=5, steps=6, batch=5, flip=True, workers=workers
            )
        )
        for workers in (0, 1, 2)
    ]
    for other in drawn[1:]:
        for a, b in zip(drawn[0], other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for workers in (1, 2):
        pretrain(toy(shapes, workers=workers), tmp_path / str(workers))
        assert_same_run(tmp_path / str(workers), short_run)


class Failing(ImageSet):
    """A set whose disk fails at one step."""

    def __init__(self, samples: ImageSet, calls: int) -> None:
        self.__dict__.update(samples.__dict__)
        self.__dict__["left"] = [calls]

    def fetch(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise OSError("the disk is gone")
        return super().fetch(indices, flips)


@pytest.fixture
def break_off(monkeypatch) -> Callable[..., None]:
    """Train `steps` further steps of a run, then fail."""

    def call(config: PretrainConfig, out: Path, *, steps: int) -> None:
        samples = open_prepared(Path(config.data.source))
        with monkeypatch.context() as patch:
            patch.setattr("kindiff.train.pretraining.open_samples", lambda _: Failing(samples, steps))
            with pytest.raises(OSError, match="the disk is gone"):
                pretrain(config, out)

    return call


@pytest.fixture
def two_checkpoints(shapes: Path, tmp_path: Path, break_off) -> Path:
    """An unfinished run of 12 steps with whole checkpoints at steps 6 and 8."""
    run, config = tmp_path / "run", toy(shapes)
    break_off(config, run, steps=9)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    return run


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half, Path.unlink])
@pytest.mark.parametrize("name", ["model", "ema", "optimiser", "log", "state"])
def test_a_damaged_newest_checkpoint_is_passed_over(
    shapes: Path, short_run: Path, two_checkpoints: Path, capfd, damage, name
) -> None:
    file = f"{name}.json" if name == "state" else f"{name}.safetensors"
    path = two_checkpoints / "checkpoints" / "step-00000008" / file
    damage(path)
    pretrain(toy(shapes), two_checkpoints)
    stderr = capfd.readouterr().err
    (named,) = [line for line in stderr.splitlines() if "passing over a checkpoint" in line]
    # a flipped bit in the recorded hash of a file looks like damage of that file
    assert str(path if name != "state" else path.parent) in named
    assert "resuming at step 6" in stderr
    assert_same_run(two_checkpoints, short_run)


def test_no_whole_checkpoint_starts_over(shapes: Path, short_run: Path, two_checkpoints: Path, capfd) -> None:
    for place in (two_checkpoints / "checkpoints").iterdir():
        flip_a_bit(place / "optimiser.safetensors")
    pretrain(toy(shapes), two_checkpoints)
    stderr = capfd.readouterr().err
    assert stderr.count("passing over a checkpoint") == 2
    assert "resuming" not in stderr
    assert_same_run(two_checkpoints, short_run)


def test_no_flipped_bit_of_a_description_goes_unnoticed(two_checkpoints: Path) -> None:
    """Any single bit of state.json: the checkpoint is refused, or what is read is what was saved."""
    place = two_checkpoints / "checkpoints" / "step-00000008"
    whole, content = _read(place), (place / "state.json").read_bytes()
    refused = 0
    random = np.random.default_rng(0)
    for bit in random.choice(8 * len(content), 600, replace=False).tolist():
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << (bit % 8)
        (place / "state.json").write_bytes(damaged)
        try:
            step, groups = _read(place)
        except BadFileError:
            refused += 1
            continue
        assert step == whole[0], bit
        for group, tensors in whole[1].items():
            assert_same_tensors(groups[group], tensors)
    assert refused > 500


def test_a_full_disk_while_saving_keeps_the_older_checkpoint(
    shapes: Path, short_run: Path, tmp_path: Path, break_off
) -> None:
    config, run = toy(shapes), tmp_path / "run"
    break_off(config, run, steps=5)
    before = files_of(run / "checkpoints")
    limit = (run / "checkpoints" / "step-00000004" / "optimiser.safetensors").stat().st_size // 2
    with no_file_longer_than(limit), pytest.raises(OSError, match="too large"):
        pretrain(config, run)
    assert files_of(run / "checkpoints") == before
    pretrain(config, run)
    assert_same_run(run, short_run)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--train.lr", "0.5"], "config.train.lr was 0.003, now 0.5"),
        (["--kind.tailor-rank", "3"], "config.kind.tailor_rank was 2, now 3"),
        (["--data.per-class", "5"], "config.data.per_class was 0, now 5"),
        (["--train.steps", "13"], "config.train.steps was 12, now 13"),
    ],
)
def test_other_settings_are_refused(shapes: Path, short_run: Path, capsys, change, named) -> None:
    before = files_of(short_run)
    assert main(["pretrain", str(short_run), *toy_arguments(shapes), *change]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert named in captured.err
    assert files_of(short_run) == before


def test_another_content_of_the_data_is_refused(
    shapes: Path, short_run: Path, tmp_path: Path, capsys
) -> None:
    moved = tmp_path / "shapes"
    shutil.move(shapes, moved)
    try:
        write_shapes(shapes, per_class=7)
        assert main(["pretrain", str(short_run), *toy_arguments(shapes)]) == 2
        assert "(data was" in capsys.readouterr().err
    finally:
        shutil.rmtree(shapes)
        shutil.move(moved, shapes)


def test_a_folder_with_other_things_is_refused(shapes: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    assert main(["pretrain", str(tmp_path), *toy_arguments(shapes)]) == 2
    assert "is not empty and holds no run" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("free", [[], ["--train.workers", "1"], ["--train.log-every", "1"]])
def test_a_finished_run_says_so_and_changes_nothing(shapes: Path, short_run: Path, capsys, free) -> None:
    before = files_of(short_run)
    assert main(["pretrain", str(short_run), *toy_arguments(shapes), *free]) == 0
    captured = capsys.readouterr()
    assert captured.err == f"{short_run} is finished already\n"
    assert captured.out == f"{short_run / 'model'}\n"
    assert files_of(short_run) == before


def test_a_finished_run_keeps_its_newest_checkpoint_only(short_run: Path) -> None:
    assert [p.name for p in (short_run / "checkpoints").iterdir()] == ["step-00000012"]
    assert [line["step"] for line in metrics(short_run)] == [3, 6, 9, 12]


def test_a_run_is_locked_against_a_second_process(tmp_path: Path, capsys) -> None:
    shapes, run = write_shapes(tmp_path / "shapes"), tmp_path / "run"
    run.mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, run / "run.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"1\n"
    arguments = ["pretrain", str(run), *toy_arguments(shapes, steps=4)]
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        f"kindiff: another process trains in {run}; wait for its end or stop it, or use another folder.\n"
    )
    other.kill()
    other.communicate()
    assert main(arguments) == 0


def test_a_run_of_a_version_with_fewer_settings_goes_on(
    short_run: Path, shapes: Path, tmp_path: Path
) -> None:
    """A setting that run.json does not know had its default, and nothing else."""
    run = tmp_path / "run"
    shutil.copytree(short_run, run)
    written = json.loads((run / "run.json").read_text())
    for key, section in (("compile", "train"), ("clip", "train"), ("null_gate", "objective")):
        del written["description"]["config"][section][key]
    (run / "run.json").write_text(json.dumps(written))
    assert_same_tensors(
        pretrain(toy(shapes), run).model.state_dict(), pretrain(toy(shapes), short_run).model.state_dict()
    )
    with pytest.raises(UsageError, match="holds a run with other settings"):
        pretrain(toy(shapes, clip=0.5), run)
