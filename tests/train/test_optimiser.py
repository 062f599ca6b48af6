"""What may move in a step, and what must not: rows of absent classes, learngenes in transfer, decay, EMA, rates."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from conftest import randomised
from kindiff.classes import ClassSet
from kindiff.components import decompose, factorize, load_components, save_components
from kindiff.config import DataConfig, KindConfig, ObjectiveConfig, RivalConfig, TrainConfig, TransferConfig
from kindiff.data import open_prepared
from kindiff.data.batches import make_batch
from kindiff.diffusion import flow_loss
from kindiff.errors import UsageError
from kindiff.models import DiT
from kindiff.parallel import ALONE
from kindiff.rivals import start
from kindiff.rivals.learngenes import constrained
from kindiff.train import pretrain, transfer
from kindiff.train.optimiser import BETAS, EPS, Optimiser, RowAdam, factor_of
from kindiff.train.state import State
from kindiff.train.transferring import transfer_objective
from toys import NEW_SHAPES, SHAPES, SIZE, assert_same_tensors, toy, write_shapes

FLOAT = {"rtol": 1e-6, "atol": 1e-8}


def take_step(model: DiT, optimiser: Optimiser, ids: list[int], gate_ids: list[int], seed: int) -> None:
    """One training step of the flow loss on a batch of these classes."""
    generator = torch.Generator().manual_seed(seed)
    x_0, noise = torch.randn(2, len(ids), 3, 8, 8, generator=generator)
    u_B = torch.rand(len(ids), generator=generator)
    ids_B, gate_B = torch.tensor(ids), torch.tensor(gate_ids)
    optimiser.zero_grad()
    flow_loss(lambda x, t: model(x, t, ids_B, gate_B), x_0, noise, u_B).mean().backward()
    slots = model.gate.slots_on(gate_B) if model.gate is not None else torch.empty(0)
    optimiser.step(factor=1.0, slots=slots, ids=torch.unique(ids_B))


def rows(model: DiT, optimiser: Optimiser, class_id: int) -> dict[str, torch.Tensor]:
    """All that belongs to a class: its tailors, its embedding row and the moments of both."""
    own = {n: p[class_id] for n, p in model.named_parameters() if ".tailor_" in n}
    own["embedding"] = model.class_embed.weight[class_id]
    own |= {f"tailors.{k}": v[class_id] for k, v in optimiser.tailors.tensors().items()}
    own |= {f"classes.{k}": v[class_id] for k, v in optimiser.classes.tensors().items()}
    return {name: tensor.detach().clone() for name, tensor in own.items()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_an_absent_class_does_not_move_in_spite_of_momentum(kind_model: DiT, weight_decay) -> None:
    optimiser = Optimiser(kind_model, TrainConfig(lr=0.05, weight_decay=weight_decay))
    for seed in range(3):  # every class gathers momentum
        take_step(kind_model, optimiser, [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], seed)
    absent = {i: rows(kind_model, optimiser, i) for i in (1, 4)}
    present = rows(kind_model, optimiser, 2)
    for seed in range(4):
        take_step(kind_model, optimiser, [0, 2, 3, 5, 2], [0, 2, 3, 5, 5], 10 + seed)
    for class_id, before in absent.items():
        assert all(before[name].any() for name in ("tailors.mean", "classes.mean"))
        assert_same_tensors(rows(kind_model, optimiser, class_id), before)
    for name, tensor in rows(kind_model, optimiser, 2).items():
        assert not torch.equal(tensor, present[name]), name


def test_a_dropped_gate_spares_the_tailor_and_trains_the_embedding(kind_model: DiT) -> None:
    optimiser = Optimiser(kind_model, TrainConfig(lr=0.05))
    take_step(kind_model, optimiser, [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], 0)
    before = rows(kind_model, optimiser, 1)
    take_step(kind_model, optimiser, [0, 1, 1], [0, 5, 5], 1)  # class 1 with its gate dropped
    for name, tensor in rows(kind_model, optimiser, 1).items():
        moved = name == "embedding" or name.startswith("classes.")
        assert torch.equal(tensor, before[name]) != moved, name


def test_row_adam_on_all_rows_is_torchs_adam(kernels) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3, 4), (5, 7)]
    ours = [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    rows_adam, adam = RowAdam(ours), torch.optim.Adam(theirs, lr=0.03, betas=BETAS, eps=EPS)
    for _ in range(25):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator) * 3
            b.grad = a.grad.clone()
        rows_adam.step(torch.arange(5), 0.03)
        adam.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_row_adam_counts_the_steps_of_each_row(kernels) -> None:
    """A row's first step is bias-corrected as a first step, however late it comes."""
    bank = nn.Parameter(torch.zeros(2, 3))
    adam = RowAdam([bank])
    for step in range(6):
        bank.grad = torch.full((2, 3), 2.0)
        adam.step(torch.tensor([0] if step < 5 else [0, 1]), 0.01)
    assert adam.steps_S.tolist() == [6, 1]
    torch.testing.assert_close(bank[1], torch.full((3,), -0.01), **FLOAT)


