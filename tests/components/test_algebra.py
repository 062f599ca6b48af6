"""The algebra of components on tiny real models, in float64, never from an identity start."""

from __future__ import annotations

import copy

import pytest
import torch

from conftest import NAMES, randomised
from kindiff.components import (
    ComponentLinear,
    SoftGate,
    canonical,
    decompose,
    factorize,
    load_components,
    save_components,
    svd,
)
from kindiff.components.algebra import Factors
from kindiff.components.gates import TableGate
from kindiff.config import KindConfig
from kindiff.errors import UsageError
from kindiff.models import DiT

EXACT = {"rtol": 0.0, "atol": 1e-10}


def random_factors(rank: int, features_out: int, features_in: int) -> Factors:
    generator = torch.Generator().manual_seed(rank)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return Factors(make(rank, features_out), make(rank), make(rank, features_in))


def run(model: DiT, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    x, t, ids = inputs
    dtype = model.class_embed.weight.dtype
    with torch.no_grad():
        return model(x.to(dtype), t, ids)


@pytest.mark.parametrize("rank", [5, 12, 40])
def test_canonical_form_changes_nothing_and_truncates_by_singular_values(rank: int) -> None:
    factors = random_factors(rank, 20, 12)
    same = canonical(factors)
    assert len(same.sigma) == min(rank, 12)
    torch.testing.assert_close(same.dense(), factors.dense(), **EXACT)
    assert (same.sigma.diff() <= 0).all()
    true = torch.linalg.svdvals(factors.dense())
    for kept in range(1, len(same.sigma)):
        error = torch.linalg.norm(factors.dense() - same.first(kept).dense())
        torch.testing.assert_close(error, true[kept:].norm(), **EXACT)


def test_svd_is_the_matrix() -> None:
    weight = random_factors(30, 20, 12).dense()
    torch.testing.assert_close(svd(weight).dense(), weight, **EXACT)


@pytest.mark.parametrize("targets", [("q", "k", "v", "o", "mlp_in", "mlp_out"), ("v", "mlp_out")])
def test_gated_equals_merged_dense_per_sample(dense: DiT, inputs, targets) -> None:
    kind = KindConfig(learngene_rank=10, tailor_rank=3, targets=targets)
    model = randomised(factorize(dense, kind), seed=1).double()
    gated = run(model, inputs)
    for i, class_id in enumerate(inputs[2].tolist()):
        merged = DiT(model.config, classes=model.classes).double()
        state = {k: v for k, v in model.state_dict().items() if k in merged.state_dict()}
        merged.load_state_dict(state, strict=False)
        gating = model.gate(torch.tensor([class_id]), model.class_embed.weight[[class_id]])
        for (_, source), (_, target) in zip(model.named_matrices(), merged.named_matrices(), strict=True):
            target.weight.data = source.merged_weight(gating)
        alone = run(merged, tuple(x[i : i + 1] for x in inputs))
        torch.testing.assert_close(gated[i : i + 1], alone, **EXACT)


def test_multi_hot_and_soft_gates_equal_their_merged_weights(dense: DiT, inputs) -> None:
    model = randomised(factorize(dense, KindConfig(learngene_rank=10, tailor_rank=3)), seed=1)
    model.gate = TableGate(len(NAMES), 2).fill_([[i, (i + 2) % 5] for i in range(5)])
    soft = randomised(factorize(dense, KindConfig(learngene_rank=10, tailor_rank=3, gate="soft")), seed=1)
    assert isinstance(soft.gate, SoftGate)
    for gated in (model.double(), soft.double()):
        parts = decompose(gated)  # each class's tailor is the sum of its slots
        assert parts.tailor_rank == 3 * (2 if gated is model else 5)
        torch.testing.assert_close(run(parts.recombine(), inputs), run(gated, inputs), **EXACT)


def test_factorize_at_full_rank_is_the_dense_model(dense: DiT, inputs) -> None:
    before = copy.deepcopy(dense.state_dict())
    full = factorize(dense, KindConfig(learngene_rank=32, tailor_rank=2))
    torch.testing.assert_close(run(full.double(), inputs), run(dense.double(), inputs), rtol=0, atol=2e-5)
    for name, tensor in before.items():
        assert torch.equal(tensor.double(), dense.state_dict()[name].double()), name


@pytest.mark.parametrize("init", ["svd", "svd-rescaled", "per-factor"])
def test_every_initialisation_fills_every_component(dense: DiT, init) -> None:
    model = factorize(dense, KindConfig(learngene_rank=10, tailor_rank=3, init=init))
    for name, layer in model.named_matrices():
        assert isinstance(layer, ComponentLinear)
        for key, tensor in layer.state_dict().items():
            assert torch.isfinite(tensor).all(), (name, key)
        active = layer.merged_weight(model.gate(torch.tensor([0]), None)).square().sum()
        dense_energy = dict(dense.named_matrices())[name].weight.square().sum()
        if init == "svd-rescaled":
            assert 0.8 < active / dense_energy < 1.25


def test_decompose_then_recombine_is_the_model_to_the_bit(kind_model: DiT, inputs) -> None:
    again = decompose(kind_model).recombine()
    assert again.structure == kind_model.structure
    for name, tensor in kind_model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert torch.equal(run(again, inputs), run(kind_model, inputs))
    twice = decompose(again).recombine()
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), twice.state_dict().values(), strict=True)
    )


