"""The kernels (Triton) of `kindiff.components.fused`, which says what they compute.

Read on first use. Without a GPU Triton's interpreter can run them (TRITON_INTERPRET=1, as the tests do).

A block's learngene columns are BLOCK_A + BLOCK_B wide, both powers of two and BLOCK_B perhaps none, so that a rank of
192 costs 128 + 64 columns instead of 256; the tailors' FEW columns stand beside them.
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
def _inward(
    x, v, own, component, token, tokens,
    WIDTH: tl.constexpr, RANK: tl.constexpr, MINE: tl.constexpr, FEW: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """A block of rows of x against rows of v, from `component` on, and of own: (T, A), (T, B) and (T, FEW)."""
    a, few = component + tl.arange(0, BLOCK_A), tl.arange(0, FEW)
    inner = tl.arange(0, BLOCK_I)
    is_token, is_a, is_few = token < tokens, a < RANK, few < MINE
    x_at = x + token[:, None] * WIDTH + inner[None, :]
    a_at = v + a[None, :] * WIDTH + inner[:, None]
    own_at = own + few[None, :] * WIDTH + inner[:, None]
    total_a = tl.zeros((BLOCK_T, BLOCK_A), dtype=tl.float32)
    total_b = total_a
    total_own = tl.zeros((BLOCK_T, FEW), dtype=tl.float32)
    if BLOCK_B > 0:
        b = component + BLOCK_A + tl.arange(0, BLOCK_B)
        is_b = b < RANK
        b_at = v + b[None, :] * WIDTH + inner[:, None]
        total_b = tl.zeros((BLOCK_T, BLOCK_B), dtype=tl.float32)
    for k in range(0, WIDTH, BLOCK_I):
        here = inner < (BLOCK_I if WIDTH % BLOCK_I == 0 else WIDTH - k)
        x_tile = tl.load(x_at + k, mask=is_token[:, None] & here[None, :], other=0.0)
        a_tile = tl.load(a_at + k, mask=here[:, None] & is_a[None, :], other=0.0)
        own_tile = tl.load(own_at + k, mask=here[:, None] & is_few[None, :], other=0.0)
        total_a = tl.dot(x_tile, a_tile, total_a)
        if BLOCK_B > 0:
            b_tile = tl.load(b_at + k, mask=here[:, None] & is_b[None, :], other=0.0)
            total_b = tl.dot(x_tile, b_tile, total_b)
        total_own = tl.dot(x_tile, own_tile, total_own)
    total_own += tl.where(few == MINE, 1.0, 0.0)[None, :]
    return total_a, total_b, total_own


@jit
def _keep(
    h, total_a, total_b, total_own, sample, layer, component, token, tokens,
    RANK: tl.constexpr, FEW: tl.constexpr, LAYERS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Store what `_inward` found into h; the tailors' columns once, with the first components."""
    is_token = (token < tokens)[:, None]
    a, few = component + tl.arange(0, BLOCK_A), tl.arange(0, FEW)
    to = h + sample * tokens * (LAYERS * (RANK + FEW)) + token[:, None] * (LAYERS * (RANK + FEW))
    tl.store(to + layer * RANK + a[None, :], total_a, mask=is_token & (a < RANK)[None, :])
    if BLOCK_B > 0:
        b = component + BLOCK_A + tl.arange(0, BLOCK_B)
        tl.store(to + layer * RANK + b[None, :], total_b, mask=is_token & (b < RANK)[None, :])
    is_first = (component + few < FEW)[None, :]
    tl.store(to + LAYERS * RANK + layer * FEW + few[None, :], total_own, mask=is_token & is_first)