def test_decay_reaches_dense_matrices_only(dense: DiT) -> None:
    """With zero gradients all movement is decay."""
    for model in (dense, randomised(factorize(dense, KindConfig(learngene_rank=6, tailor_rank=2)), seed=1)):
        before = copy.deepcopy(model.state_dict())
        optimiser = Optimiser(model, TrainConfig(lr=0.1, weight_decay=0.5))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step(factor=1.0, slots=torch.arange(5), ids=torch.arange(6))
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        expected = {
            name
            for name, p in model.named_parameters()
            if p.ndim > 1
            and name.endswith(".weight")  # components are called u, sigma, v
            and name != "class_embed.weight"
        }
        assert moved == expected
        assert any(".q." in name for name in moved) == (model is dense)
        for name in moved:
            torch.testing.assert_close(dict(model.named_parameters())[name], before[name] * 0.95, **FLOAT)


@pytest.mark.parametrize("method", ["fine", "wave"])
def test_decay_spares_what_banks_hold_of_biases_and_singular_values(dense: DiT, method) -> None:
    optimiser = Optimiser(constrained(dense.config, dense.classes, method), TrainConfig(weight_decay=0.5))
    groups = {
        group["weight_decay"]: {id(p) for p in group["params"]} for group in optimiser.adamw.param_groups
    }
    for name, p in optimiser.shared.items():
        leaf = name.rpartition(".")[2]
        assert (id(p) in groups[0.0]) == (p.ndim == 1 or leaf.startswith(("bias", "sigma"))), name


def test_no_slot_is_on_where_no_tailor_trains(dense: DiT) -> None:
    """SVDiff, and components without tailors; several ranks put their slots together by number."""
    svdiff = start(dense, ClassSet(("x", "y")), RivalConfig(method="svdiff"), seed=0)
    none = factorize(dense, KindConfig(learngene_rank=6, tailor_rank=0))
    for model in (svdiff, none):
        optimiser = Optimiser(model, TrainConfig())
        assert optimiser.tailors.rows == 0
        assert not len(optimiser.slots_on(torch.tensor([0, 1])))


def test_tailors_have_their_own_rate(kind_model: DiT) -> None:
    """After one Adam step from rest every number has moved by its learning rate (up to eps)."""
    before = copy.deepcopy(kind_model)
    optimiser = Optimiser(kind_model, TrainConfig(lr=0.01, tailor_lr=0.03))
    for parameter in kind_model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step(factor=0.5, slots=torch.arange(5), ids=torch.arange(6))
    for (name, p), old in zip(kind_model.named_parameters(), before.parameters(), strict=True):
        rate = 0.015 if ".tailor_" in name or name.startswith("class_embed.") else 0.005
        torch.testing.assert_close(old - p, torch.full_like(p, rate), rtol=1e-3, atol=1e-6, msg=name)