@torch.no_grad()
@pytest.mark.parametrize("layers", ["auto", "factored", "dense", "merged"])
def test_a_single_class_model_equals_the_full_one_for_its_class(kind_model: DiT, inputs, layers) -> None:
    x, t, _ = inputs
    small = decompose(kind_model).recombine(["cat"], layers=layers)
    assert small.classes.names == ("cat",)
    full = kind_model(x, t, torch.full((7,), kind_model.classes.id("cat")))
    own = small(x, t, torch.zeros(7, dtype=torch.int64))
    torch.testing.assert_close(own, full, rtol=0, atol=2e-5)
    if layers in ("auto", "factored"):
        assert torch.equal(own, full)
    if layers != "merged":  # a merged model has no learngenes of its own left
        null = small(x, t, torch.full((7,), small.classes.null_id))
        expected = kind_model(x, t, torch.full((7,), kind_model.classes.null_id))
        torch.testing.assert_close(null, expected, rtol=0, atol=2e-5)


def test_classes_mixed_in_a_batch_give_what_they_give_alone(kind_model: DiT, inputs) -> None:
    model = kind_model.double()
    mixed = run(model, inputs)
    for i in range(len(mixed)):
        torch.testing.assert_close(run(model, tuple(x[i : i + 1] for x in inputs)), mixed[i : i + 1], **EXACT)


def test_a_lower_learngene_rank_is_the_truncated_matrix(kind_model: DiT) -> None:
    small = decompose(kind_model).recombine(["bee"], learngene_rank=4)
    null = small.gate(torch.tensor([1]), None)
    for (name, a), (_, b) in zip(kind_model.named_matrices(), small.named_matrices(), strict=True):
        left_out = torch.linalg.svdvals(a.merged_weight())[4:].norm()
        error = torch.linalg.norm(a.merged_weight() - b.merged_weight(null))
        torch.testing.assert_close(error, left_out, rtol=1e-4, atol=1e-5, msg=name)


def test_a_batch_without_a_class_leaves_its_tailor_gradient_at_zero(kind_model: DiT, inputs) -> None:
    x, t, _ = inputs
    present = torch.tensor([0, 1, 1, 3, 5, 5, 0])  # without classes 2 and 4
    kind_model(x, t, present).square().sum().backward()
    for name, layer in kind_model.named_matrices():
        for leaf in ("tailor_u", "tailor_sigma", "tailor_v"):
            grad = getattr(layer, leaf).grad
            assert (grad[[2, 4]] == 0).all(), name
            assert all(grad[i].abs().sum() > 0 for i in (0, 1, 3)), name
    assert kind_model.gate.slots_on(present).tolist() == [0, 1, 3]


def test_null_and_dropped_gates_are_the_learngenes_alone(kind_model: DiT, inputs) -> None:
    x, t, ids = inputs
    null = torch.full_like(ids, kind_model.classes.null_id)
    dropped = kind_model(x, t, ids, null)
    learngenes = copy.deepcopy(kind_model)
    for _, layer in learngenes.named_matrices():
        torch.nn.init.zeros_(layer.tailor_u)
    assert torch.equal(dropped, learngenes(x, t, ids))
    assert not torch.equal(dropped, kind_model(x, t, ids))


def test_new_tailors_start_from_the_learngenes_and_train_alone(kind_model: DiT, inputs) -> None:
    x, t, _ = inputs
    parts = decompose(kind_model)
    fresh = parts.with_new_tailors(["owl", "fox"], rank=4)
    ids = torch.tensor([0, 1, 0, 1, 0, 1, 0])
    torch.testing.assert_close(fresh(x, t, ids), fresh(x, t, ids, torch.full_like(ids, 2)))
    trained = {n for n, p in fresh.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in fresh.named_parameters() if ".tailor_" in n or n == "class_embed.weight"}
    rows = fresh.class_embed.weight
    assert torch.equal(rows[:2], kind_model.class_embed.weight[-1:].expand(2, -1))
    randomised_tailors = decompose(fresh)
    assert randomised_tailors.learngene_hash == parts.learngene_hash
    both = parts.extended(randomised_tailors)
    assert both.classes == (*NAMES, "owl", "fox")
    assert both.recombine(["owl", "ant"]).structure["tailor_rank"] == 4


