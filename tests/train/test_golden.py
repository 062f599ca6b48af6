"""Pinned losses: 20 training steps in float64 through the real batches, losses and optimiser.

A change that should not alter results leaves golden.json alone. One that should, makes the numbers again with

    python tests/train/test_golden.py

and says why in its commit. The start is drawn by NumPy, so the numbers do not depend on a LAPACK; the tolerance
leaves room for the float32 sines and exponentials of other processors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from kindiff.checkpoint import read_tensors
from kindiff.cli.main import main
from kindiff.config import PretrainConfig
from kindiff.data import open_prepared
from kindiff.data.batches import Batch, batches
from kindiff.data.prepared import ImageSet
from kindiff.diffusion import loss_of
from kindiff.models import DiT
from kindiff.train import NotFinite, pretrain
from kindiff.train.optimiser import Optimiser, factor_of
from kindiff.train.pretraining import new_model
from toys import assert_same_tensors, toy, toy_arguments, write_shapes

GOLDEN = Path(__file__).with_name("golden.json")
CASES = [(method, objective) for method in ("kind", "dense") for objective in ("flow", "epsilon")]


def golden_losses(shapes: Path, method: str, objective: str) -> list[float]:
    """20 steps from a start without zeros or identities."""
    config = toy(
        shapes, method=method, objective=objective, steps=20, lr=2e-3, tailor_lr=4e-3, weight_decay=0.1
    )
    samples = open_prepared(shapes)
    model = new_model(config, samples).double()
    random = np.random.default_rng(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(0.1 * random.standard_normal(parameter.shape)))
    optimiser, loss_function = Optimiser(model, config.train), loss_of(model.config)
    losses = []
    feed = batches(samples, config.objective, seed=0, first_step=0, steps=20, batch=8, flip=True)
    for step, batch in enumerate(feed):
        batch = Batch(*(t.double() if t.is_floating_point() else t for t in batch))
        loss = loss_function(
            lambda x, t, batch=batch: model(x, t, batch.ids_B, batch.gate_ids_B),
            batch.x_BCHW, batch.noise_BCHW, batch.u_B,
        ).mean()  # fmt: skip
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimiser.parameters, config.train.clip)
        slots = model.gate.slots_on(batch.gate_ids_B) if model.gate is not None else torch.empty(0)
        optimiser.step(factor=factor_of(step, config.train), slots=slots, ids=torch.unique(batch.ids_B))
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


@pytest.mark.parametrize(("method", "objective"), CASES)
def test_golden_losses(shapes: Path, method, objective) -> None:
    pinned = json.loads(GOLDEN.read_text())[f"{method} {objective}"]
    found = golden_losses(shapes, method, objective)
    assert found == pytest.approx(pinned, rel=1e-6)
    assert len(set(found)) == 20


def validation_loss(model: DiT, samples: ImageSet, config: PretrainConfig) -> float:
    """Mean loss over every picture at 8 noise levels each, without dropout."""
    (batch,) = batches(
        samples, type(config.objective)(kind=config.objective.kind, label_dropout=0.0, gate_dropout=0.0),
        seed=99, first_step=0, steps=1, batch=8 * len(samples), flip=False,
    )  # fmt: skip
    loss = loss_of(model.config)
    with torch.no_grad():
        return float(
            loss(lambda x, t: model(x, t, batch.ids_B), batch.x_BCHW, batch.noise_BCHW, batch.u_B).mean()
        )


@pytest.mark.parametrize(("method", "objective"), CASES)
def test_training_lowers_the_loss(shapes: Path, tmp_path: Path, method, objective) -> None:
    config = toy(
        shapes, method=method, objective=objective, steps=150, lr=4e-3, save_every=150, log_every=150,
        ema=0.9, precision="fp32",
    )  # fmt: skip
    samples = open_prepared(shapes)
    before = validation_loss(new_model(config, samples), samples, config)
    trained = pretrain(config, tmp_path / "run").model
    after = validation_loss(trained, samples, config)
    assert after < 0.6 * before, (before, after)


def test_the_tailors_of_a_trained_model_are_used(shapes: Path, tmp_path: Path) -> None:
    """With the tailors off, or swapped, the trained model is worse at its own pictures."""
    config = toy(shapes, steps=150, lr=4e-3, save_every=150, log_every=150, ema=0.9, precision="fp32")
    samples = open_prepared(shapes)
    model = pretrain(config, tmp_path / "run").model
    right = validation_loss(model, samples, config)
    for _, layer in model.named_matrices():
        layer.tailor_u.data = layer.tailor_u.data.roll(1, dims=0)
    assert validation_loss(model, samples, config) > 1.02 * right


class Poisoned(ImageSet):
    """A set with a pixel that is not a number at one step."""

    def __init__(self, samples: ImageSet, step: int) -> None:
        self.__dict__.update(samples.__dict__)
        self.__dict__["left"] = [step]

    def fetch(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        x_BCHW = super().fetch(indices, flips)
        self.left[0] -= 1
        if self.left[0] < 0:
            x_BCHW[0, 0, 0, 0] = np.nan
        return x_BCHW


@pytest.mark.parametrize("step", [0, 6])
def test_a_loss_that_is_not_finite_stops_before_the_step(
    shapes: Path, tmp_path: Path, monkeypatch, step: int
) -> None:
    samples, config = open_prepared(shapes), toy(shapes, save_every=3, rollbacks=0)
    with monkeypatch.context() as patch:
        patch.setattr("kindiff.train.pretraining.open_samples", lambda _: Poisoned(samples, step))
        with pytest.raises(NotFinite, match=f"step {step}: the loss"):
            pretrain(config, tmp_path / "run")
    place = max((tmp_path / "run" / "checkpoints").iterdir())
    assert place.name == f"step-{step:08d}"
    assert json.loads((place / "state.json").read_text())["step"] == step
    for file in place.glob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in read_tensors(file).values()), file
    if step == 0:
        untrained = new_model(config, samples).state_dict()
        assert_same_tensors(read_tensors(place / "model.safetensors"), untrained)

    # The state is that of a healthy run after as many steps: going on from it gives the healthy run's model.
    pretrain(config, tmp_path / "run")
    pretrain(config, tmp_path / "healthy")
    model_file = Path("model") / "model.safetensors"
    assert_same_tensors(
        read_tensors(tmp_path / "run" / model_file), read_tensors(tmp_path / "healthy" / model_file)
    )


def test_divergence_is_one_sentence(shapes: Path, tmp_path: Path, capfd) -> None:
    arguments = toy_arguments(shapes, lr=1e30, warmup=0, steps=60)
    assert main(["pretrain", str(tmp_path / "run"), *arguments]) == 1
    stderr = capfd.readouterr().err
    *log, sentence = stderr.splitlines()
    assert [line.partition("Rollback ")[2][:6] for line in log if "Rollback" in line] == [
        "1 of 3", "2 of 3", "3 of 3",
    ]  # fmt: skip
    assert sentence.startswith("kindiff: step ")
    assert "is not finite" in sentence
    assert "Traceback" not in stderr
    assert not (tmp_path / "run" / "model").exists()


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = write_shapes(Path(folder) / "shapes")
        numbers = {f"{m} {o}": golden_losses(source, m, o) for m, o in CASES}
    GOLDEN.write_text(json.dumps(numbers, indent=1) + "\n")