@jit
def inward(
    x, v, own, h, tokens, first,
    WIDTH: tl.constexpr, RANK: tl.constexpr, MINE: tl.constexpr, FEW: tl.constexpr, COUNT: tl.constexpr,
    LAYERS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    tiles_r: tl.constexpr = (RANK + BLOCK_A + BLOCK_B - 1) // (BLOCK_A + BLOCK_B)
    tiles_t = tl.cdiv(tokens, BLOCK_T)
    pid = tl.program_id(0)
    column, row = pid % (COUNT * tiles_r), pid // (COUNT * tiles_r)
    layer, tile = first + column // tiles_r, column % tiles_r
    sample = (row // tiles_t).to(tl.int64)
    token = (row % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    component = tile * (BLOCK_A + BLOCK_B)
    total_a, total_b, total_own = _inward(
        x + sample * tokens * WIDTH, v + layer * RANK * WIDTH, own + (sample * LAYERS + layer) * MINE * WIDTH,
        component, token, tokens, WIDTH, RANK, MINE, FEW, BLOCK_T, BLOCK_A, BLOCK_B, BLOCK_I,
    )  # fmt: skip
    kind = h.dtype.element_ty
    _keep(
        h, total_a.to(kind), total_b.to(kind), total_own.to(kind), sample, layer, component, token, tokens,
        RANK, FEW, LAYERS, BLOCK_A, BLOCK_B,
    )  # fmt: skip


@jit
def through(
    x, v, v_own, u, u_own, bias, h, y, samples, tokens,
    WIDTH: tl.constexpr, FEATURES: tl.constexpr, RANK: tl.constexpr, MINE: tl.constexpr, FEW: tl.constexpr,
    LAYERS: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, STAGES_O: tl.constexpr,
):  # fmt: skip
    tiles_t = tl.cdiv(tokens, BLOCK_T)
    pid = tl.program_id(0)
    layer, row = pid % LAYERS, pid // LAYERS
    sample = (row // tiles_t).to(tl.int64)
    token = (row % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    own_row = (sample * LAYERS + layer) * MINE
    total_a, total_b, total_own = _inward(
        x + sample * tokens * WIDTH, v + layer * RANK * WIDTH, v_own + own_row * WIDTH, 0, token, tokens,
        WIDTH, RANK, MINE, FEW, BLOCK_T, BLOCK_A, BLOCK_B, BLOCK_I,
    )  # fmt: skip
    kind = y.dtype.element_ty
    h_a, h_b, h_own = total_a.to(kind), total_b.to(kind), total_own.to(kind)
    if KEEP:
        _keep(h, h_a, h_b, h_own, sample, layer, 0, token, tokens, RANK, FEW, LAYERS, BLOCK_A, BLOCK_B)
    a, few = tl.arange(0, BLOCK_A), tl.arange(0, FEW)
    is_token, is_a, is_few = token < tokens, a < RANK, few < MINE
    column = tl.arange(0, BLOCK_O)
    u_layer = u + layer * RANK * FEATURES
    a_at = u_layer + a[:, None] * FEATURES + column[None, :]
    own_at = u_own + own_row * FEATURES + few[:, None] * FEATURES + column[None, :]
    y_at = y + (layer * samples + sample) * tokens * FEATURES + token[:, None] * FEATURES + column[None, :]
    if BLOCK_B > 0:
        b = BLOCK_A + tl.arange(0, BLOCK_B)
        is_b = b < RANK
        b_at = u_layer + b[:, None] * FEATURES + column[None, :]
    for o in tl.range(0, FEATURES, BLOCK_O, num_stages=STAGES_O):
        here = column < (BLOCK_O if FEATURES % BLOCK_O == 0 else FEATURES - o)
        if BIAS:
            bias_tile = tl.load(bias + layer * FEATURES + o + column, mask=here, other=0.0)
        u_tile = tl.load(a_at + o, mask=is_a[:, None] & here[None, :], other=0.0)
        own_tile = tl.load(own_at + o, mask=is_few[:, None] & here[None, :], other=0.0)
        total = tl.dot(h_a, u_tile)
        if BLOCK_B > 0:
            b_tile = tl.load(b_at + o, mask=is_b[:, None] & here[None, :], other=0.0)
            total = tl.dot(h_b, b_tile, total)
        total = tl.dot(h_own, own_tile, total)
        if BIAS:
            total += bias_tile.to(tl.float32)[None, :]
        tl.store(y_at + o, total.to(kind), mask=is_token[:, None] & here[None, :])


@jit
def outward(
    h, u, own, bias, y, samples, tokens, first, to,
    FEATURES: tl.constexpr, RANK: tl.constexpr, MINE: tl.constexpr, FEW: tl.constexpr, COUNT: tl.constexpr,
    LAYERS: tl.constexpr, BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    tiles_o: tl.constexpr = (FEATURES + BLOCK_O - 1) // BLOCK_O
    tiles_t = tl.cdiv(tokens, BLOCK_T)
    pid = tl.program_id(0)
    column, row = pid % tiles_o, pid // tiles_o
    sample = (row // tiles_t).to(tl.int64)
    token = (row % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    feature = column * BLOCK_O + tl.arange(0, BLOCK_O)
    inner, columns = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_M)
    is_token, is_feature = token < tokens, feature < FEATURES
    h_at = h + sample * tokens * (LAYERS * (RANK + FEW)) + token[:, None] * (LAYERS * (RANK + FEW))
    u_at = u + first * RANK * FEATURES + inner[:, None] * FEATURES + feature[None, :]
    # The tailors' columns of all layers side by side; asked for here, so that they are there after the loop.
    is_mine = (columns < COUNT * FEW) & (columns % FEW < MINE)
    h_own = tl.load(
        h_at + LAYERS * RANK + first * FEW + columns[None, :],
        mask=is_token[:, None] & is_mine[None, :],
        other=0.0,
    )
    own_rows = (columns // FEW * MINE + columns % FEW) * FEATURES
    u_own = tl.load(
        own + (sample * LAYERS + first) * MINE * FEATURES + own_rows[:, None] + feature[None, :],
        mask=is_mine[:, None] & is_feature[None, :], other=0.0,
    )  # fmt: skip
    total = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for k in range(0, COUNT * RANK, BLOCK_R):
        here = inner < (BLOCK_R if COUNT * RANK % BLOCK_R == 0 else COUNT * RANK - k)
        h_tile = tl.load(
            h_at + first * RANK + k + inner[None, :], mask=is_token[:, None] & here[None, :], other=0.0
        )
        u_tile = tl.load(u_at + k * FEATURES, mask=here[:, None] & is_feature[None, :], other=0.0)
        total = tl.dot(h_tile, u_tile, total)
    total = tl.dot(h_own, u_own, total)
    if BIAS:
        bias_tile = tl.load(bias + first * FEATURES + feature, mask=is_feature, other=0.0)
        total += bias_tile.to(tl.float32)[None, :]
    y_at = y + (to * samples + sample) * tokens * FEATURES + token[:, None] * FEATURES + feature[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=is_token[:, None] & is_feature[None, :])


@jit
def weights(
    h, z, found, own, samples, share, first,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, RANK: tl.constexpr, FEW: tl.constexpr, COUNT: tl.constexpr,
    LAYERS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    tiles_r: tl.constexpr = (RANK + BLOCK_A + BLOCK_B - 1) // (BLOCK_A + BLOCK_B)
    tiles_t: tl.constexpr = (TOKENS + BLOCK_T - 1) // BLOCK_T
    tiles_o: tl.constexpr = (FEATURES + BLOCK_O - 1) // BLOCK_O
    pid = tl.program_id(0)
    column, row = pid % tiles_o, pid // tiles_o
    part, row = row // (COUNT * tiles_r), row % (COUNT * tiles_r)
    layer, tile = row // tiles_r, row % tiles_r
    a = tile * (BLOCK_A + BLOCK_B) + tl.arange(0, BLOCK_A)
    feature = column * BLOCK_O + tl.arange(0, BLOCK_O)
    inner, few = tl.arange(0, BLOCK_T), tl.arange(0, FEW)
    is_a, is_feature = a < RANK, feature < FEATURES
    stride: tl.constexpr = LAYERS * (RANK + FEW)
    sample = (part * share).to(tl.int64)
    h_at = h + inner[:, None] * stride + (first + layer) * RANK
    a_at = h_at + a[None, :]
    own_from = h_at + (LAYERS - first - layer) * RANK + (first + layer) * FEW + few[None, :]
    z_at = z + inner[:, None] * FEATURES + feature[None, :]
    total_a = tl.zeros((BLOCK_A, BLOCK_O), dtype=tl.float32)
    total_own = tl.zeros((BLOCK_O, FEW), dtype=tl.float32)
    if BLOCK_B > 0:
        b = tile * (BLOCK_A + BLOCK_B) + BLOCK_A + tl.arange(0, BLOCK_B)
        is_b = b < RANK
        b_at = h_at + b[None, :]
        total_b = tl.zeros((BLOCK_B, BLOCK_O), dtype=tl.float32)
    for i in range(0, tl.minimum(share, samples - part * share) * tiles_t):
        at = (sample + i // tiles_t) * TOKENS + i % tiles_t * BLOCK_T
        is_token = inner < (BLOCK_T if TOKENS % BLOCK_T == 0 else TOKENS - i % tiles_t * BLOCK_T)
        z_tile = tl.load(z_at + at * FEATURES, mask=is_token[:, None] & is_feature[None, :], other=0.0)
        a_tile = tl.load(a_at + at * stride, mask=is_token[:, None] & is_a[None, :], other=0.0)
        own_tile = tl.load(own_from + at * stride, mask=is_token[:, None], other=0.0)
        total_a = tl.dot(tl.trans(a_tile), z_tile, total_a)
        if BLOCK_B > 0:
            b_tile = tl.load(b_at + at * stride, mask=is_token[:, None] & is_b[None, :], other=0.0)
            total_b = tl.dot(tl.trans(b_tile), z_tile, total_b)
        total_own = tl.dot(tl.trans(z_tile), own_tile, total_own)
        if i % tiles_t == tiles_t - 1:  # a sample's own are whole with its last rows
            own_row = ((sample + i // tiles_t) * COUNT + layer) * FEW
            tl.store(
                own + own_row * FEATURES + few[None, :] * FEATURES + feature[:, None],
                total_own.to(own.dtype.element_ty), mask=(feature < tl.where(tile == 0, FEATURES, 0))[:, None],
            )  # fmt: skip
            total_own = tl.zeros((BLOCK_O, FEW), dtype=tl.float32)
    to = found + ((part * COUNT + layer) * RANK).to(tl.int64) * FEATURES + feature[None, :]
    tl.store(to + a[:, None] * FEATURES, total_a, mask=is_a[:, None] & is_feature[None, :])
    if BLOCK_B > 0:
        tl.store(to + b[:, None] * FEATURES, total_b, mask=is_b[:, None] & is_feature[None, :])