def test_a_tailor_in_some_matrices_stays_whole_among_tailors_in_all(
    kind_model: DiT, inputs, tmp_path
) -> None:
    parts = decompose(kind_model)
    new = parts.with_new_tailors(["owl"], rank=2, targets=("o",))
    for _, layer in new.named_matrices():
        if layer.has_tailors:
            torch.nn.init.normal_(layer.tailor_u)
    both = parts.extended(decompose(new))
    ids = torch.zeros(7, dtype=torch.int64)
    x, t, _ = inputs
    torch.testing.assert_close(both.recombine(["owl"])(x, t, ids), new(x, t, ids), rtol=0, atol=1e-5)
    save_components(both, tmp_path / "both")
    for read in (load_components(tmp_path / "both"), load_components(tmp_path / "both", ["owl"])):
        assert torch.equal(read.recombine(["owl"])(x, t, ids), both.recombine(["owl"])(x, t, ids))


def test_nearest_start_copies_the_parent(kind_model: DiT, inputs) -> None:
    x, t, _ = inputs
    near = decompose(kind_model).with_new_tailors(["owl"], rank=5, nearest={"owl": "dog"})
    own = near(x, t, torch.zeros(7, dtype=torch.int64))
    dog = kind_model(x, t, torch.full((7,), kind_model.classes.id("dog")))
    torch.testing.assert_close(own, dog, rtol=0, atol=1e-5)


def test_one_tailor_for_the_task_is_one_slot(kind_model: DiT) -> None:
    shared = decompose(kind_model).with_new_tailors(
        ["owl", "fox"], rank=4, share="task", train_also=("bias",)
    )
    assert shared.structure["slots"] == 1
    assert shared.gate.slots_on(torch.tensor([0, 1])).tolist() == [0]
    trained = {n for n, p in shared.named_parameters() if p.requires_grad}
    assert "blocks.0.q.bias" in trained
    assert "final.out.weight" not in trained


def test_a_tailor_a_class_and_one_for_the_task_are_both_on(kind_model: DiT, inputs) -> None:
    parts = decompose(kind_model)
    model = parts.with_new_tailors(["owl", "fox"], rank=3, share="both", nearest={"owl": "dog"})
    assert (model.structure["slots"], model.structure["gate_width"]) == (3, 2)
    assert model.gate.slots_CK.tolist()[:2] == [[0, 2], [1, 2]]
    assert model.gate.slots_on(torch.tensor([1])).tolist() == [1, 2]
    x, t, _ = inputs
    owl = torch.zeros(7, dtype=torch.int64)
    alone = parts.with_new_tailors(["owl"], rank=3, nearest={"owl": "dog"})
    torch.testing.assert_close(
        model(x, t, owl), alone(x, t, owl), rtol=0, atol=1e-5
    )  # the task's starts at zero
    for _, layer in model.named_matrices():
        torch.nn.init.normal_(layer.tailor_u, std=0.1)
    taught = decompose(model)
    assert taught.tailor_rank == 6, "a class's part is the sum of its two tailors"
    torch.testing.assert_close(taught.recombine(["owl"])(x, t, owl), model(x, t, owl), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda p: p.recombine(["yak"]), "'yak' is unknown"),
        (lambda p: p.recombine(["ant", "ant"]), "asked for twice"),
        (lambda p: p.recombine(learngene_rank=11), "hold 10 components"),
        (lambda p: p.recombine(layers="merged"), "merged layers hold one class"),
        (lambda p: p.recombine([]), "at least one class"),
        (lambda p: p.with_new_tailors(["owl"], rank=33), "allow 1 to 32"),
        (lambda p: p.with_new_tailors(["owl", "owl"], rank=2), "asked for twice"),
        (lambda p: p.with_new_tailors(["owl"], rank=2, nearest={"owl": "cow"}), "'cow' is unknown"),
        (lambda p: p.extended(p), "asked for twice"),
    ],
)
def test_requests_that_cannot_be_met(kind_model: DiT, call, sentence) -> None:
    with pytest.raises(UsageError, match=sentence):
        call(decompose(kind_model))


def test_wrong_models_are_refused(dense: DiT, kind_model: DiT) -> None:
    with pytest.raises(UsageError, match="dense matrices"):
        decompose(dense)
    with pytest.raises(UsageError, match="already made of components"):
        factorize(kind_model, KindConfig(learngene_rank=3, tailor_rank=1))
    with pytest.raises(UsageError, match="larger than the full rank 32"):
        factorize(dense, KindConfig(learngene_rank=33, tailor_rank=1))


def test_parts_without_tailors_are_saved_read_and_given_new_ones(kind_model: DiT, inputs, tmp_path) -> None:
    """No gate: the whole active rank is learngenes, and a class is its embedding alone."""
    x, t, ids = inputs
    plain = decompose(kind_model).recombine()
    none = factorize(
        DiT(plain.config, classes=plain.classes),
        KindConfig(learngene_rank=6, tailor_rank=0, init="per-factor"),
    )
    parts = decompose(none)
    assert parts.targets == ()
    save_components(parts, tmp_path / "parts")
    read = load_components(tmp_path / "parts")
    assert torch.equal(read.recombine()(x, t, ids), none(x, t, ids))
    fresh = read.with_new_tailors(["owl"], rank=2)
    assert fresh.structure["tailor_rank"] == 2
    one = torch.zeros_like(ids)
    torch.testing.assert_close(fresh(x, t, one), fresh(x, t, one, one + 1))
