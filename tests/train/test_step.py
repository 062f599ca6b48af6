"""A recorded step: on a GPU the run of plain steps, elsewhere without effect."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kindiff.components import decompose, save_components
from kindiff.config import DataConfig, PretrainConfig, TransferConfig
from kindiff.models import DiT
from kindiff.train import pretrain, transfer
from toys import NEW_SHAPES, SIZE, toy, write_shapes


def runs(config: PretrainConfig, folder: Path) -> list[DiT]:
    """Models of the run with and without recording."""
    found = []
    for record in (False, True):
        train = replace(config.train, record=record)
        found.append(pretrain(replace(config, train=train), folder / f"record-{record}").model)
    return found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU records")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32")  # torch.compile's own
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("objective", ["flow", "epsilon"])
@pytest.mark.parametrize("gate", ["", "class", "soft"])
def test_a_recorded_run_is_the_run_of_plain_steps(tmp_path: Path, gate, objective, compiled) -> None:
    """Class mixes, batches without any tailor, two halves of a batch, checkpoints on the way."""
    config = toy(
        write_shapes(tmp_path / "shapes"), method="kind" if gate else "dense", objective=objective, steps=16, batch=4,
        accumulate=2, precision="fp32", compile=compiled, device="cuda",
    )  # fmt: skip
    if gate:
        kind = replace(config.kind, gate=gate)
        config = replace(config, kind=kind, objective=replace(config.objective, gate_dropout=0.6))
    plain, recorded = runs(config, tmp_path)
    for (name, a), (_, b) in zip(plain.named_parameters(), recorded.named_parameters(), strict=True):
        if gate == "soft":  # so sensitive in these few steps that two plain runs on a GPU differ as much
            assert b.isfinite().all(), name
            continue
        if name.endswith(".k.bias"):
            continue  # attention does not see it: its gradient is rounding alone
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU records")
@pytest.mark.parametrize("trains", ["components", "mixture"])
def test_a_recorded_transfer_is_the_transfer_of_plain_steps(tmp_path: Path, trains) -> None:
    before = pretrain(toy(write_shapes(tmp_path / "shapes"), steps=8), tmp_path / "base").model
    save_components(decompose(before), tmp_path / "parts")
    new = DataConfig(source=str(write_shapes(tmp_path / "new", NEW_SHAPES)), size=SIZE)
    train = toy(tmp_path, steps=16, batch=4, precision="fp32").train
    found = []
    for record in (False, True):
        config = TransferConfig(data=new, rank=2, train=replace(train, record=record))
        if trains == "mixture":
            config = replace(config, trains="mixture", init="nearest", mixes=2)
        found.append(transfer(tmp_path / "parts", config, tmp_path / f"record-{record}").model)
    x, ids = torch.randn(2, 3, SIZE, SIZE), torch.tensor([0, 1])
    with torch.no_grad():
        plain, recorded = (model.cpu()(x, torch.tensor([0.3, 0.6]), ids) for model in found)
    torch.testing.assert_close(plain, recorded, rtol=1e-3, atol=1e-4)


def test_nothing_is_recorded_without_a_gpu(tmp_path: Path) -> None:
    plain, same = runs(toy(write_shapes(tmp_path / "shapes"), steps=5, device="cpu"), tmp_path)
    assert all(a.equal(b) for a, b in zip(plain.parameters(), same.parameters(), strict=True))
