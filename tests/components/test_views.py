"""Views of the components against the dense matrices that they stand for."""

from __future__ import annotations

import pytest
import torch

from kindiff.components import decompose, factorize
from kindiff.components.algebra import Factors
from kindiff.components.views import (
    energies,
    exchange_tailors,
    inner,
    relatedness,
    tailor_cosines,
)
from kindiff.config import KindConfig
from kindiff.errors import UsageError
from kindiff.models import DiT
from random_models import noisy


def dense_tailors(model: DiT) -> dict[str, torch.Tensor]:
    """(C, O, I) by matrix, in float64."""
    found = {}
    for name, layer in model.named_matrices():
        gatings = [model.gate(torch.tensor([i]), model.class_embed.weight[i : i + 1]) for i in range(5)]
        bare = layer.merged_weight()
        found[name] = torch.stack([layer.merged_weight(gating) - bare for gating in gatings])
    return found


def of_gate(dense: DiT, gate: str) -> DiT:
    groups = {"ant": "a", "bee": "a", "cat": "b", "dog": "b", "eel": "c"} if gate == "superclass" else None
    kind = KindConfig(learngene_rank=10, tailor_rank=3, gate=gate)
    return noisy(factorize(dense, kind, superclasses=groups), seed=3).double()


def test_the_inner_product_is_that_of_the_matrices() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (
        Factors(*(torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((r, 7), (r,), (r, 5))))
        for r in (3, 6)
    )
    torch.testing.assert_close(inner(a, b), (a.dense() * b.dense()).sum())
    torch.testing.assert_close(inner(a, a), a.dense().square().sum())


@pytest.mark.parametrize("gate", ["class", "superclass", "soft"])
def test_energies_are_norms_of_the_dense_parts(dense: DiT, gate: str) -> None:
    model = of_gate(dense, gate)
    tailors = dense_tailors(model)
    found = energies(model)
    assert list(found) == [name for name, _ in model.named_matrices()]
    for name, layer in model.named_matrices():
        common = float(layer.merged_weight().square().sum())
        own = float(tailors[name].square().sum(dim=(1, 2)).mean())
        assert found[name].learngenes == pytest.approx(common, rel=1e-10)
        assert found[name].tailors == pytest.approx(own, rel=1e-10)
        assert found[name].tailor_share == pytest.approx(own / (own + common), rel=1e-10)


def test_energy_does_not_depend_on_how_learngenes_are_held(kind_model: DiT) -> None:
    parts = decompose(kind_model)
    factored, dense = energies(parts.recombine(layers="factored")), energies(parts.recombine(layers="dense"))
    for name, energy in factored.items():
        assert dense[name].tailor_share == pytest.approx(energy.tailor_share, rel=1e-5)


@pytest.mark.parametrize("gate", ["class", "superclass", "soft"])
def test_cosines_are_those_of_the_dense_tailors(dense: DiT, gate: str) -> None:
    model = of_gate(dense, gate)
    vectors = torch.cat([t.flatten(1) for t in dense_tailors(model).values()], dim=1)
    expected = torch.nn.functional.cosine_similarity(vectors.unsqueeze(0), vectors.unsqueeze(1), dim=2)
    torch.testing.assert_close(tailor_cosines(model), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(tailor_cosines(model).diagonal(), torch.ones(5, dtype=torch.float64))


def test_identical_opposite_and_absent_tailors(kind_model: DiT) -> None:
    with torch.no_grad():
        for _, layer in kind_model.named_matrices():
            for bank in (layer.tailor_u, layer.tailor_sigma, layer.tailor_v):
                bank[1] = bank[0]
                bank[2] = bank[0]
            layer.tailor_sigma[2].neg_()
            layer.tailor_sigma[3].zero_()
    cosines = tailor_cosines(kind_model)
    assert float(cosines[0, 1]) == pytest.approx(1)
    assert float(cosines[0, 2]) == pytest.approx(-1)
    assert cosines[3].tolist() == [0] * 5
    assert abs(float(cosines[0, 4])) < 0.9


def test_matrices_without_tailors_have_none(dense: DiT) -> None:
    model = noisy(factorize(dense, KindConfig(learngene_rank=10, tailor_rank=3, targets=("v",))), seed=1)
    shares = {name: energy.tailor_share for name, energy in energies(model).items()}
    assert all((share > 0) == name.endswith(".v") for name, share in shares.items())
    assert float(tailor_cosines(model)[2, 2]) == pytest.approx(1)


def test_relatedness_of_groups_that_are_and_are_not_related() -> None:
    groups = ["a", "a", "a", "b", "b", "b", "c", "c", "c"]
    same = torch.tensor([[x == y for y in groups] for x in groups])
    found = relatedness(torch.where(same, 0.6, 0.1).fill_diagonal_(1.0), groups)
    assert found.within == pytest.approx(0.6)
    assert found.between == pytest.approx(0.1)
    assert found.chance < 0.01
    assert relatedness(torch.where(same, 0.1, 0.6).fill_diagonal_(1.0), groups).chance > 0.9
    for useless in (["a"] * 3, ["a", "b", "c"]):
        with pytest.raises(UsageError, match="two groups"):
            relatedness(torch.eye(3), useless)


def test_exchanged_tailors_keep_the_embedding(kind_model: DiT, inputs) -> None:
    x, t, _ = inputs
    before = {name: tensor.clone() for name, tensor in kind_model.state_dict().items()}
    new = exchange_tailors(kind_model, [1, 0, 2, 3, 4])
    ids = torch.zeros(len(x), dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(new(x, t, ids), kind_model(x, t, ids, ids + 1))
        assert torch.equal(new(x, t, ids + 2), kind_model(x, t, ids + 2))
        assert not torch.allclose(new(x, t, ids), kind_model(x, t, ids))
    assert all(torch.equal(tensor, before[name]) for name, tensor in kind_model.state_dict().items())


def test_what_has_no_components_is_refused(dense: DiT, kind_model: DiT) -> None:
    for view in (energies, tailor_cosines):
        with pytest.raises(UsageError, match="dense"):
            view(dense)
    with pytest.raises(UsageError, match="table"):
        exchange_tailors(dense, [0] * 5)
    for partners in ([0, 1], [0, 1, 2, 3, 5]):
        with pytest.raises(UsageError, match="0 to 4"):
            exchange_tailors(kind_model, partners)
