"""New classes as weighted sums of the tailors and embeddings of known ones."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from conftest import NAMES
from kindiff.components import Components, decompose, mixture, set_strategy_
from kindiff.components.strategy import choose
from kindiff.components.views import energies
from kindiff.config import TrainConfig, TransferConfig
from kindiff.errors import UsageError
from kindiff.evaluate.cost import cost_table, counted_macs, total
from kindiff.models import DiT
from kindiff.native import MATRIX_UNITS
from kindiff.train.optimiser import Optimiser
from kindiff.train.transferring import model_to_train
from toys import assert_same_tensors

NEW = ("owl", "fox", "gnu")
NEAREST = {"owl": ("dog", "bee"), "fox": ("ant", "dog"), "gnu": ("dog", "eel")}


@pytest.fixture
def parts(kind_model: DiT) -> Components:
    return decompose(kind_model)


@pytest.fixture
def model(parts: Components) -> DiT:
    """Far from its start: every weight moved."""
    model = mixture(parts, NEAREST)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def outputs(model: DiT, inputs: tuple[torch.Tensor, ...], ids: list[int], gates: list[int] | None = None):
    x, t, _ = inputs
    x = x[: len(ids)].to(model.class_embed.weight.dtype)
    return model(x, t[: len(ids)], torch.tensor(ids), None if gates is None else torch.tensor(gates))


def test_it_starts_as_the_nearest_class_and_only_weights_train(kind_model: DiT, parts, inputs) -> None:
    started = mixture(parts, NEAREST)
    dog, ant = NAMES.index("dog"), NAMES.index("ant")
    expected = outputs(kind_model, inputs, [dog, ant, dog, len(NAMES)])
    torch.testing.assert_close(outputs(started, inputs, [0, 1, 2, 3]), expected, rtol=0, atol=1e-5)
    trained = {name: p for name, p in started.named_parameters() if p.requires_grad}
    assert trained.keys() == {f"{name}.tailor_mix" for name, _ in started.named_matrices()} | {
        "class_embed.tailor_mix"
    }
    count = sum(p.numel() for p in trained.values())
    assert count == 2 * 3 * (12 + 1), "known classes x classes x (matrices and the embedding)"


def test_a_class_is_the_weighted_sum_of_known_ones(model: DiT, parts: Components) -> None:
    """Of every matrix and of the embedding, by the definition, from the parts' dense tailors."""
    rows = decompose(model).tailors
    for i, (name, sources) in enumerate(NEAREST.items()):
        gating = model.gate(torch.tensor([i]), None)
        for matrix, layer in model.named_matrices():
            expected = sum(
                weight * (t[f"{matrix}.u"].T * t[f"{matrix}.sigma"]) @ t[f"{matrix}.v"]
                for weight, t in zip(layer.tailor_mix[i], (parts.tailors[s] for s in sources), strict=True)
            )
            own = layer.merged_weight(gating) - layer.merged_weight()
            torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)
        row = sum(
            weight * parts.tailors[source]["class_embed"]
            for weight, source in zip(model.class_embed.tailor_mix[i], sources, strict=True)
        )
        torch.testing.assert_close(rows[name]["class_embed"], row, rtol=0, atol=1e-6)
    assert torch.equal(model.class_embed.weight[-1], parts.learngenes["null_embed"]), "moved weights or not"


def test_every_sample_sees_its_merged_matrices(model: DiT, inputs) -> None:
    """float64; new classes, the null class and a dropped gate."""
    model = model.double()
    ids, gates = [0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 0, 3, 2]
    found = outputs(model, inputs, ids, gates)
    x, t, _ = inputs
    for i, (class_id, gate_id) in enumerate(zip(ids, gates, strict=True)):
        merged = DiT(model.config, classes=model.classes).double()
        merged.load_state_dict(
            {k: v for k, v in model.state_dict().items() if k in merged.state_dict()}, strict=False
        )
        merged.class_embed.weight.data = model.class_embed.weight.detach()
        gating = model.gate(torch.tensor([gate_id]), model.class_embed.weight[[class_id]])
        for (_, source), (_, target) in zip(model.named_matrices(), merged.named_matrices(), strict=True):
            target.weight.data = source.merged_weight(gating)
        alone = merged(x[i : i + 1].double(), t[i : i + 1], torch.tensor([class_id]))
        torch.testing.assert_close(found[i : i + 1], alone, rtol=0, atol=1e-10)


