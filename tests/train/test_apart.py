"""A step's tailors apart from their banks: the same step as with the banks' own gradients, and one compiled graph."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from conftest import NAMES
from kindiff.config import TrainConfig
from kindiff.models import DiT
from kindiff.train import pretrain
from kindiff.train.optimiser import Optimiser
from toys import toy, write_shapes


def step(
    model: DiT,
    optimiser: Optimiser,
    ids: torch.Tensor,
    gate_ids: torch.Tensor,
    images: int = 0,
    repeat: bool = False,
) -> torch.Tensor:
    """repeat: slots and ids are filled up too, as where a step is recorded."""
    generator = torch.Generator().manual_seed(int(ids.sum()))
    x = torch.randn(len(ids), 3, 8, 8, generator=generator).to(model.positions_TD)
    t = torch.rand(len(ids), generator=generator).to(x) * 1000
    slots = model.gate.slots_on(gate_ids)
    with optimiser.of_slots(slots, images):
        model(x, t, ids, gate_ids).square().mean().backward()
    norm = optimiser.clip(0.1)
    ids = torch.unique(ids)
    if repeat and len(slots):
        slots = optimiser.places(slots, images)[0]
        ids = torch.cat([ids, ids[:1].expand(images - len(ids))])
    optimiser.step(factor=1.0, slots=slots, ids=ids)
    return norm


def mixes(count: int):
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        ids = torch.randint(0, len(NAMES) + 1, (6,), generator=generator)
        yield ids, torch.where(torch.rand(6, generator=generator) < 0.3, len(NAMES), ids)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("images", "repeat"), [(0, False), (6, False), (6, True)])
def test_steps_are_those_of_the_whole_banks(
    kind_model: DiT, recompute: bool, images: int, repeat: bool
) -> None:
    """float64: clipping, moments and updates of ten steps, null and dropped gates among them."""
    apart = copy.deepcopy(kind_model).double().train()
    whole = copy.deepcopy(apart)
    apart.recompute = recompute
    banks = [p for n, p in apart.named_parameters() if ".tailor_" in n]
    own = Optimiser(apart, TrainConfig(lr=1e-2))
    other = Optimiser(whole, TrainConfig(lr=1e-2), alone=False)
    for ids, gate_ids in mixes(10):
        a = step(apart, own, ids, gate_ids, images, repeat)
        b = step(whole, other, ids, gate_ids)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=0)
        assert all(bank.grad is None for bank in banks)
    for (name, a), (_, b) in zip(apart.named_parameters(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)
    for name, tensor in own.tensors().items():
        torch.testing.assert_close(tensor, other.tensors()[name], rtol=1e-7, atol=1e-12, msg=name)
    assert apart.gate.slots_CK.equal(whole.gate.slots_CK)


def test_no_more_rows_are_filled_up_than_the_bank_has(kind_model: DiT) -> None:
    optimiser = Optimiser(kind_model, TrainConfig())
    for images, count in ((2, 2), (4, 4), (64, len(NAMES))):
        rows, _ = optimiser.places(torch.tensor([1]), images)
        assert rows.tolist() == [1] * count


def test_the_banks_are_back_after_an_error(kind_model: DiT) -> None:
    optimiser = Optimiser(kind_model, TrainConfig())
    before = dict(kind_model.named_parameters())

    def fail() -> None:
        with optimiser.of_slots(torch.tensor([2])):
            assert len(kind_model.blocks[0].q.tailor_u) == 1
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert all(p is before[name] for name, p in kind_model.named_parameters())


@pytest.mark.slow
def test_a_compiled_step_is_one_graph_for_all_class_mixes(kind_model: DiT) -> None:
    torch._dynamo.reset()
    counters.clear()
    kind_model.train()
    eager = copy.deepcopy(kind_model)
    kind_model.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    own, other = Optimiser(kind_model, TrainConfig(lr=1e-3)), Optimiser(eager, TrainConfig(lr=1e-3))
    for i, (ids, gate_ids) in enumerate(mixes(100)):
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            step(kind_model, own, ids, gate_ids, images=6)
        step(eager, other, ids, gate_ids)
    for (name, a), (_, b) in zip(kind_model.named_parameters(), eager.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_run_compiles(tmp_path: Path) -> None:
    """The loop itself, compiled by the default backend, against the same run without."""
    found = []
    config = toy(write_shapes(tmp_path / "shapes"))
    for on in (False, True):
        train = replace(config.train, steps=4, compile=on, precision="fp32")
        found.append(pretrain(replace(config, train=train), tmp_path / f"run-{on}").model)
    for (name, a), (_, b) in zip(*(model.named_parameters() for model in found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    torch._dynamo.reset()
