"""Two slots a class: its own tailor and its superclass's."""

from __future__ import annotations

import pytest
import torch

from kindiff.components import decompose, factorize
from kindiff.config import KindConfig, PretrainConfig
from kindiff.errors import UsageError
from kindiff.models import DiT
from random_models import noisy

NAMES = ("ant", "bee", "cat", "dog", "eel")
SUPERCLASSES = {"ant": "insect", "bee": "insect", "cat": "mammal", "dog": "mammal", "eel": "fish"}
KIND = KindConfig(learngene_rank=10, tailor_rank=3, gate="superclass")


@pytest.fixture
def model(dense: DiT) -> DiT:
    return noisy(factorize(dense, KIND, superclasses=SUPERCLASSES), seed=1).double()


def test_slots_are_the_classes_then_the_superclasses(model: DiT) -> None:
    assert model.structure["slots"] == len(NAMES) + 3
    assert model.structure["gate_width"] == 2
    assert model.gate.slots_CK[:-1].tolist() == [[0, 5], [1, 5], [2, 6], [3, 6], [4, 7]]
    assert model.gate.weights_CK[-1].tolist() == [0, 0]


def test_gated_equals_the_sum_of_both_tailors(model: DiT) -> None:
    layer = model.blocks[0].q
    for i, name in enumerate(NAMES):
        gating = model.gate(torch.tensor([i]), None)
        sums = sum(
            (layer.tailor_u[slot].T * layer.tailor_sigma[slot]) @ layer.tailor_v[slot]
            for slot in (i, 5 + ("insect", "mammal", "fish").index(SUPERCLASSES[name]))
        )
        expected = (layer.u.T * layer.sigma) @ layer.v + sums
        torch.testing.assert_close(layer.merged_weight(gating), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layers", ["factored", "dense"])
def test_decompose_gives_each_class_the_sum_of_its_slots(model: DiT, inputs, layers) -> None:
    x, t, ids = inputs
    parts = decompose(model)
    assert parts.tailor_rank == 6
    again = parts.recombine(layers=layers)
    with torch.no_grad():
        expected = model(x.double(), t, ids)
        torch.testing.assert_close(again.double()(x.double(), t, ids), expected, rtol=0, atol=1e-5)
        merged = parts.recombine(["dog"], layers="merged").double()
        own = merged(x.double(), t, torch.zeros_like(ids))
    full = model(x.double(), t, torch.full_like(ids, NAMES.index("dog")))
    torch.testing.assert_close(own, full, rtol=0, atol=1e-5)  # the new model is float32


def test_a_class_trains_its_own_tailor_and_its_superclasss(model: DiT, inputs) -> None:
    x, t, ids = inputs
    model(x.double(), t, torch.full_like(ids, NAMES.index("cat"))).square().sum().backward()
    grad = model.blocks[1].mlp_out.tailor_u.grad
    moved = [slot for slot in range(8) if grad[slot].abs().sum() > 0]
    assert moved == [NAMES.index("cat"), 6] == model.gate.slots_on(torch.tensor([2, 5])).tolist()


def test_full_rank_is_the_dense_model_and_every_init_fills(dense: DiT, inputs) -> None:
    full = factorize(
        dense, KindConfig(learngene_rank=32, tailor_rank=2, gate="superclass"), superclasses=SUPERCLASSES
    )
    with torch.no_grad():
        torch.testing.assert_close(full(*inputs), dense(*inputs), rtol=0, atol=2e-5)
    for init in ("svd-rescaled", "per-factor"):
        kind = KindConfig(learngene_rank=10, tailor_rank=3, gate="superclass", init=init)
        model = factorize(dense, kind, superclasses=SUPERCLASSES)
        energy = model.blocks[0].q.merged_weight(model.gate(torch.tensor([0]), None)).square().sum()
        assert 0.7 < energy / dense.blocks[0].q.weight.square().sum() < 1.4


def test_saved_and_loaded_to_the_bit(model: DiT, tmp_path) -> None:
    model.float().save_pretrained(tmp_path / "model")
    again = DiT.from_pretrained(tmp_path / "model")
    assert all(torch.equal(a, again.state_dict()[n]) for n, a in model.state_dict().items())


def test_requests_that_cannot_be_met(dense: DiT) -> None:
    with pytest.raises(UsageError, match="gate 'superclass' needs superclasses"):
        factorize(dense, KIND)
    with pytest.raises(UsageError, match="gate 'class' takes no superclasses"):
        factorize(dense, KindConfig(learngene_rank=10, tailor_rank=3), superclasses=SUPERCLASSES)
    with pytest.raises(UsageError, match="no superclass is given for eel"):
        factorize(dense, KIND, superclasses={k: v for k, v in SUPERCLASSES.items() if k != "eel"})
    with pytest.raises(UsageError, match="superclasses go with method kind"):
        PretrainConfig(superclasses="avatars")
