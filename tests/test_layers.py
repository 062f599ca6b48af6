"""Layers that blocks of dense matrices and of components share."""

from __future__ import annotations

import pytest
import torch

from kindiff.components import ComponentLinear
from kindiff.models import DiT
from kindiff.models.layers import attend


@pytest.mark.parametrize("requires_grad", [True, False])
def test_attention_rounds_what_a_tuner_left_in_fp32_and_takes_the_same_way(requires_grad: bool) -> None:
    torch.manual_seed(0)
    wide = [torch.randn(2, 8, 12, requires_grad=requires_grad) for _ in range(3)]
    narrow = [part.detach().bfloat16().requires_grad_(requires_grad) for part in wide]
    with torch.autocast("cpu", torch.bfloat16):
        y, rounded = attend(*wide, 3), attend(*narrow, 3)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rounded)
    if requires_grad:
        for part, other in zip(wide, narrow, strict=True):
            (gradient,) = torch.autograd.grad(y.float().square().sum(), part, retain_graph=True)
            (expected,) = torch.autograd.grad(rounded.float().square().sum(), other, retain_graph=True)
            assert gradient.dtype == torch.float32
            assert torch.equal(gradient, expected.float())


def test_attention_of_parts_that_do_not_fit_is_refused() -> None:
    q, k = torch.randn(2, 8, 12), torch.randn(2, 8, 12).bfloat16()
    with pytest.raises(RuntimeError):
        attend(q, k, q, 3)
    with pytest.raises(RuntimeError):
        attend(q, q, q, 5)


def test_attention_without_autocast_stays_in_fp32() -> None:
    parts = [torch.randn(2, 8, 12) for _ in range(3)]
    assert attend(*parts, 3).dtype == torch.float32


def test_hooks_see_every_matrix_of_components(kind_model: DiT, inputs, kernels) -> None:
    usual = kind_model(*inputs)
    matrices = [name for name, module in kind_model.named_modules() if isinstance(module, ComponentLinear)]
    seen = []
    for name in matrices:
        kind_model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    torch.testing.assert_close(kind_model(*inputs), usual, rtol=1e-4, atol=1e-4)
    assert sorted(seen) == sorted(matrices)
    kind_model.get_submodule(matrices[0]).register_forward_pre_hook(
        lambda _, found: (found[0] * 2, *found[1:])
    )
    assert not kind_model(*inputs).equal(usual)