def test_strategies_agree(model: DiT, inputs) -> None:
    """The bank whole or each sample's own, outputs and every gradient, in float64; and the rule knows both."""
    x, t, _ = inputs
    found = []
    for strategy in ("gathered", "joined"):
        own = set_strategy_(copy.deepcopy(model).double(), strategy)
        y = own(x.double(), t, torch.tensor([0, 1, 2, 3, 0, 2, 1]))
        y.square().mean().backward()
        found.append((y, {name: p.grad for name, p in own.named_parameters() if p.requires_grad}))
    (y, gradients), (other, others) = found
    torch.testing.assert_close(y, other, rtol=0, atol=1e-12)
    for name, gradient in gradients.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, others[name], rtol=1e-9, atol=1e-14, msg=name)
    limit = 4 if MATRIX_UNITS else 2
    for slots, name in ((limit, "joined"), (limit + 1, "gathered")):
        rule = {
            "slots": slots,
            "components": 3,
            "on": 2,
            "device": "cpu",
            "dtype": torch.float32,
            "training": False,
        }
        assert choose("auto", mixed=True, **rule).name == name


def test_it_comes_apart_into_tailors_like_any_others(
    kind_model: DiT, model: DiT, parts: Components, inputs
) -> None:
    new = decompose(model)
    assert new.learngene_hash == parts.learngene_hash
    mixed = parts.extended(new).recombine(["fox", "bee", "owl"])
    assert mixed.structure["gate"] == "table"
    own, old = outputs(model, inputs, [1, 3, 0]), outputs(kind_model, inputs, [1, NAMES.index("bee"), 0])
    torch.testing.assert_close(
        outputs(mixed, inputs, [0, 1, 2]), torch.stack([own[0], old[1], own[2]]), rtol=0, atol=1e-5
    )


def test_cut_tailors_are_the_best_of_their_rank(model: DiT) -> None:
    whole = decompose(model)
    cut = decompose(whole.recombine(NEW[:2], tailor_rank=3, layers="factored"))
    assert (whole.tailor_rank, cut.tailor_rank, cut.classes) == (6, 3, NEW[:2])
    for name in cut.classes:
        assert torch.equal(cut.tailors[name]["class_embed"], whole.tailors[name]["class_embed"])
        for matrix, _ in model.named_matrices():
            dense, own = (
                (t[f"{matrix}.u"].T * t[f"{matrix}.sigma"]) @ t[f"{matrix}.v"]
                for t in (whole.tailors[name], cut.tailors[name])
            )
            left_out = torch.linalg.svdvals(dense)[3:].norm()
            assert left_out > 0.01
            torch.testing.assert_close(torch.linalg.norm(dense - own), left_out, rtol=1e-3, atol=1e-5)
    assert_same_tensors(cut.learngenes, whole.learngenes)
    assert whole.recombine(tailor_rank=99, layers="factored").structure["tailor_rank"] == 6
    with pytest.raises(UsageError, match="tailor rank 0 is not possible"):
        whole.recombine(tailor_rank=0)


