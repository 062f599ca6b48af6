"""Layers that blocks of dense matrices and of components share."""

from __future__ import annotations

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

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
    seen.clear()
    with register_module_forward_hook(lambda module, *_: seen.append(type(module))):
        kind_model(*inputs)
    assert seen.count(ComponentLinear) == len(matrices)
    kind_model.get_submodule(matrices[0]).register_forward_pre_hook(
        lambda _, found: (found[0] * 2, *found[1:])
    )
    assert not kind_model(*inputs).equal(usual)


@pytest.mark.parametrize("bf16", [True, False])
def test_a_hook_that_comes_or_goes_between_the_steps_of_a_sampler(
    kind_model: DiT, inputs, bf16, kernels
) -> None:
    x, t, ids = inputs
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        usual = kind_model(x, t, ids)
        for order in ((True, False), (False, True)):
            gating = kind_model.gating(ids)
            for hooked in order:
                handle = kind_model.blocks[0].q.register_forward_hook(lambda *_: None) if hooked else None
                found = kind_model(x, t, ids, gating=gating)
                torch.testing.assert_close(found, usual, rtol=2e-2, atol=2e-2)
                if handle is not None:
                    handle.remove()


def test_functional_transforms_are_torchs_own(dense: DiT, inputs, kernels) -> None:
    x, t, ids = inputs
    found = torch.func.grad(lambda x: dense(x, t, ids).square().sum())(x)
    (usual,) = torch.autograd.grad(dense(x.requires_grad_(), t, ids).square().sum(), x)
    torch.testing.assert_close(found, usual, rtol=1e-4, atol=1e-4)


def test_a_second_derivative_is_refused(kind_model: DiT, inputs, kernels) -> None:
    kind_model.requires_grad_(False).blocks[0].q.requires_grad_(True)
    parameters = list(kind_model.blocks[0].q.parameters())
    gradients = torch.autograd.grad(
        kind_model(*inputs).square().sum(), parameters, create_graph=True, allow_unused=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.square().sum() for g in gradients if g is not None).backward()
