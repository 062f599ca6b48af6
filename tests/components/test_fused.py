"""The GPU kernels: on a GPU in bf16; without one Triton's interpreter runs them in fp16 (its bf16 is broken)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from kindiff.components import ComponentLinear, factorize, fused, operators
from kindiff.components.strategy import choose, set_strategy_, strategy_of
from kindiff.config import DiTConfig, KindConfig
from kindiff.errors import UsageError
from kindiff.models import DiT, Gating

# Without a GPU, an interpreter that knows numpy 2.4 is wanted.
pytest.importorskip("triton", minversion="3.6" if torch.cuda.is_available() else "3.8")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE, TOLERANCE = (torch.bfloat16, 1e-2) if DEVICE == "cuda" else (torch.float16, 1e-3)


def plain(
    x: Tensor, v: Tensor, v_own: Tensor, u: Tensor, bias: Tensor | None, u_own: Tensor, layers: int
) -> list[Tensor]:
    vs, us = v.chunk(layers), u.chunk(layers)
    vs_own, us_own = v_own.chunk(layers, dim=1), u_own.chunk(layers, dim=1)
    return [
        x @ vs[i].T @ us[i] + x @ vs_own[i].mT @ us_own[i] + (0 if bias is None else bias[i])
        for i in range(layers)
    ]


@pytest.mark.parametrize(
    ("batch", "tokens", "wide", "out", "rank", "own", "layers", "biased", "programs", "whole"),
    [
        pytest.param(2, 20, 40, 48, 16, 3, 3, True, 132, 256, id="q, k, v; odd sizes"),
        pytest.param(
            3, 130, 64, 136, 64, 4, 1, True, 4, 256, id="more tokens than a block; two samples a program"
        ),
        pytest.param(2, 64, 96, 40, 48, 17, 1, False, 132, 256, id="two blocks of tailor columns"),
        pytest.param(
            5, 16, 200, 96, 144, 64, 2, True, 1, 256, id="as many tailor components as fit; one program"
        ),
        pytest.param(
            3, 20, 80, 72, 80, 4, 2, True, 2, 64, id="a rank too large to pass through both factors at once"
        ),
    ],
)
def test_outputs_and_gradients_are_those_of_plain_products(
    batch: int, tokens: int, wide: int, out: int, rank: int, own: int, layers: int, biased: bool, programs: int,
    whole: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(operators, "PROGRAMS", programs)
    monkeypatch.setattr(operators, "WHOLE", whole)
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return (0.3 * torch.randn(*shape, device=DEVICE)).to(DTYPE).requires_grad_()

    given = [
        leaf(batch, tokens, wide), leaf(layers * rank, wide), leaf(batch, layers * own, wide),
        leaf(layers * rank, out), leaf(layers, out) if biased else None, leaf(batch, layers * own, out),
    ]  # fmt: skip
    exact = [None if t is None else t.detach().double().requires_grad_() for t in given]
    ys = fused.FusedProducts.apply(*given, layers)
    wanted = plain(*exact, layers)
    dys = [torch.randn_like(y) for y in ys]
    torch.autograd.backward(ys, dys)
    torch.autograd.backward(wanted, [dy.double() for dy in dys])
    for y, want in zip(ys, wanted, strict=True):
        assert (y.double() - want).norm() < TOLERANCE * want.norm()
    for ours, its in zip(given, exact, strict=True):
        if ours is not None:
            assert (ours.grad.double() - its.grad).norm() < TOLERANCE * its.grad.norm()


def test_only_gradients_that_are_asked_for() -> None:
    """Transfer: the learngenes are frozen, the tailors and the input are not."""
    torch.manual_seed(0)
    shapes = {(2, 16, 32): True, (16, 32): False, (2, 3, 32): True, (16, 48): False, (2, 3, 48): True}
    x, v, v_own, u, own = (
        torch.randn(*shape, device=DEVICE).to(DTYPE).requires_grad_(train) for shape, train in shapes.items()
    )
    (y,) = fused.FusedProducts.apply(x, v, v_own, u, None, own, 1)
    y.sum().backward()
    assert v.grad is None
    assert u.grad is None
    for tensor in (x, v_own, own):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32")  # torch.compile's own
def test_a_model_of_one_graph_whatever_the_classes() -> None:
    torch.manual_seed(0)
    config = DiTConfig(input_size=8, channels=3, num_classes=5, width=32, depth=2, heads=2, patch=2)
    kind = factorize(DiT(config), KindConfig(learngene_rank=16, tailor_rank=2, init="per-factor")).to(DEVICE)
    for parameter in kind.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(kind, backend="aot_eager", fullgraph=True)

    def outcome(model, strategy: str, ids: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        x, t = torch.randn(3, 3, 8, 8, device=DEVICE), torch.rand(3, device=DEVICE) * 1000
        set_strategy_(kind, strategy)
        with torch.autocast(DEVICE, DTYPE):
            y = model(x, t, ids.to(DEVICE))
        block = kind.blocks[0]
        return y, *torch.autograd.grad(
            4096 * y.square().sum(), [block.v.tailor_u, block.mlp_in.tailor_v, block.o.u, block.q.v]
        )

    for i, ids in enumerate(([0, 1, 5], [2, 2, 2], [5, 5, 4])):
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            ours = outcome(compiled, "fused", torch.tensor(ids))
        wanted = outcome(kind, "gathered", torch.tensor(ids))
        for a, b in zip(ours, wanted, strict=True):
            assert (a - b).norm() < 50 * TOLERANCE * b.norm()
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("rank", "columns", "rows"),
    [(16, (16, 0), (64, 0)), (48, (32, 16), (64, 64)), (96, (64, 32), (64, 64)), (192, (128, 64), (128, 64)),
     (240, (128, 128), (128, 128)), (256, (256, 0), (256, 0)), (512, (256, 0), (256, 0))],
)  # fmt: skip
def test_a_rank_is_held_by_two_powers_of_two(
    rank: int, columns: tuple[int, int], rows: tuple[int, int]
) -> None:
    assert operators._columns(rank) == columns
    assert operators._rows(rank) == rows


def test_blocks_fit_the_memory_that_a_card_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for shared, stages in ((232_448, 4), (166_912, 3), (101_376, 2), (49_152, 1)):
        monkeypatch.setattr(operators, "_shared", lambda device, shared=shared: shared)
        assert operators._stages(torch.empty(0), 4, 43_008) == stages


def test_layers_of_other_shapes_are_not_fused_together() -> None:
    layers = [ComponentLinear(32, out, rank=16, slots=3, tailor_rank=2) for out in (32, 48)]
    gating = Gating(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
    for layer in layers:
        layer.strategy = "fused"
    assert strategy_of(layers[:1], gating, torch.float16).name == "fused"
    with pytest.raises(UsageError, match="one shape of what shares an input"):
        strategy_of(layers, gating, torch.float16)


def test_when_the_rule_takes_them() -> None:
    half = {"slots": 100, "components": 4, "on": 1, "dtype": torch.bfloat16}
    assert choose("auto", **half, device="cuda", training=True, fits=True).name == "fused"
    assert choose("auto", **half, device="cuda", training=False, fits=True).name == "fused"
    assert choose("auto", **half, device="cpu", training=True, fits=True).name == "gathered"
    assert choose("auto", **half, device="cuda", training=True, fits=False).name == "gathered"
    assert choose("auto", **half | {"slots": 1}, device="cuda", training=True, fits=True).name == "joined"
    with pytest.raises(UsageError, match="a learngene rank that 16 divides"):
        choose("fused", **half, device="cuda", training=True, fits=False)


@pytest.mark.parametrize(
    ("rank", "components", "dtype", "fits"),
    [(192, 4, torch.bfloat16, True), (192, 64, torch.float16, True), (33, 4, torch.bfloat16, False),
     (192, 65, torch.bfloat16, False), (192, 4, torch.float32, False), (None, 4, torch.bfloat16, False)],
)  # fmt: skip
def test_what_fits(rank: int | None, components: int, dtype: torch.dtype, fits: bool) -> None:
    assert fused.fits(rank, components, dtype) == fits
