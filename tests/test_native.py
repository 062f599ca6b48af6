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
from kindiff.runtime import cpu_has
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
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "inner", "width"), [(1, 1, 1, 3), (3, 37, 19, 61), (2, 16, 96, 144)]
)
@pytest.mark.parametrize(("on", "count"), [(0, 0), (1, 4), (1, 5)])
def test_products_of_rows_and_what_is_added(batch, tokens, inner, width, on, count, dtype, threads) -> None:
    torch.manual_seed(0)
    (a, a64), (b, b64) = (random(*shape, dtype=dtype) for shape in ((batch * tokens, inner), (inner, width)))
    bias, bias64 = random(width, dtype=dtype)
    (h, h64), (u, u64) = (random(*shape, dtype=dtype) for shape in ((on, tokens, count), (on, count, width)))
    plain = a64 @ b64
    wanted = (plain + bias64).view(batch, tokens, width)
    wanted[:on] += h64 @ u64
    for second in (b, b.T.contiguous().T):
        close(native.multiply(a, second), plain, dtype)
        found = native.multiply(a, second, batch=batch, h_BNM=h, u_BMO=u, bias_O=bias)
        close(found, wanted.flatten(0, 1), dtype)
    # Parts of wider rows, read and written; what is beside them stays.
    wide, out = (
        torch.ones(batch * tokens, inner + 3, dtype=dtype),
        torch.ones(batch * tokens, width + 2, dtype=dtype),
    )
    wide[:, 2 : 2 + inner] = a
    native.multiply(wide[:, 2 : 2 + inner], b, out=out[:, 1:-1])
    close(out[:, 1:-1], plain, dtype)
    assert out[:, [0, -1]].eq(1).all()


@needs_kernels
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "count", "width"), [(1, 1, 3), (37, 19, 61), (1100, 24, 50), (513, 96, 144)]
)
def test_products_over_all_rows(rows, count, width, dtype, threads) -> None:
    torch.manual_seed(0)
    (a, a64), (b, b64) = random(rows, count + 4, dtype=dtype), random(rows, width + 2, dtype=dtype)
    found = native.multiply_turned(a[:, 3:-1], b[:, 1:-1])
    close(found, a64[:, 3:-1].T @ b64[:, 1:-1], torch.float32)


@needs_kernels
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 37])
def test_attention(tokens, dtype, threads) -> None:
    torch.manual_seed(0)
    parts, parts64 = zip(*(random(2, tokens, 3 * 8, dtype=dtype) for _ in range(3)), strict=True)
    parts, parts64 = ([t.requires_grad_() for t in each] for each in (parts, parts64))
    found = native.attention(*parts, 3)
    by_head = (part.unflatten(2, (3, 8)).transpose(1, 2) for part in parts64)
    wanted = F.scaled_dot_product_attention(*by_head).transpose(1, 2).flatten(2)
    close(found, wanted.detach(), dtype)
    do, do64 = random(*found.shape, dtype=dtype)
    found.backward(do)
    wanted.backward(do64)
    size = sum(part.grad.norm() for part in parts64)  # one token has no gradient of q and k
    for part, exact in zip(parts, parts64, strict=True):
        assert (part.grad.double() - exact.grad).norm() <= 2 * TOLERANCE[dtype] * size
    large = torch.full((1, 2, 4), 200.0, dtype=dtype)
    assert native.attention(large, large, large, 2).tolist() == [[[200.0] * 4] * 2]
    large[0, 1, 0] = torch.nan
    assert native.attention(large, large, torch.ones_like(large), 1).isnan().all()


