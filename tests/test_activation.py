"""GELU equals torch's by the hyperbolic tangent, and its derivative autograd's in float64."""

import pytest
import torch
import torch.nn.functional as F

from kindiff.models.activation import gelu

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3}
"""Relative to 1 and the value; bf16 rounds to 8 bits."""


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_gelu_and_its_derivative_are_those_of_the_tanh_formula(dtype: torch.dtype, kernels: bool) -> None:
    some = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -300.0, 300.0])]).to(
        dtype
    )
    x = some.repeat(3)[:-1].requires_grad_()  # more than a thread takes at a time, and no whole vectors
    exact = x.detach().double().requires_grad_()
    y, wanted = gelu(x), F.gelu(exact, approximate="tanh")
    dy = torch.linspace(-1, 1, len(x)).to(dtype)
    y.backward(dy)
    wanted.backward(dy.double())
    assert y.dtype == x.grad.dtype == dtype
    close = {"atol": TOLERANCES[dtype], "rtol": TOLERANCES[dtype]}
    torch.testing.assert_close(y.double(), wanted, **close)
    torch.testing.assert_close(x.grad.double(), exact.grad, **close)
    assert torch.equal(gelu(x.detach()), y)  # sampling is training's forward pass, to the bit


def test_gelu_takes_any_layout_and_an_empty_batch(kernels: bool) -> None:
    x = torch.randn(4, 6, 10).transpose(0, 2)
    torch.testing.assert_close(gelu(x), F.gelu(x, approximate="tanh"))
    x.requires_grad_()
    gelu(x).sum().backward()
    assert x.grad.shape == x.shape
    assert gelu(torch.empty(0, 3, requires_grad=True)).shape == (0, 3)


def test_compiled_gelu_is_one_graph_and_the_same() -> None:
    x = torch.randn(5, 7, requires_grad=True)
    compiled = torch.compile(gelu, backend="aot_eager", fullgraph=True)
    (slope,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(compiled(x), gelu(x))
    torch.testing.assert_close(slope, torch.autograd.grad(gelu(x).sum(), x)[0])
