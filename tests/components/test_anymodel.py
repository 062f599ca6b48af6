"""Foreign models made of components: gated == merged, nothing of the caller's changed, several classes a batch."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kindiff.classes import ClassSet
from kindiff.components import decompose_modules, factorize_modules, merge_modules
from kindiff.components.anymodel import ComponentModel
from kindiff.config import KindConfig
from kindiff.errors import UsageError
from kindiff.models.layers import Gating
from random_models import noisy

EXAMPLE = Path(__file__).parents[2] / "examples" / "any_transformer.py"
NAMES = ("ant", "bee", "cat")
KIND = KindConfig(learngene_rank=8, tailor_rank=2)
EXACT = {"rtol": 0.0, "atol": 1e-10}
TARGETS = ("layers.*", "out")


class Tower(nn.Module):
    """Two linear layers and one more without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 16), nn.Linear(16, 12)])
        self.out = nn.Linear(12, 10, bias=False)

    def forward(self, x: Tensor, *, times: float = 1.0) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(x) * times


def made(model: nn.Module, targets=TARGETS, kind: KindConfig = KIND, **more) -> ComponentModel:
    return noisy(
        factorize_modules(model, targets=targets, kind=kind, classes=ClassSet(NAMES), **more), 1
    ).double()


@pytest.fixture
def tower() -> Tower:
    torch.manual_seed(0)
    return Tower()


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 12), (5, 7, 12), (5, 2, 3, 12)])
def test_gated_equals_merged_per_sample(tower: Tower, shape) -> None:
    model, x, ids = made(tower), x_of(*shape), torch.tensor([0, 2, 1, 3, 2])
    with torch.no_grad():
        gated = model(ids, x, times=2.0)
        for i, id_ in enumerate(ids.tolist()):
            plain = merge_modules(model, None if id_ == 3 else NAMES[id_])
            assert type(plain.layers[0]) is nn.Linear
            torch.testing.assert_close(plain(x[i : i + 1], times=2.0), gated[i : i + 1], **EXACT)


def test_the_callers_model_is_not_changed_and_full_rank_is_it(tower: Tower) -> None:
    before = copy.deepcopy(tower.state_dict())
    full = factorize_modules(
        tower, targets=TARGETS, kind=KindConfig(learngene_rank=10, tailor_rank=2), classes=3
    )
    assert all(torch.equal(tensor, tower.state_dict()[name]) for name, tensor in before.items())
    assert type(tower.out) is nn.Linear
    assert full.classes.names == ("class_0", "class_1", "class_2")
    only_out = factorize_modules(
        tower, targets=["out"], kind=KindConfig(learngene_rank=10, tailor_rank=2), classes=3
    )
    x = x_of(4, 12).float()
    with torch.no_grad():
        torch.testing.assert_close(only_out(torch.tensor([0, 1, 2, 3]), x), tower(x), rtol=0, atol=1e-5)
    assert only_out.layers().keys() == {"out"}


def test_decompose_and_recombine(tower: Tower) -> None:
    model, x = made(tower), x_of(4, 12)
    parts = decompose_modules(model)
    again = parts.recombine()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    small = parts.recombine(["cat", "ant"])
    with torch.no_grad():
        full = model(torch.tensor([2, 0, 3, 2]), x)
        assert torch.equal(small(torch.tensor([0, 1, 2, 0]), x), full)
        assert torch.equal(parts.learngenes.inner(x)[2], full[2])
    cut = parts.recombine(["bee"], learngene_rank=3)
    for name, layer in cut.layers().items():
        whole = model.layers()[name].inner.merged_weight()
        left_out = torch.linalg.svdvals(whole)[3:].norm()
        torch.testing.assert_close(torch.linalg.norm(whole - layer.inner.merged_weight()), left_out, **EXACT)
    for call, sentence in (
        (lambda: parts.recombine(["yak"]), "'yak' is unknown"),
        (lambda: parts.recombine(learngene_rank=9), "they hold 8, so use 1 to 8"),
    ):
        with pytest.raises(UsageError, match=sentence):
            call()