@needs_kernels
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("count", "rank", "inner", "width", "components", "gelu"),
    [(1, 1, 3, 5, 1, False), (3, 7, 19, 61, 3, False), (1, 9, 50, 97, 4, True), (2, 24, 96, 48, 5, False)],
)
def test_passes_of_layers(count, rank, inner, width, components, gelu, dtype, threads) -> None:
    torch.manual_seed(0)
    batch, tokens, slots = 3, 200 if count == 2 else 37, 4  # more rows than are summed over at once
    shapes = [(rank, width), (rank,), (rank, inner), (width,)]
    shapes += [(slots, components, width), (slots, components), (slots, components, inner)]
    pairs = [random(*shape) for shape in shapes for _ in range(count)]
    parameters, exact = [pair[0] for pair in pairs], [pair[1].requires_grad_() for pair in pairs]
    (x, x64), (weights, weights64) = random(batch, tokens, inner, dtype=dtype), random(batch, 2)
    x64.requires_grad_()
    slots_BK = torch.tensor([[1, 3], [0, 3], [1, 1]])  # one twice, and slot 2 is nobody's
    wanted = []
    for layer in range(count):
        u, sigma, v, bias, *bank = exact[layer::count]
        own_u = bank[0][slots_BK] * (bank[1][slots_BK] * weights64[..., None])[..., None]
        h_own = x64 @ bank[2][slots_BK].flatten(1, 2).mT
        wanted.append((x64 @ v.T) @ (u * sigma[:, None]) + h_own @ own_u.flatten(1, 2) + bias)
    ys, active, h, h_own = native.layers_forward(x, slots_BK, weights, parameters, gelu=gelu)
    for found, y in zip(ys, wanted, strict=True):  # of two products, one after the other
        assert found.dtype == dtype
        assert (found.double() - y).norm() <= 2 * TOLERANCE[dtype] * y.norm()
    if gelu:
        wanted = [F.gelu(wanted[0], approximate="tanh")]
        close(active, F.gelu(ys[0].double(), approximate="tanh").detach(), dtype)
    dys, dys64 = zip(*(random(batch, tokens, width, dtype=dtype) for _ in wanted), strict=True)
    torch.autograd.backward(wanted, dys64)
    before = ys[0] if gelu else None
    arguments = dys, x, h, h_own, slots_BK, weights, parameters
    dx, gradients = native.layers_backward(
        *arguments, before_gelu=before, inner=True, common=True, biases=True, own=True
    )
    for found, tensor in zip([dx, *gradients], [x64, *exact], strict=True):
        assert found.shape == tensor.shape
        assert (found.double() - tensor.grad).norm() <= 4 * TOLERANCE[dtype] * tensor.grad.norm()
    for wants in ({"inner"}, {"common"}, {"biases"}, {"own"}):
        asked = {name: name in wants for name in ("inner", "common", "biases", "own")}
        other_dx, others = native.layers_backward(*arguments, before_gelu=before, **asked)
        kinds = ["common"] * 3 + ["biases"] + ["own"] * 3
        for i, (found, one) in enumerate(zip(others, gradients, strict=True)):
            assert found is None if kinds[i // count] not in wants else torch.equal(found, one)
        assert other_dx is None if "inner" not in wants else torch.equal(other_dx, dx)


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
    bank = [torch.ones(shape) for shape in ((3, 4), (3,), (3, 8), (4,), (2, 1, 4), (2, 1), (2, 1, 8))]
    with pytest.raises(IndexError, match="slots 0 to 2 of a bank of 2"):
        native.layers_forward(torch.ones(2, 3, 8), torch.tensor([[0], [2]]), torch.ones(2, 1), bank)
    with pytest.raises(ValueError, match="do not fit layers"):
        native.layers_forward(torch.ones(2, 3, 8), torch.tensor([[0]]), torch.ones(1, 1), bank)
    with pytest.raises(ValueError, match="do not fit layers"):
        native.layers_forward(torch.ones(1, 3, 7), torch.tensor([[0]]), torch.ones(1, 1), bank)
    for wrong in (torch.ones(9, 4), torch.ones(8, 4).bfloat16()):
        with pytest.raises(RuntimeError, match="do not fit each other"):
            native.multiply(torch.ones(6, 8), wrong)
    with pytest.raises(RuntimeError, match="do not fit each other"):
        native.multiply_turned(torch.ones(6, 8), torch.ones(5, 4))
    assert native.multiply_turned(torch.ones(0, 8), torch.ones(0, 4)).eq(0).all()
    none = torch.ones(0, 3, 8), torch.ones(0, 1, dtype=torch.int64), torch.ones(0, 1)
    ys, _, h, h_own = native.layers_forward(*none, bank)
    wanted = dict.fromkeys(("inner", "common", "biases", "own"), True)
    dx, found = native.layers_backward(ys, none[0], h, h_own, *none[1:], bank, before_gelu=None, **wanted)
    assert dx.shape == (0, 3, 8)
    assert all(gradient.eq(0).all() for gradient in found)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = native.across(torch.ones(1, 3, 8).float(), None, torch.ones(1, 3, 2).float(), on=1)[1]
    finally:
        torch.set_default_dtype(before)
    close(found, torch.full((1, 2, 8), 3.0).double(), torch.float32)


@needs_kernels
@pytest.mark.slow
@pytest.mark.skipif(not cpu_has("avx512_f"), reason="a processor that has no more than others")
@pytest.mark.parametrize("without", ["-mno-avx512f", "-mno-avx512bf16"])
def test_as_a_processor_that_has_less_makes_them(without: str) -> None:
    told = one_thread() | {"KINDIFF_NATIVE": without}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", __file__]
    done = subprocess.run(command, env=told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


@needs_kernels
def test_flags_of_the_compiler_make_others() -> None:
    ask = "from kindiff.native import compiled; print(compiled.found()[1])"
    assert "does not make them" in run(ask, KINDIFF_NATIVE="-O1 -no-such-flag")
    assert run(ask, KINDIFF_NATIVE="-O1") != run(ask) == run(ask, KINDIFF_NATIVE="1")


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
