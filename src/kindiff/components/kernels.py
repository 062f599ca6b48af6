"""The kernels (Triton) of `kindiff.components.fused`, which says what they compute.

Read on first use. Without a GPU Triton's interpreter can run them (TRITON_INTERPRET=1, as the tests do).
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ModuleNotFoundError:  # then nobody calls them: `fused.TRITON`
    tl = None

    def jit(kernel):
        return kernel


@jit
def inward(
    x, v, own, h, tokens, width, rank, mine, count, h_stride, at, own_at,
    FEW: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    tiles_r = tl.cdiv(rank, BLOCK_R)
    tiles_t = tl.cdiv(tokens, BLOCK_T)
    pid = tl.program_id(0)
    column, row = pid % (count * tiles_r), pid // (count * tiles_r)
    layer, tile = column // tiles_r, column % tiles_r
    sample = row // tiles_t
    token = (row % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = (sample * tokens + token).to(tl.int64)
    component = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    few = tl.arange(0, FEW)
    inner = tl.arange(0, BLOCK_I)
    is_token, is_component, is_few = token < tokens, component < rank, few < mine
    x_at = x + rows[:, None] * width + inner[None, :]
    v_at = v + (layer * rank + component)[None, :] * width + inner[:, None]
    own_rows = ((sample * count + layer) * mine + few).to(tl.int64)
    own_from = own + own_rows[None, :] * width + inner[:, None]
    total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    total_own = tl.zeros((BLOCK_T, FEW), dtype=tl.float32)
    for k in range(0, width, BLOCK_I):
        here = inner < width - k
        x_tile = tl.load(x_at + k, mask=is_token[:, None] & here[None, :], other=0.0)
        v_tile = tl.load(v_at + k, mask=here[:, None] & is_component[None, :], other=0.0)
        own_tile = tl.load(own_from + k, mask=here[:, None] & is_few[None, :], other=0.0)
        total = tl.dot(x_tile, v_tile, total)
        total_own = tl.dot(x_tile, own_tile, total_own)
    to = h + rows[:, None] * h_stride
    tl.store(
        to + at + layer * rank + component[None, :], total.to(h.dtype.element_ty),
        mask=is_token[:, None] & is_component[None, :],
    )  # fmt: skip
    if tile == 0:
        total_own += tl.where(few == mine, 1.0, 0.0)[None, :]
        tl.store(
            to + own_at + layer * FEW + few[None, :], total_own.to(h.dtype.element_ty),
            mask=is_token[:, None],
        )  # fmt: skip


@jit
def outward(
    h, u, own, bias, y, tokens, features, rank, mine, count, h_stride, at, own_at,
    FEW: tl.constexpr, BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tiles_o = tl.cdiv(features, BLOCK_O)
    tiles_t = tl.cdiv(tokens, BLOCK_T)
    pid = tl.program_id(0)
    column, row = pid % tiles_o, pid // tiles_o
    sample = row // tiles_t
    token = (row % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = (sample * tokens + token).to(tl.int64)
    feature = column * BLOCK_O + tl.arange(0, BLOCK_O)
    inner = tl.arange(0, BLOCK_R)
    few = tl.arange(0, FEW)
    is_token, is_feature = token < tokens, feature < features
    h_at = h + rows[:, None] * h_stride
    total = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for k in range(0, rank, BLOCK_R):
        here = inner < rank - k
        h_tile = tl.load(h_at + at + k + inner[None, :], mask=is_token[:, None] & here[None, :], other=0.0)
        u_tile = tl.load(
            u + (k + inner)[:, None] * features + feature[None, :], mask=here[:, None] & is_feature[None, :],
            other=0.0,
        )  # fmt: skip
        total = tl.dot(h_tile, u_tile, total)
    for layer in range(count):
        h_own = tl.load(h_at + own_at + layer * FEW + few[None, :], mask=is_token[:, None], other=0.0)
        own_rows = ((sample * count + layer) * mine + few).to(tl.int64)
        u_own = tl.load(
            own + own_rows[:, None] * features + feature[None, :],
            mask=(few < mine)[:, None] & is_feature[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(h_own, u_own, total)
    if BIAS:
        total += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + rows[:, None] * features + feature[None, :], total.to(y.dtype.element_ty),
        mask=is_token[:, None] & is_feature[None, :],
    )  # fmt: skip


@jit
def weights(
    h, z, found, own, samples, tokens, features, rank, count, share, h_stride, at, own_at,
    FEW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    tiles_r = tl.cdiv(rank, BLOCK_R)
    tiles_t = tl.cdiv(tokens, BLOCK_T)
    tiles_o = tl.cdiv(features, BLOCK_O)
    pid = tl.program_id(0)
    column, row = pid % tiles_o, pid // tiles_o
    part, row = row // (count * tiles_r), row % (count * tiles_r)
    layer, tile = row // tiles_r, row % tiles_r
    component = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    feature = column * BLOCK_O + tl.arange(0, BLOCK_O)
    inner = tl.arange(0, BLOCK_T)
    few = tl.arange(0, FEW)
    is_component, is_feature = component < rank, feature < features
    total = tl.zeros((BLOCK_R, BLOCK_O), dtype=tl.float32)
    total_own = tl.zeros((BLOCK_O, FEW), dtype=tl.float32)
    for i in range(0, share * tiles_t):
        sample = part * share + i // tiles_t
        token = (i % tiles_t) * BLOCK_T + inner
        rows = (sample * tokens + token).to(tl.int64)
        is_token = (token < tokens) & (rows < samples * tokens)
        h_at = h + rows[:, None] * h_stride
        h_tile = tl.load(
            h_at + at + layer * rank + component[None, :],
            mask=is_token[:, None] & is_component[None, :],
            other=0.0,
        )
        own_tile = tl.load(h_at + own_at + layer * FEW + few[None, :], mask=is_token[:, None], other=0.0)
        z_tile = tl.load(
            z + rows[:, None] * features + feature[None, :],
            mask=is_token[:, None] & is_feature[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(h_tile), z_tile, total)
        total_own = tl.dot(tl.trans(z_tile), own_tile, total_own)
        # A sample's own are whole with its last rows.
        is_last = i % tiles_t == tiles_t - 1
        own_rows = ((sample * count + layer) * FEW + few).to(tl.int64)
        ends = own_rows < tl.where(is_last & (tile == 0), samples * count * FEW, 0)
        tl.store(
            own + own_rows[None, :] * features + feature[:, None], total_own.to(own.dtype.element_ty),
            mask=is_feature[:, None] & ends[None, :],
        )  # fmt: skip
        total_own = tl.where(is_last, 0.0, total_own)
    to = found + ((part * count + layer) * rank + component).to(tl.int64)[:, None] * features
    tl.store(to + feature[None, :], total, mask=is_component[:, None] & is_feature[None, :])
