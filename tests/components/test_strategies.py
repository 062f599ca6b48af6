"""Every way of computing component matrices against the plain one: a dense matrix for each sample, by autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from conftest import randomised
from kindiff import native
from kindiff.components import ComponentLinear, decompose, factorize, fused, narrow, product, set_strategy_
from kindiff.components.strategy import choose, explain, strategy_of
from kindiff.config import KindConfig
from kindiff.errors import UsageError
from kindiff.models import DiT, Gating
from kindiff.native import MATRIX_UNITS

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
I_, O_ = 24, 40


def layers(rank: int | None, count: int) -> list[ComponentLinear]:
    torch.manual_seed(count)
    made = [ComponentLinear(I_, O_, rank=rank, slots=5, tailor_rank=3) for _ in range(count)]
    for layer in made:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
    return made


def gatings() -> dict[str, Gating]:
    one = torch.tensor([[0], [3], [3], [1], [0]])
    on = torch.tensor([[1.0], [1.0], [0.0], [1.0], [0.0]])
    return {
        "one class": Gating(torch.full_like(one, 2), torch.ones_like(on)),
        "mixed, some off": Gating(one, on),
        "two slots": Gating(
            torch.cat([one, torch.full_like(one, 4)], 1), torch.cat([on, torch.ones_like(on)], 1)
        ),
        "the last off": Gating(one, torch.tensor([[1.0], [0.0], [1.0], [0.0], [0.0]]), on=3),
        "soft": Gating(torch.arange(5).expand(5, 5), torch.linspace(0.1, 0.9, 25).view(5, 5)),
    }


def reference(layer: ComponentLinear, x_BTI: Tensor, gating: Gating) -> Tensor:
    common = layer.weight if layer.rank is None else (layer.u.T * layer.sigma) @ layer.v
    ys = []
    for x, slots_K, weights_K in zip(x_BTI, gating.slots_BK, gating.weights_BK, strict=True):
        weight = common
        for slot, on in zip(slots_K, weights_K, strict=True):
            weight = weight + (layer.tailor_u[slot].T * layer.tailor_sigma[slot] * on) @ layer.tailor_v[slot]
        ys.append(x @ weight.T + layer.bias)
    return torch.stack(ys)


def results(made: list[ComponentLinear], gating: Gating, dtype: torch.dtype | None) -> list[Tensor]:
    """Outputs and all gradients; dtype None: the reference, in float64."""
    made = copy.deepcopy(made)
    x = torch.randn(5, 6, I_, generator=torch.Generator().manual_seed(5))
    if dtype is None:
        made, x = [layer.double() for layer in made], x.double()
        gating = Gating(gating.slots_BK, gating.weights_BK.double())
    x.requires_grad_()
    if dtype is None:
        ys = [reference(layer, x, gating) for layer in made]
    else:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            ys = ComponentLinear.together(made, x, gating)
    upstream = torch.rand(5, 6, O_, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    sum((y.double() * (upstream + i)).sum() for i, y in enumerate(ys)).backward()
    parameters = [p for layer in made for p in layer.parameters() if p.requires_grad]
    return [*(y.detach() for y in ys), x.grad, *(p.grad for p in parameters)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mix", gatings())
@pytest.mark.parametrize(("rank", "strategy"), [(8, "gathered"), (8, "joined"), (None, "gathered")])
def test_the_same_as_plain_matrices_forward_and_backward(rank, strategy, mix, count, dtype, kernels) -> None:
    made = layers(rank, count)
    for layer in made:
        layer.strategy = strategy
    gating = gatings()[mix]
    for own, plain in zip(results(made, gating, dtype), results(made, gating, None), strict=True):
        error = (own.double() - plain).norm() / plain.norm()
        assert error < TOLERANCE[dtype], (error, own.shape)


@pytest.mark.parametrize("rank", [8, None])
def test_a_sample_with_many_components_is_left_to_the_library(rank, monkeypatch) -> None:
    monkeypatch.setattr(narrow, "MANY", 1)
    made, gating = layers(rank, 3), gatings()["the last off"]
    for own, plain in zip(results(made, gating, torch.float32), results(made, gating, None), strict=True):
        assert (own.double() - plain).norm() < TOLERANCE[torch.float32] * plain.norm()


@pytest.mark.parametrize("strategy", ["gathered", "joined"])
def test_what_is_frozen_gets_no_gradient_and_changes_none(strategy: str) -> None:
    """As in transfer: the learngenes are frozen, the tailors train; and the other way round."""
    gating = gatings()["mixed, some off"]
    for frozen in ("tailor_", ("u", "v", "sigma", "bias")):
        made = layers(8, 3)
        for layer in made:
            layer.strategy = strategy
        everything = results(made, gating, torch.float32)[4:]
        names = [(i, n) for i, layer in enumerate(made) for n, _ in layer.named_parameters()]
        for layer in made:
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(
                    not name.startswith(frozen) if frozen == "tailor_" else name not in frozen
                )
        part = results(made, gating, torch.float32)[4:]
        kept = [
            g
            for (i, n), g in zip(names, everything, strict=True)
            if dict(made[i].named_parameters())[n].requires_grad
        ]
        for a, b in zip(part, kept, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_gates_weights_learn_where_they_are_soft() -> None:
    layer = layers(8, 1)[0]
    layer.strategy = "joined"  # has no gradient for them, and must not be taken
    slots, weights, *_ = gatings()["soft"]
    x = torch.randn(5, 6, I_, generator=torch.Generator().manual_seed(1))
    grads = []
    for compute in (lambda w: layer(x, Gating(slots, w)), lambda w: reference(layer, x, Gating(slots, w))):
        own = weights.clone().requires_grad_()
        compute(own).square().sum().backward()
        grads.append(own.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_the_rule() -> None:
    by_kernels = {
        "on": 1,
        "components": 4,
        "device": "cpu",
        "dtype": torch.float32,
        "training": True,
        "kernels": True,
    }
    assert choose("auto", slots=1, **by_kernels).name == "gathered"
    assert choose("auto", slots=1, **by_kernels | {"components": 13}).name == "joined"
    assert choose("auto", slots=2, **by_kernels | {"components": 32}).name == "gathered"
    assert choose("auto", slots=2, **by_kernels | {"components": 33}).name == "gathered"
    assert choose("auto", slots=2, **by_kernels | {"on": 3, "components": 11}).name == "joined"
    assert choose("auto", slots=2, **by_kernels | {"device": "cuda"}).name == "joined"
    few = by_kernels | {"kernels": False}
    assert choose("auto", slots=1, **few).name == "joined"
    assert choose("auto", slots=6, **few).name == "joined"
    assert choose("auto", slots=7, **few).name == "gathered"
    half = few | {"dtype": torch.bfloat16}
    limit = 28 if MATRIX_UNITS else 6
    assert choose("auto", slots=limit, **half).name == "joined"
    assert choose("auto", slots=limit + 1, **half).name == "gathered"
    assert choose("auto", slots=7, **few | {"on": 2}).name == "joined"
    assert choose("auto", slots=7, **few | {"components": 3}).name == "joined"
    assert choose("auto", slots=1, **few | {"training": False}).name == "gathered"
    assert choose("joined", slots=900, **few | {"training": False}).name == "joined"
    assert choose("auto", slots=5, **few | {"device": "cuda"}).name == "gathered"
    assert "24" in choose("auto", slots=7, **few).why


def test_the_kernels_are_not_counted_on_where_they_take_no_layer() -> None:
    made, one = layers(8, 3), gatings()["one class"]
    one = one._replace(slots_BK=one.slots_BK - 2)
    for layer in made:
        for name in ("tailor_u", "tailor_sigma", "tailor_v"):
            setattr(layer, name, nn.Parameter(getattr(layer, name)[:1]))
    usual = strategy_of(made, one, torch.float32)
    assert usual.name == ("gathered" if native.usable() and torch.float32 in native.PRODUCTS else "joined")
    made[1].bias = None
    assert strategy_of(made, one, torch.float32).name == "joined"


def test_a_soft_gate_is_explained_as_its_layers_see_it(dense: DiT, monkeypatch) -> None:
    soft = factorize(dense, KindConfig(learngene_rank=16, tailor_rank=2, gate="soft"))
    lines = explain(soft, 8)
    training = [line for line in lines if "training" in line]
    assert training
    assert all("the gate's weights train" in line for line in training)
    assert not any("weights train" in line for line in lines if "sampling" in line)
    asked = []
    monkeypatch.setattr(fused, "fits", lambda rank, components, dtype: asked.append(components))
    explain(soft, 8)
    assert set(asked) == {2 * soft.structure["slots"]}


def test_no_id_is_taken_for_another(kind_model: DiT, inputs) -> None:
    x, t, ids = inputs
    with pytest.raises(IndexError):
        kind_model(x, t, ids, -torch.ones_like(ids))


def test_it_can_be_overruled(kind_model: DiT, inputs) -> None:
    with torch.no_grad():
        usual = kind_model(*inputs)
        joined = set_strategy_(kind_model, "joined")(*inputs)
        assert not joined.equal(usual)
        torch.testing.assert_close(joined, usual, rtol=1e-4, atol=1e-4)
        assert set_strategy_(kind_model, "auto")(*inputs).equal(usual)
    with pytest.raises(UsageError, match="gathered, fused or joined"):
        set_strategy_(kind_model, "sorted")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("strategy", ["gathered", "joined"])
def test_no_bit_of_another_class_reaches_a_tailor(strategy: str, dtype: torch.dtype) -> None:
    gating = gatings()["mixed, some off"]  # slot 3 belongs to the second sample; it is off in the third
    grads = []
    for other in (1.0, -7.5):
        made = layers(8, 3)
        x = torch.randn(5, 6, I_, generator=torch.Generator().manual_seed(5))
        x[[0, 2, 3, 4]] *= other
        for layer in made:
            layer.strategy = strategy
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            ys = ComponentLinear.together(made, x, gating)
        sum(y.double().sum() for y in ys).backward()
        grads.append(
            [(layer.tailor_u.grad[3], layer.tailor_sigma.grad[3], layer.tailor_v.grad[3]) for layer in made]
        )
    for own, same in zip(*grads, strict=True):
        assert all(a.equal(b) and a.abs().sum() > 0 for a, b in zip(own, same, strict=True))


def shared(gate: str, dense: DiT) -> DiT:
    """A model of each sort of gate and of learngenes."""
    kind = KindConfig(learngene_rank=10, tailor_rank=3, gate="soft" if gate == "soft" else "class")
    model = randomised(factorize(dense, kind), seed=1)
    parts = decompose(model) if gate != "soft" else None
    if gate == "both":
        return randomised(parts.with_new_tailors(("fox", "gnu", "hen"), rank=2, share="both"))
    if gate == "o alone":
        return randomised(parts.with_new_tailors(("fox", "gnu", "hen"), rank=2, targets=("o",)))
    if gate == "dense learngenes":
        return parts.recombine(layers="dense")
    if gate == "none":
        return dense
    return model


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gate", ["class", "soft", "both", "o alone", "dense learngenes", "none"])
def test_calls_that_share_a_gating_are_the_calls_alone(gate: str, dense: DiT, dtype, monkeypatch) -> None:
    model = shared(gate, dense)
    off = model.classes.null_id
    made: list[int] = []
    gather = product._gather
    monkeypatch.setattr(product, "_gather", lambda layer, *rest: made.append(1) or gather(layer, *rest))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for ids in ([0, 2, off, 1, off, off], [off, off]):
            ids_B = torch.tensor(ids)
            gating = model.gating(ids_B)
            alone, together = [], []
            for k in range(3):
                x = torch.randn(len(ids), 3, 8, 8, generator=torch.Generator().manual_seed(k))
                t_B = torch.full((len(ids),), 100.0 * k)
                made.clear()
                alone.append(model(x, t_B, ids_B))
                every = len(made)
                made.clear()
                together.append(model(x, t_B, ids_B, gating=gating))
                assert len(made) == (every if k == 0 and ids[0] != off else 0)  # once, and never for nothing
            assert all(a.equal(b) for a, b in zip(alone, together, strict=True))
            assert gating is None or gating.on == (4 if ids[0] != off else 0)
        monkeypatch.setattr(product, "KEPT", 0)
        gating = model.gating(torch.tensor([0, 1]))
        for _ in range(2):
            made.clear()
            model(x[:2], t_B[:2], torch.tensor([0, 1]), gating=gating)
            assert len(made) == every  # what is too large to be kept is gathered for each call