def test_tailors_of_some_matrices_or_of_other_ranks_are_mixed(parts: Components, inputs) -> None:
    """Where a known class has fewer components, or none, the others' stand alone."""
    small = parts.with_new_tailors(["elk"], rank=2, targets=("o", "mlp_in"), nearest={"elk": "bee"})
    both = parts.extended(decompose(small))
    model = mixture(both, {"owl": ("elk", "dog")})
    elk = both.recombine(["elk"])
    torch.testing.assert_close(
        outputs(model, inputs, [0, 0]), outputs(elk, inputs, [0, 0]), rtol=0, atol=1e-5
    )
    some = mixture(both, {"owl": ("elk", "dog")}, targets=("v",))
    assert [layer.has_tailors for _, layer in some.named_matrices()][:6] == [m == "v" for m in "qkvo__"]


def test_what_cannot_be_mixed_is_refused(parts: Components) -> None:
    with pytest.raises(UsageError, match="the same number of known classes"):
        mixture(parts, {"owl": ("dog", "bee"), "fox": ("ant",)})
    with pytest.raises(UsageError, match="did you mean"):
        mixture(parts, {"owl": ("dgo",)})
    for settings in (
        {},
        {"init": "nearest", "share": "both"},
        {"init": "nearest", "mixes": 0},
    ):
        with pytest.raises(UsageError, match="needs init nearest, share class and mixes"):
            TransferConfig(trains="mixture", **settings)
    config = TransferConfig(init="nearest", trains="mixture", mixes=6)
    with pytest.raises(UsageError, match="a mixture of 6 tailors is asked for and the parts hold 5"):
        model_to_train(parts, None, config)
    with pytest.raises(UsageError, match="these parts hold learngenes only"):
        model_to_train(dataclasses.replace(parts, tailors={}), None, config)


def test_files_hold_a_model_in_training(model: DiT, tmp_path: Path, inputs) -> None:
    model.save_pretrained(tmp_path / "model")
    again = DiT.from_pretrained(tmp_path / "model")
    assert_same_tensors(again.state_dict(), model.state_dict())
    assert torch.equal(outputs(again, inputs, [0, 1, 2, 3]), outputs(model, inputs, [0, 1, 2, 3]))


def test_views_and_costs_count_the_mixture(model: DiT) -> None:
    assert total(cost_table(model)).macs == counted_macs(model)
    assert total(cost_table(model)).trainable == 2 * 3 * 13
    cut = decompose(model).recombine(layers="factored")
    for name, energy in energies(model).items():
        assert energy.tailors == pytest.approx(energies(cut)[name].tailors, rel=1e-4)


def test_steps_move_the_weights_of_the_classes_they_see(model: DiT, inputs) -> None:
    """Apart from their banks as in them, in float64; frozen components, and classes not seen, to the bit."""
    x, t, _ = inputs
    apart, whole = (copy.deepcopy(model).double().train() for _ in range(2))
    optimisers = Optimiser(apart, TrainConfig(lr=1e-2)), Optimiser(whole, TrainConfig(lr=1e-2), alone=False)
    for ids in ([2, 0, 2, 3, 0, 2, 0], [0] * 7, [2] * 7):  # fox is never there
        ids_B = torch.tensor(ids)
        for own, optimiser in zip((apart, whole), optimisers, strict=True):
            slots = own.gate.slots_on(ids_B)
            with optimiser.of_slots(slots):
                own(x.double(), t, ids_B).square().mean().backward()
            optimiser.step(factor=1.0, slots=slots, ids=torch.unique(ids_B))
    before = model.double().state_dict()
    for (name, a), (_, b) in zip(apart.state_dict().items(), whole.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)
        if name.endswith("mix"):
            moved = (a != before[name]).any(dim=1).tolist()
            assert moved == [True, False, True], name
        else:
            assert torch.equal(a, before[name]), name


@pytest.mark.slow
def test_one_graph_for_all_class_mixes(model: DiT, inputs) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, t, _ = inputs
    generator = torch.Generator().manual_seed(5)
    for i in range(30):
        ids = torch.randint(0, 4, (7,), generator=generator)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            compiled(x, t, ids).square().mean().backward()
    torch._dynamo.reset()