def test_superclasses_and_a_gating_of_ones_own(tower: Tower) -> None:
    kind = KindConfig(learngene_rank=6, tailor_rank=2, gate="superclass")
    model = made(tower, kind=kind, superclasses={"ant": "insect", "bee": "insect", "cat": "mammal"})
    x, ids = x_of(3, 12), torch.tensor([0, 1, 2])
    with torch.no_grad():
        gated = model(ids, x)
        same = model(Gating(torch.tensor([[0, 3], [1, 3], [2, 4]]), torch.ones(3, 2, dtype=torch.float64)), x)
        assert torch.equal(gated, same)
        torch.testing.assert_close(decompose_modules(model).recombine()(ids, x), gated, **EXACT)
        soft = Gating(torch.arange(5).expand(3, -1), torch.rand(3, 5, dtype=torch.float64))
        assert not torch.equal(model(soft, x), gated)


def test_a_class_that_is_absent_gets_no_gradient(tower: Tower) -> None:
    model = made(tower)
    ids = torch.tensor([0, 2, 3, 0])
    model(ids, x_of(4, 12)).square().sum().backward()
    assert model.slots_on(ids).tolist() == [0, 2]
    for bank in model.tailors():
        assert (bank.grad[1] == 0).all()
        assert all(bank.grad[i].abs().sum() > 0 for i in (0, 2))


def test_conditions_nest_and_end_with_their_call(tower: Tower) -> None:
    model, x = made(tower), x_of(2, 12)
    one, two = torch.tensor([0, 0]), torch.tensor([1, 1])
    with torch.no_grad():
        expected, other = model(one, x), model(two, x)
        with model.condition(one) as inner:
            assert torch.equal(inner(x), expected)
            assert torch.equal(model(two, x), other)
            assert torch.equal(inner(x), expected)
    with pytest.raises(UsageError, match=r"layers\.0 was called without a condition"):
        model.inner(x)
    with pytest.raises(ZeroDivisionError), model.condition(one):
        raise ZeroDivisionError
    with pytest.raises(UsageError, match="without a condition"):
        model.inner(x)


def test_checkpointing_sees_the_condition_that_spans_it(tower: Tower) -> None:
    model, x = made(tower), x_of(2, 12)
    ids = torch.tensor([0, 1])
    with model.condition(ids) as inner:
        torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False).square().sum().backward()
    again = copy.deepcopy(model)
    again.zero_grad()
    again(ids, x).square().sum().backward()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **EXACT)


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (["layers.*", "outs"], r"'outs' matches no linear layer \(did you mean 'out'\?\)"),
        ([], "no targets are given"),
        (["tanh"], "the model has 3: layers.0, layers.1, out"),
    ],
)
def test_targets_that_match_nothing(tower: Tower, targets, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        factorize_modules(tower, targets=targets, kind=KIND, classes=3)


def test_requests_that_cannot_be_met(tower: Tower) -> None:
    def ask(model: nn.Module = tower, **changes):
        values = {"targets": ["out"], "kind": KIND, "classes": 3} | changes
        return lambda: factorize_modules(model, **values)

    tied = copy.deepcopy(tower)
    tied.head = nn.Linear(12, 10, bias=False)
    tied.head.weight = tied.out.weight
    attention = nn.TransformerEncoderLayer(16, 2)
    for call, sentence in (
        (ask(kind=KindConfig(learngene_rank=11, tailor_rank=1)), "larger than the full rank 10 of 'out'"),
        (ask(kind=KindConfig(learngene_rank=8, tailor_rank=1, gate="soft")), "a Gating of your own"),
        (
            ask(kind=KindConfig(learngene_rank=8, tailor_rank=1, targets=("q",))),
            r"kind\.targets stays as it is",
        ),
        (ask(kind=KindConfig(learngene_rank=8, tailor_rank=1, gate="superclass")), "needs superclasses"),
        (ask(classes=0), "num_classes is 0"),
        (ask(tied), "'out' shares its weight with another layer"),
        (ask(attention, targets=["*.out_proj"]), "NonDynamicallyQuantizableLinear, not a plain"),
    ):
        with pytest.raises(UsageError, match=sentence):
            call()


def test_a_layer_that_is_used_by_its_weight_is_named() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, batch_first=True)
    kind = KindConfig(learngene_rank=8, tailor_rank=1)
    model = factorize_modules(layer, targets=["linear1"], kind=kind, classes=2).eval()
    assert not hasattr(model.inner.linear1, "weight")
    with pytest.raises(AttributeError, match="linear1 is made of components and has no weight"):
        model(torch.tensor([0, 1]), torch.ones(2, 3, 16))


