"""Kernels for the CPU: the same as torch's operations in float64, forward and backward, whatever the sizes; and what
becomes of them where they cannot be made."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kindiff import native
from kindiff.native import compiled
from toys import one_thread

needs_kernels = pytest.mark.skipif(not native.usable(), reason="no kernels: " + compiled.found()[1])
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3}
"""Relative, of the norm; bf16 rounds to 8 bits."""
WIDTHS = (1, 7, 16, 24, 61, 96)
"""Less than a vector of any processor, whole ones, and some over."""


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    assert (found.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


@pytest.fixture(params=[1, 3], ids=lambda threads: f"{threads} threads")
def threads(request) -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Numbers in a dtype, and the same in float64."""
    found = torch.randn(*shape).to(dtype)
    return found, found.double()


@needs_kernels
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("batch", "on", "tokens", "count"), [(1, 1, 9, 5), (4, 2, 16, 4), (2, 2, 3, 1)])
def test_products_with_each_samples_own(dtype, width, batch, on, tokens, count, threads) -> None:
    torch.manual_seed(0)
    (x, x64), (v, v64) = random(batch, tokens, width, dtype=dtype), random(on, count, width, dtype=dtype)
    wide, wide64 = random(on, tokens, count + 3, dtype=dtype)
    h, h64 = (
        wide[..., 1 : 1 + count],
        wide64[..., 1 : 1 + count],
    )  # as a layer's part of several layers' columns
    bias, bias64 = random(width, dtype=dtype)
    out, g, total = native.across(x, v, h, on=on, total=True)
    close(out, x64[:on] @ v64.mT, dtype)
    close(g, h64.mT @ x64[:on], dtype)
    close(total, x64.sum(dim=(0, 1)), dtype)
    for v_or_none, h_or_none in ((v, None), (None, h)):
        alone = native.across(x, v_or_none, h_or_none, on=on)
        assert (alone[0] is None, alone[1] is None, alone[2]) == (v_or_none is None, h_or_none is None, None)
        assert all(torch.equal(a, b) for a, b in zip(alone, (out, g, total), strict=True) if a is not None)
    wanted = x64 + bias64
    wanted[:on] += h64 @ v64
    close(native.add_(x.clone(), h, v, bias), wanted, dtype)
    close(native.add_(x.clone(), h, v), wanted - bias64, dtype)
    close(native.add_(x.clone(), bias_O=bias), x64 + bias64, dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("slotted", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_factors_are_gathered_scaled_and_rounded(width, slotted, dtype, threads) -> None:
    torch.manual_seed(0)
    slots, count, layers = (4 if slotted else 1), 3, 2
    banks = [
        [random(slots, count, width), random(slots, count), random(slots, count, width + 5)]
        for _ in range(layers)
    ]
    plain = [[pair[0] for pair in bank] for bank in banks]
    exact = [[pair[1].requires_grad_() for pair in bank] for bank in banks]
    slots_BK = torch.tensor([[1, 3], [0, 3], [1, 0]]) if slotted else None  # slot 2 is nobody's
    weights, weights64 = random(3, 2) if slotted else (None, None)
    us, v = native.take(plain, slots_BK, weights, dtype)
    index = torch.zeros(1, 1, dtype=torch.int64) if slots_BK is None else slots_BK
    by = torch.ones(1, 1).double() if weights64 is None else weights64
    wanted_us = [((u * s[..., None])[index] * by[..., None, None]).flatten(1, 2) for u, s, _ in exact]
    wanted_v = torch.cat([bank[2][index].flatten(1, 2) for bank in exact], dim=1)
    for found, wanted in zip([*us, v], [*wanted_us, wanted_v], strict=True):
        close(found, wanted.detach(), dtype)
    gradients = [random(*t.shape, dtype=dtype) for t in (*us, v)]
    torch.autograd.backward([*wanted_us, wanted_v], [g64 for _, g64 in gradients])
    *gus, gv = (g for g, _ in gradients)
    for found, wanted in zip(native.take_back(gus, gv, plain, slots_BK, weights), exact, strict=True):
        for mine, theirs in zip(found, wanted, strict=True):
            close(mine, theirs.grad, torch.float32)
    if not slotted:
        gu = gus[0][0]
        turned = native.turn_back(
            gu.T.contiguous(), gv[0].T.contiguous()[:, :count], *(t[0] for t in plain[0])
        )
        for mine, theirs in zip(turned, exact[0], strict=True):
            close(mine, theirs.grad[0], torch.float32)


@needs_kernels
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS[1:])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_adaptive_norm_and_the_gated_residual(batch, width, dtype, threads) -> None:
    torch.manual_seed(0)
    x, x64 = random(batch, 9, width)
    x, x64 = (t.add(2).detach().requires_grad_() for t in (x, x64))
    rows, rows64 = random(batch, 3 * width)
    (shift, scale, gate), (shift64, scale64, gate64) = (
        t.requires_grad_().chunk(3, dim=1) for t in (rows, rows64)
    )
    y, y64 = (t.requires_grad_() for t in random(batch, 9, width, dtype=dtype))
    normal = native.norm(x, shift, scale, 1e-6, dtype)
    wanted = F.layer_norm(x64, (width,), eps=1e-6) * (1 + scale64[:, None]) + shift64[:, None]
    close(normal, wanted.detach(), dtype)
    z, z64 = native.residual(x, gate, y), x64 + gate64[:, None] * y64
    close(z, z64.detach(), torch.float32)
    (dn, dn64), (dz, dz64) = random(batch, 9, width, dtype=dtype), random(batch, 9, width)
    torch.autograd.backward([normal, z], [dn, dz])
    torch.autograd.backward([wanted, z64], [dn64, dz64])
    for found, exact in ((x, x64), (rows, rows64), (y, y64)):
        assert (found.grad.double() - exact.grad).norm() <= 3 * TOLERANCE[found.dtype] * exact.grad.norm()


@needs_kernels
def test_what_is_no_number_stays_none() -> None:
    for dtype in native.DTYPES:
        x = torch.ones(1, 2, 40, dtype=dtype)
        x[0, 0, 3] = torch.nan
        assert native.gelu(x).isnan().nonzero().tolist() == [[0, 0, 3]]
        out, _, total = native.across(x, torch.ones(1, 2, 40, dtype=dtype), None, on=1, total=True)
        assert out[0].isnan().tolist() == [[True, True], [False, False]]
        assert total.isnan().nonzero().tolist() == [[3]]
    zero = torch.zeros(1, 40)
    assert native.norm(x.float(), zero, zero, 1e-6, torch.bfloat16).isnan()[0].all(dim=1).tolist() == [
        True,
        False,
    ]


@needs_kernels
def test_what_the_kernels_do_not_take() -> None:
    x = torch.ones(2, 3)
    assert native.usable(x, torch.nn.Parameter(x.bfloat16()))
    assert not native.usable(x, x.double())
    assert not native.usable(x.to("meta"))
    with torch._subclasses.FakeTensorMode() as fake:
        assert not native.usable(fake.from_tensor(x))


def run(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=one_thread() | {"KINDIFF_NATIVE": ""} | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_where_there_are_none_and_why(tmp_path: Path) -> None:
    ask = "from kindiff.native import compiled; print(compiled.found())"
    assert run(ask, KINDIFF_NATIVE="0") == "(None, 'KINDIFF_NATIVE=0')"
    assert run(ask, PATH=str(tmp_path), CXX="") == "(None, 'no C++ compiler')"
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\ncase $1 in --version) exit 0;; esac\necho it does not work >&2\nexit 1\n")
    broken.chmod(0o755)
    cache = tmp_path / "cache"
    said = run(ask, CXX=str(broken), KINDIFF_CACHE=str(cache), PATH=str(tmp_path))
    assert said == f"(None, '{broken} does not make them: it does not work')"
    assert [path for path in cache.rglob("*") if path != cache / "native"] == []  # nothing half-written
    (tmp_path / "file").write_text("")
    assert "does not make them" in run(ask, CXX=str(broken), KINDIFF_CACHE=str(tmp_path / "file"))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_a_c_compiler_makes_them_too(tmp_path: Path) -> None:
    """As other software may leave it in CXX."""
    compiled._compile(shutil.which("gcc"), tmp_path / "kernels.so")
    compiled._loaded(tmp_path / "kernels.so")
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.so"]


@needs_kernels
@pytest.mark.parametrize("rank", [3, 16, 37])
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_gradients_of_learngenes_that_stand_turned(rank, dtype) -> None:
    torch.manual_seed(0)
    (u, u64), (sigma, sigma64), (v, _) = random(rank, 21), random(rank), random(rank, 40)
    (gu, gu64), (gv, gv64) = random(21, rank, dtype=dtype), random(40, 3 * rank, dtype=dtype)
    du, dsigma, dv = native.turn_back(gu, gv[:, rank : 2 * rank], u, sigma, v)
    close(du, gu64.T * sigma64[:, None], torch.float32)
    close(dsigma, (gu64.T * u64).sum(dim=1), torch.float32)
    close(dv, gv64[:, rank : 2 * rank].T, torch.float32)


@needs_kernels
def test_odd_shapes_and_defaults() -> None:
    torch.manual_seed(0)
    h, u = torch.randn(1, 2, 3).transpose(0, 1), torch.randn(2, 3, 4)  # one token: its stride says nothing
    close(native.add_(torch.zeros(2, 1, 4), h, u), (h.double() @ u.double()), torch.float32)
    out, g, total = native.across(
        torch.ones(2, 3, 8), torch.ones(0, 5, 8), torch.ones(0, 3, 5), on=0, total=True
    )
    assert (out.shape, g.shape, total.tolist()) == ((0, 3, 5), (0, 5, 8), [6.0] * 8)
    x, row = torch.randn(4, 3, 8), torch.randn(1, 16).requires_grad_()
    shift, scale = row.chunk(2, dim=1)  # of the whole batch
    y = native.norm(x, shift, scale, 1e-6, torch.float32) + native.residual(x, shift, x)
    wanted = torch.addcmul(shift[:, None], F.layer_norm(x, (8,), eps=1e-6), 1 + scale[:, None])
    wanted = wanted + torch.addcmul(x, shift[:, None], x)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(z.square().sum(), row)[0] for z in (y, wanted)))
    huge = torch.tensor([-1e15, 1e15]).requires_grad_()
    (slope,) = torch.autograd.grad(native.gelu(huge).sum(), huge)
    assert slope.tolist() == pytest.approx([0.0, 1.0], abs=1e-30)
    banks = [(torch.ones(2, 1, 4), torch.ones(2, 1), torch.ones(2, 1, 4))]
    with pytest.raises(IndexError, match="slots 0 to 2 of a bank of 2"):
        native.take(banks, torch.tensor([[0], [2]]), torch.ones(2, 1), torch.float32)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = native.across(torch.ones(1, 3, 8).float(), None, torch.ones(1, 3, 2).float(), on=1)[1]
    finally:
        torch.set_default_dtype(before)
    close(found, torch.full((1, 2, 8), 3.0).double(), torch.float32)


@needs_kernels
def test_a_machine_makes_them_once(tmp_path: Path) -> None:
    ask = "from kindiff import native; from kindiff.native import compiled; print(native.usable(), compiled.found()[1])"
    told = {"KINDIFF_CACHE": str(tmp_path)}
    first = run(ask, **told)
    (made,) = tmp_path.glob("native/*")
    assert first == f"True {made}"
    before = made.stat().st_mtime_ns
    assert run(ask, **told) == first
    assert made.stat().st_mtime_ns == before
