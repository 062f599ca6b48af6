"""Batches are a function of the position: nothing else changes a bit of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kindiff.config import ObjectiveConfig
from kindiff.data import ImageSet, open_prepared
from kindiff.data.batches import Batch, batches, make_batch, order
from kindiff.data.prepared import write_prepared
from kindiff.errors import UsageError

NULL = 3
OBJECTIVE = ObjectiveConfig(label_dropout=0.1, gate_dropout=0.2)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    random = np.random.default_rng(0)
    target = tmp_path_factory.mktemp("batches") / "set"
    classes = (
        (n, random.integers(0, 256, (c, 8, 8, 3), dtype=np.uint8))
        for n, c in zip("abc", (7, 5, 9), strict=True)
    )
    write_prepared(target, classes, size=8, source="a test")
    return open_prepared(target)


def run(
    samples: ImageSet, *, seed: int = 3, first_step: int = 0, steps: int = 6, batch: int = 8,
    workers: int = 0, rank: int = 0, ranks: int = 1,
) -> list[Batch]:  # fmt: skip
    return list(
        batches(
            samples, OBJECTIVE, seed=seed, first_step=first_step, steps=steps, batch=batch, flip=True,
            workers=workers, rank=rank, ranks=ranks,
        )
    )  # fmt: skip


def joined(parts: list[Batch]) -> Batch:
    return Batch(*(torch.cat(column) for column in zip(*parts, strict=True)))


def assert_same(one: Batch, other: Batch) -> None:
    for name, x, y in zip(Batch._fields, one, other, strict=True):
        assert x.dtype == y.dtype, name
        assert torch.equal(x, y), name


def test_shapes_and_types(samples: ImageSet) -> None:
    batch = make_batch(samples, OBJECTIVE, seed=0, first_position=5, batch=4, flip=True)
    assert batch.x_BCHW.shape == batch.noise_BCHW.shape == (4, 3, 8, 8)
    assert batch.ids_B.shape == batch.gate_ids_B.shape == batch.u_B.shape == (4,)
    assert batch.x_BCHW.dtype == batch.noise_BCHW.dtype == batch.u_B.dtype == torch.float32
    assert batch.ids_B.dtype == batch.gate_ids_B.dtype == torch.int64


def test_the_size_of_a_batch_changes_nothing(samples: ImageSet) -> None:
    small, large = joined(run(samples, batch=4, steps=12)), joined(run(samples, batch=24, steps=2))
    assert_same(small, large)


def test_a_later_start_is_the_rest_of_the_run(samples: ImageSet) -> None:
    assert_same(joined(run(samples)[2:]), joined(run(samples, first_step=2, steps=4)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on fewer than three cores
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(samples: ImageSet, workers: int) -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    alone, helped = run(samples), run(samples, workers=workers)
    assert len(alone) == len(helped) == 6
    assert_same(joined(alone), joined(helped))
    assert torch.equal(before, torch.random.get_rng_state()), "torch's global generator was touched"


def test_ranks_share_one_batch(samples: ImageSet) -> None:
    whole = run(samples, batch=8, steps=3)
    ranks = [run(samples, batch=8, steps=3, rank=r, ranks=4) for r in range(4)]
    for step, batch in enumerate(whole):
        assert_same(batch, joined([ranks[r][step] for r in range(4)]))


def test_ranks_that_do_not_divide(samples: ImageSet) -> None:
    with pytest.raises(UsageError, match="batch of 8 does not divide among 3 ranks"):
        run(samples, ranks=3)


def test_every_epoch_is_a_permutation(samples: ImageSet) -> None:
    orders = [order(0, epoch, 21) for epoch in range(3)]
    for one in orders:
        assert sorted(one.tolist()) == list(range(21))
    assert len({tuple(one.tolist()) for one in orders}) == 3
    assert order(1, 0, 21).tolist() != orders[0].tolist()


def test_positions_walk_through_the_epochs(samples: ImageSet) -> None:
    never = ObjectiveConfig(label_dropout=0, gate_dropout=0)
    # One batch over the end of the first epoch, and all of the second.
    batch = make_batch(samples, never, seed=4, first_position=15, batch=27, flip=False)
    index = np.concatenate([order(4, 0, 21)[15:], order(4, 1, 21)])
    expected = samples.fetch(index, np.zeros(27, bool))
    np.testing.assert_array_equal(batch.x_BCHW.numpy(), expected)
    np.testing.assert_array_equal(batch.ids_B.numpy(), samples.labels[index])
    assert torch.equal(batch.ids_B, batch.gate_ids_B)


def test_dropout_rates(samples: ImageSet) -> None:
    count = 6000
    batch = make_batch(samples, OBJECTIVE, seed=0, first_position=0, batch=count, flip=False)
    index = np.concatenate([order(0, e, 21) for e in range(count // 21 + 1)])[:count]
    labels = torch.from_numpy(samples.labels[index])
    no_label, no_gate = batch.ids_B == NULL, batch.gate_ids_B == NULL
    assert torch.equal(batch.ids_B[~no_label], labels[~no_label])
    assert torch.equal(batch.gate_ids_B[~no_gate], labels[~no_gate])
    assert no_gate[no_label].all()
    # Four standard errors of a share of 6000: 0.016 and 0.021.
    assert no_label.float().mean() == pytest.approx(0.1, abs=0.016)
    assert no_gate[~no_label].float().mean() == pytest.approx(0.2, abs=0.022)


def test_label_dropout_does_not_disturb_the_gate_or_the_noise(samples: ImageSet) -> None:
    def draw(label: float) -> Batch:
        objective = ObjectiveConfig(label_dropout=label, gate_dropout=0.5)
        return make_batch(samples, objective, seed=0, first_position=0, batch=64, flip=True)

    none, half = draw(0), draw(0.5)
    assert torch.equal(none.noise_BCHW, half.noise_BCHW)
    assert torch.equal(none.x_BCHW, half.x_BCHW)
    assert torch.equal(none.u_B, half.u_B)
    kept = half.ids_B != NULL
    assert torch.equal(none.gate_ids_B[kept], half.gate_ids_B[kept])
    assert 0 < kept.sum() < 64


def test_noise_timestep_and_flip(samples: ImageSet) -> None:
    batch = make_batch(samples, OBJECTIVE, seed=0, first_position=0, batch=2000, flip=True)
    straight = make_batch(samples, OBJECTIVE, seed=0, first_position=0, batch=2000, flip=False)
    flipped = (batch.x_BCHW != straight.x_BCHW).flatten(1).any(1)
    assert torch.equal(batch.x_BCHW[flipped], straight.x_BCHW[flipped].flip(-1))
    assert flipped.float().mean() == pytest.approx(0.5, abs=0.045)
    assert torch.equal(batch.noise_BCHW, straight.noise_BCHW)
    assert batch.noise_BCHW.mean().item() == pytest.approx(0, abs=0.007)
    assert batch.noise_BCHW.std().item() == pytest.approx(1, abs=0.007)
    assert 0 <= batch.u_B.min() < 0.01
    assert 0.99 < batch.u_B.max() < 1
    assert batch.u_B.mean().item() == pytest.approx(0.5, abs=0.026)
    assert len(batch.u_B.unique()) > 1990


def test_the_seed_matters(samples: ImageSet) -> None:
    one = make_batch(samples, OBJECTIVE, seed=0, first_position=0, batch=8, flip=True)
    other = make_batch(samples, OBJECTIVE, seed=1, first_position=0, batch=8, flip=True)
    assert not torch.equal(one.noise_BCHW, other.noise_BCHW)
    assert not torch.equal(one.x_BCHW, other.x_BCHW)


def test_first_draws_are_pinned(samples: ImageSet) -> None:
    """A change of these numbers changes every training run: it needs a reason and a line in CHANGELOG.md."""
    batch = make_batch(samples, OBJECTIVE, seed=0, first_position=0, batch=1, flip=True)
    assert order(0, 0, 8).tolist() == PINNED_ORDER
    assert batch.u_B.item() == pytest.approx(PINNED_U, abs=1e-7)
    assert batch.noise_BCHW[0, 0, 0, :3].tolist() == pytest.approx(PINNED_NOISE, abs=1e-6)


PINNED_ORDER = [2, 0, 4, 1, 7, 5, 3, 6]
PINNED_U = 0.6249396800994873
PINNED_NOISE = [0.07942389696836472, -0.5533003211021423, -0.751427173614502]

LOOP = """
import signal, sys
from kindiff.config import ObjectiveConfig
from kindiff.data import open_prepared
from kindiff.data.batches import batches
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell had it ignored
samples, asked = open_prepared(sys.argv[1]), []
if sys.argv[2] == "finish":
    signal.signal(signal.SIGINT, lambda *_: (asked.append(True), print("asked", flush=True)))
steps = batches(samples, ObjectiveConfig(), seed=0, first_step=0, steps=10**9, batch=8, flip=True, workers=2)
left = 100
try:
    for number, _ in enumerate(steps):
        if number == 5:
            print("running", flush=True)
        left -= len(asked)
        if left == 0:
            break
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
print("finished", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "way", "code", "said"),
    [
        (signal.SIGINT, "stop", 130, "interrupted\n"),
        (signal.SIGINT, "finish", 0, "asked\nfinished\n"),  # the handler is not for the loader processes
        (signal.SIGTERM, "stop", -signal.SIGTERM, ""),
    ],
)
def test_signals_end_quietly(
    samples: ImageSet, number: signal.Signals, way: str, code: int, said: str
) -> None:
    """Ctrl-C reaches the whole group, SIGTERM the main process alone; no loader process prints or stays."""
    child = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(samples.path), way],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "running\n"
    workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    assert len(workers) >= 2
    if number == signal.SIGINT:
        os.killpg(child.pid, number)
    else:
        child.send_signal(number)
    out, err = child.communicate(timeout=30)  # ends only when every process that holds the pipe is gone
    assert (child.returncode, out, err) == (code, said, "")