@pytest.mark.parametrize(
    ("condition", "sentence"),
    [
        (torch.tensor([0, 4]), r"class ids are 0 to 3 \(the null class\), not \[0, 4\]"),
        (torch.tensor([-1, 0]), "class ids are 0 to 3"),
        (torch.tensor([0.5, 0.5]), "a condition is class ids"),
        (torch.tensor([[0], [1]]), "a condition is class ids"),
        (torch.tensor([0, 1, 2]), r"layers\.0 is given \(2, 12\) and the condition has 3 samples"),
    ],
)
def test_conditions_that_do_not_fit(tower: Tower, condition: Tensor, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        made(tower)(condition, x_of(2, 12))


def test_dtype_mode_and_state_are_kept(tower: Tower) -> None:
    half = factorize_modules(tower.bfloat16().eval(), targets=TARGETS, kind=KIND, classes=3)
    assert {p.dtype for p in half.inner.parameters()} == {torch.bfloat16}
    assert not half.training
    mixed = copy.deepcopy(tower).train()
    next(mixed.children()).eval()
    modes = {name: module.training for name, module in mixed.named_modules()}
    model = factorize_modules(mixed, targets=TARGETS, kind=KIND, classes=3)
    for made_of in (model, decompose_modules(model).recombine()):
        assert {n: m.training for n, m in made_of.inner.named_modules() if n in modes} == modes
        assert made_of.training
    assert half(torch.tensor([0, 1]), x_of(2, 12).bfloat16()).dtype == torch.bfloat16
    other = factorize_modules(copy.deepcopy(tower), targets=TARGETS, kind=KIND, classes=3, seed=5)
    other.load_state_dict(half.state_dict())
    x = x_of(2, 12).bfloat16()
    assert torch.equal(other(torch.tensor([0, 1]), x), half(torch.tensor([0, 1]), x))


def test_the_example_trains(capsys) -> None:
    errors = runpy.run_path(str(EXAMPLE))["main"](steps=150)
    assert "squared error" in capsys.readouterr().out
    assert errors["its own tailors"] < errors["the learngenes alone"] < 1
    assert errors["another class's tailors"] > 1.3 * errors["its own tailors"]
    assert errors["columns, merged"] < 1.5 * errors["its own tailors"]


def test_a_bert_layer() -> None:
    bert = pytest.importorskip("transformers.models.bert.modeling_bert")
    from transformers import BertConfig

    config = BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    torch.manual_seed(0)
    layer = bert.BertLayer(config).eval()
    model = made(layer, ("attention.self.*", "*.dense")).eval()
    assert len(model.layers()) == 6
    check(model, lambda m, x: _first(m(x)), lambda c, x: _first(model(c, x)), x_of(4, 5, 24))


def test_a_pixart_and_an_sd3_block() -> None:
    pytest.importorskip("diffusers")
    from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock

    torch.manual_seed(0)
    pixart = BasicTransformerBlock(
        24, 2, 12, cross_attention_dim=24, norm_type="ada_norm_single", attention_bias=True,
        norm_elementwise_affine=False,
    ).eval()  # fmt: skip
    model = made(pixart, ("attn?.to_[qkv]", "attn?.to_out.0", "ff.net.*")).eval()
    assert len(model.layers()) == 10
    text, time = x_of(4, 3, 24), x_of(4, 6 * 24)
    more = {"encoder_hidden_states": text, "timestep": time}
    one = {"encoder_hidden_states": text[:1], "timestep": time[:1]}
    x = x_of(4, 5, 24)
    with torch.no_grad():
        gated = model(torch.tensor([1, 0, 3, 2]), x, **more)
        plain = merge_modules(model, "bee")(x[:1], **one)
    torch.testing.assert_close(plain, gated[:1], **EXACT)

    sd3 = JointTransformerBlock(24, 2, 12).eval()
    model = made(sd3, ("attn.*", "ff.net.*", "ff_context.net.*")).eval()
    with torch.no_grad():
        gated = model(torch.tensor([1, 0, 3, 2]), x, text, x_of(4, 24))
        plain = merge_modules(model, "bee")(x[:1], text[:1], x_of(4, 24)[:1])
    for a, b in zip(plain, gated, strict=True):
        torch.testing.assert_close(a, b[:1], **EXACT)


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def check(model: ComponentModel, call, gated_call, x: Tensor) -> None:
    """Gated equals merged, sample by sample."""
    ids = torch.tensor([1, 0, 3, 2])
    with torch.no_grad():
        gated = gated_call(ids, x)
        for i, id_ in enumerate(ids.tolist()):
            plain = merge_modules(model, None if id_ == 3 else NAMES[id_])
            torch.testing.assert_close(call(plain, x[i : i + 1]), gated[i : i + 1], **EXACT)