def test_saved_moments_go_on_as_if_never_saved(kind_model: DiT) -> None:
    config = TrainConfig(lr=0.02, weight_decay=0.1)
    optimiser = Optimiser(kind_model, config)
    take_step(kind_model, optimiser, [0, 1, 2, 5], [0, 1, 5, 5], 0)
    other = copy.deepcopy(kind_model)
    resumed = Optimiser(other, config)
    resumed.load_({name: tensor.clone() for name, tensor in optimiser.tensors().items()})
    for seed in (1, 2):
        take_step(kind_model, optimiser, [0, 3, 5], [0, 3, 5], seed)
        take_step(other, resumed, [0, 3, 5], [0, 3, 5], seed)
    assert_same_tensors(other.state_dict(), kind_model.state_dict())
    assert_same_tensors(resumed.tensors(), optimiser.tensors())


def test_moments_from_before_the_first_step_can_be_loaded(kind_model: DiT) -> None:
    """A run that stops at step 0 (a loss that is not finite) saves an optimiser without moments."""
    config = TrainConfig(lr=0.02)
    resumed = Optimiser(copy.deepcopy(kind_model), config)
    resumed.load_(Optimiser(kind_model, config).tensors())
    assert_same_tensors(resumed.tensors(), Optimiser(kind_model, config).tensors())


@pytest.mark.parametrize(
    ("share", "init", "trains"),
    [
        ("class", "fresh", "components"),
        ("class", "nearest", "components"),
        ("class", "nearest", "mixture"),
        ("task", "fresh", "components"),
        ("both", "nearest", "components"),
    ],
)
def test_transfer_leaves_the_learngenes_to_the_bit(tmp_path: Path, share, init, trains) -> None:
    source = write_shapes(tmp_path / "shapes")
    parts = decompose(pretrain(toy(source, steps=4), tmp_path / "run").model)
    save_components(parts, tmp_path / "parts")
    novel = write_shapes(tmp_path / "novel", NEW_SHAPES)
    config = TransferConfig(
        data=DataConfig(source=str(novel), size=SIZE), rank=2, share=share, init=init, trains=trains, mixes=3,
        train=TrainConfig(steps=8, batch=6, lr=0.02, warmup=1, save_every=3, log_every=4, weight_decay=0.3),
    )  # fmt: skip
    taught = decompose(transfer(tmp_path / "parts", config, tmp_path / "transfer").model)
    assert_same_tensors(taught.learngenes, load_components(tmp_path / "parts", ()).learngenes)
    assert taught.classes == NEW_SHAPES
    ring, cross = (taught.tailors[name] for name in NEW_SHAPES)
    assert all(tensor.any() for tensor in ring.values())
    same = torch.equal(ring["blocks.0.q.sigma"], cross["blocks.0.q.sigma"])
    assert same == (share == "task")
    last = [
        torch.equal(ring[f"blocks.0.q.{leaf}"][-2:], cross[f"blocks.0.q.{leaf}"][-2:])
        for leaf in ("u", "sigma")
    ]
    assert all(last) == (share in ("task", "both"))
    assert len(ring["blocks.0.q.u"]) == (4 if share == "both" else 2)
    assert not torch.equal(ring["class_embed"], cross["class_embed"])
    both = parts.extended(taught).recombine([*SHAPES[:1], *NEW_SHAPES])  # they still fit together
    assert both.classes.names == ("disc", "ring", "cross")


def test_a_tailor_that_stays_on_without_a_label_does_so_at_transfer_too(tmp_path: Path) -> None:
    config = toy(write_shapes(tmp_path / "shapes"), steps=2)
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, null_gate="class"))
    parts = decompose(pretrain(config, tmp_path / "run").model)
    save_components(parts, tmp_path / "parts")
    kept = load_components(tmp_path / "parts", SHAPES[:2]).recombine()
    assert kept.config.null_gate == parts.config.null_gate == "class"
    objective = transfer_objective(kept.config)
    assert (objective.null_gate, objective.label_dropout, objective.gate_dropout) == ("class", 0.1, 0.0)
    usual = transfer_objective(dataclasses.replace(kept.config, null_gate="off"))
    assert (usual.null_gate, usual.label_dropout) == ("off", 0.0)
    with pytest.raises(UsageError, match="null_gate needs tailors"):
        dataclasses.replace(config, method="dense")


def test_dropout_of_labels_and_gates(tmp_path: Path) -> None:
    samples = open_prepared(write_shapes(tmp_path / "shapes", size=8))
    objective = ObjectiveConfig(label_dropout=0.2, gate_dropout=0.3)
    drawn = make_batch(samples, objective, seed=1, first_position=0, batch=6000, flip=False)
    null = samples.classes.null_id
    label_off, gate_off = drawn.ids_B == null, drawn.gate_ids_B == null
    assert gate_off[label_off].all(), "a sample without a label has no tailor"
    # 6000 draws: standard errors 0.005 and 0.006
    assert float(label_off.float().mean()) == pytest.approx(0.2, abs=0.02)
    assert float(gate_off[~label_off].float().mean()) == pytest.approx(0.3, abs=0.025)
    kept = ~gate_off
    assert torch.equal(drawn.ids_B[kept], drawn.gate_ids_B[kept])
    stays = ObjectiveConfig(label_dropout=0.2, gate_dropout=0.3, null_gate="class")
    kept_on = make_batch(samples, stays, seed=1, first_position=0, batch=6000, flip=False)
    assert torch.equal(kept_on.ids_B, drawn.ids_B)
    assert float((kept_on.gate_ids_B == null).float().mean()) == pytest.approx(0.3, abs=0.025)
    none = ObjectiveConfig(label_dropout=0.0, gate_dropout=0.0)
    plain = make_batch(samples, none, seed=1, first_position=0, batch=6000, flip=False)
    assert int(plain.ids_B.max()) < null
    assert torch.equal(plain.ids_B, plain.gate_ids_B)
    assert torch.equal(plain.noise_BCHW, drawn.noise_BCHW), "dropout must not shift the other draws"


def test_ema_follows_its_formula_and_starts_fast(kind_model: DiT) -> None:
    kind_model.final.out.weight.requires_grad_(False)
    state = State.fresh(kind_model, TrainConfig(ema=0.9), torch.device("cpu"), ALONE)
    ema = state.ema
    name = "blocks.0.q.u"
    live = dict(kind_model.named_parameters())[name]
    expected = live.detach().double().clone()
    generator = torch.Generator().manual_seed(0)
    for step in range(120):
        with torch.no_grad():
            live += 0.1 * torch.randn(live.shape, generator=generator)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * live.detach().double()
    torch.testing.assert_close(ema.average[name].double(), expected, rtol=1e-4, atol=1e-5)
    assert "final.out.weight" not in ema.average
    averaged = state.whole_model(averaged=True)
    assert torch.equal(dict(averaged.named_parameters())[name], ema.average[name])
    assert not torch.equal(live, ema.average[name]), "the live model keeps its own weights"
    assert torch.equal(averaged.final.out.weight, kind_model.final.out.weight)


def test_learning_rate_warms_up_stays_and_falls() -> None:
    config = TrainConfig(steps=100, warmup=10, decay=0.25)
    factors = np.array([factor_of(step, config) for step in range(100)])
    np.testing.assert_allclose(factors[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(factors[10:75], 1.0)
    np.testing.assert_allclose(factors[75:], np.arange(25, 0, -1) / 25)
    constant = dataclasses.replace(config, decay=0.0, warmup=0)
    assert {factor_of(step, constant) for step in range(100)} == {1.0}
