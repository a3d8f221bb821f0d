"""Triton kernels of linear attention: one pass over keys and values, one over queries; two for the gradients.

What passes between them is one record per key head, `[D + 2, D]` in fp32: the state mean(phi(k)^T v), then the row
mean(phi(k)), then the row mean(v). Programs that share a head leave partial records, which are added in a fixed order.
`bench/NOTES.md` has the arithmetic behind the block sizes.
"""

import torch
import triton
import triton.language as tl

# PTX's exponential that flushes denormal results, which `tl.exp` spends three more instructions on
FLUSHING_EXP = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)


@triton.jit
def _exp2(x):
    if FLUSHING_EXP:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def _exp(x):
    if FLUSHING_EXP:
        return _exp2(x * 1.4426950408889634)
    else:
        return tl.exp(x)


@triton.jit
def _aligned(stride, ALIGN: tl.constexpr):
    """A stride that the compiler knows to be a multiple: hints on a kernel's own arguments are dropped unseen."""
    return stride // ALIGN * ALIGN


@triton.jit
def _inverse(x):
    """Rounded to nearest, as `/` is not; there is one to a row."""
    return tl.math.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def _load(X, at, stride, rows, cols, left, D: tl.constexpr, ZEROS: tl.constexpr):
    """Rows `[BS, BD]` from token `at` on, `left` of which there are. Past the end come zeros, or else the last row
    again: a mask costs more than it is worth where nothing is made of those rows."""
    if not ZEROS:
        rows = tl.minimum(rows, left - 1)
    place = X + at * stride + (rows[:, None] * stride + cols[None, :])
    if tl.constexpr(D) % cols.shape[0] != 0:
        x = tl.load(place, mask=(rows < left)[:, None] & (cols < D)[None, :], other=0.0)
    elif ZEROS:
        x = tl.load(place, mask=(rows < left)[:, None], other=0.0)
    else:
        x = tl.load(place)
    return x


@triton.jit
def _features(x, cols, D: tl.constexpr, PHI: tl.constexpr):
    """phi of `[BS, BD]` in fp32. Rows and channels that pad a block are not zero: what they meet has to be."""
    x = x.to(tl.float32)
    if PHI == "elu1":
        y = tl.where(x > 0, x + 1.0, _exp(x))
    elif PHI == "relu":
        y = tl.maximum(x, 0.0)
    elif PHI == "relu_eps":
        y = tl.maximum(x, 0.0) + 1e-6
    elif PHI == "softmax":
        x = tl.where((cols < D)[None, :], x, float("-inf"))
        y = _exp(x - tl.max(x, 1)[:, None])
        y = y * _inverse(tl.sum(y, 1))[:, None]
    else:
        y = x
    return y


@triton.jit
def _features_backward(grad, y, PHI: tl.constexpr):
    """The gradient of x from that of y = phi(x); y alone tells the slope."""
    if PHI == "elu1":
        out = grad * tl.minimum(y, 1.0)
    elif PHI == "relu":
        out = tl.where(y > 0, grad, 0.0)
    elif PHI == "relu_eps":
        out = tl.where(y > 1e-6, grad, 0.0)
    elif PHI == "softmax":
        out = y * (grad - tl.sum(grad * y, 1)[:, None])
    else:
        out = grad
    return out


@triton.jit
def _pairs(x, BS: tl.constexpr, BD: tl.constexpr, ROPE: tl.constexpr):
    """Both channels of each pair that turns together, `[BS, BD / 2]` each."""
    if ROPE == "interleaved":
        a, b = tl.split(tl.reshape(x, (BS, BD // 2, 2)))
    else:
        a, b = tl.split(tl.permute(tl.reshape(x, (BS, 2, BD // 2)), (0, 2, 1)))
    return a, b


@triton.jit
def _unpair(a, b, BS: tl.constexpr, BD: tl.constexpr, ROPE: tl.constexpr):
    if ROPE == "interleaved":
        out = tl.reshape(tl.join(a, b), (BS, BD))
    else:
        out = tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (BS, BD))
    return out


@triton.jit
def _angles(COS, SIN, stride, start, tokens, D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, ROPE: tl.constexpr):
    """cos and sin of a block of tokens, one for each pair: `[BS, BD / 2]` in fp32."""
    cos, sin = tl.zeros((BS, 1), tl.float32), tl.zeros((BS, 1), tl.float32)
    if ROPE != "none":
        rows, pairs = tl.arange(0, BS), tl.arange(0, BD // 2)
        ok = (start + rows < tokens)[:, None] & (pairs < D // 2)[None, :]
        # tables write each angle twice: side by side, or half a head apart
        step: tl.constexpr = 2 if ROPE == "interleaved" else 1
        at = start.to(tl.int64) * stride + (rows[:, None] * stride + step * pairs[None, :])
        cos = tl.load(COS + at, mask=ok, other=0.0).to(tl.float32)
        sin = tl.load(SIN + at, mask=ok, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _turn(x, cos, sin, BS: tl.constexpr, BD: tl.constexpr, ROPE: tl.constexpr):
    """Rotate fp32 `[BS, BD]`; by minus sin for gradients."""
    if ROPE == "none":
        return x
    a, b = _pairs(x, BS, BD, ROPE)
    return _unpair(a * cos - b * sin, b * cos + a * sin, BS, BD, ROPE)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def _column(x):
    """A vector as the first of 16 columns: sums cost least as one more product."""
    return tl.where((tl.arange(0, 16) == 0)[None, :], x.to(tl.float32)[:, None], 0.0)


@triton.jit
def _row_sum(x, weights, dtype: tl.constexpr):
    """The weighted sum of rows as a column. In fp32 a product would be one chain of additions over all tokens, whose
    roundings add up where every term is positive."""
    if dtype == tl.float32:
        out = _column(tl.sum(x * weights[:, None], 0))
    else:
        out = _dot(tl.trans(x.to(dtype)), _column(weights).to(dtype))
    return out


@triton.jit
def _from_column(x):
    return tl.sum(tl.where((tl.arange(0, 16) == 0)[None, :], x, 0.0), 1)


@triton.jit
def _epilogue(t, eps, NORMALIZE: tl.constexpr):
    """Factors of the numerator and of mean(v), from t = phi(q) . mean(phi(k))."""
    if NORMALIZE == "divide":
        alpha, beta = _inverse(t + eps), t * 0.0
    elif NORMALIZE == "inline":
        alpha, beta = t * 0.0 + 1.0, 1.0 - t
    elif NORMALIZE == "mala":
        alpha, beta = 1.0 + _inverse(t + eps), -t
    else:
        alpha, beta = t * 0.0 + 1.0, t * 0.0
    return alpha, beta


@triton.jit
def _epilogue_backward(alpha, dalpha, dbeta, NORMALIZE: tl.constexpr):
    """The gradient of t from those of both factors."""
    if NORMALIZE == "divide":
        dt = -dalpha * alpha * alpha
    elif NORMALIZE == "mala":
        dt = -dalpha * (alpha - 1.0) * (alpha - 1.0) - dbeta
    elif NORMALIZE == "inline":
        dt = -dbeta
    else:
        dt = dalpha * 0.0
    return dt


@triton.jit
def _store_record(R, state, ksum, vsum, tile, D: tl.constexpr, BD: tl.constexpr, vcols):
    cols = tl.arange(0, BD)
    tl.store(R + cols[:, None] * D + vcols[None, :], state, mask=(cols < D)[:, None] & (vcols < D)[None, :])
    if tile == 0:
        tl.store(R + D * D + cols, _from_column(ksum), mask=cols < D)
    tl.store(R + (D + 1) * D + vcols, vsum, mask=vcols < D)


@triton.jit
def state_kernel(
    K, V, W, COUNT, COS, SIN, OUT, MEANS, tokens, chunk, heads,
    kb, ks, kh, vb, vs, vh, wb, ws, wh, wp, cb, cs, ch,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
    ALIGN: tl.constexpr, PHI: tl.constexpr, ROPE: tl.constexpr, PLANES: tl.constexpr, AFFINE: tl.constexpr,
    BLOCK_MEANS: tl.constexpr,
):  # fmt: skip
    """A partial record of `chunk` keys and values: grid (chunks, B * heads, tiles of v's channels).

    `W` weights phi(k) in all sums where it has one plane, and the means are over `COUNT` keys. The three planes that
    `query_backward_kernel` leaves weight phi, then the sum of phi besides, and the sum of v; there the sums stay sums.
    BLOCK_MEANS, for 16-bit inputs: the means of every BS keys themselves, in `MEANS` `[B * heads, blocks, D]`.
    """
    part, bh, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows, cols, vcols = tl.arange(0, BS), tl.arange(0, BD), tile * BV + tl.arange(0, BV)
    kb, ks, kh = _aligned(kb, ALIGN), _aligned(ks, ALIGN), _aligned(kh, ALIGN)
    vb, vs, vh = _aligned(vb, ALIGN), _aligned(vs, ALIGN), _aligned(vh, ALIGN)
    K += b * kb + h * kh
    V += b * vb + h * vh
    COS += b * cb + h * ch
    SIN += b * cb + h * ch
    state = tl.zeros((BD, BV), tl.float32)
    ksum = tl.zeros((BD, 16), tl.float32)
    vsum = tl.zeros((BV,), tl.float32)
    first = part * chunk
    for i in tl.range(0, tl.cdiv(tl.minimum(chunk, tokens - first), BS), num_stages=STAGES):
        start = first + i * BS
        at, left = start.to(tl.int64), tokens - start
        k = _load(K, at, ks, rows, cols, left, D, True)
        v = _load(V, at, vs, rows, vcols, left, D, True)
        phi = _features(k, cols, D, PHI)
        w = tl.where(rows < left, 1.0, 0.0)
        once = w
        if BLOCK_MEANS:
            mean = _from_column(_dot(tl.trans(k), _column(w).to(k.dtype))) / tl.minimum(BS, left)
            place = MEANS + (bh.to(tl.int64) * tl.cdiv(tokens, BS) + start // BS) * D + cols
            tl.store(place, mean, mask=(cols < D) & (tile == 0))
        if PLANES > 0:
            place = W + b * wb + h * wh + (at + rows) * ws
            w = tl.load(place, mask=rows < left, other=0.0).to(tl.float32)
            phi = phi * w[:, None]
        if PLANES == 3:
            once = tl.load(place + wp, mask=rows < left, other=0.0)
            if AFFINE:
                w = tl.load(place + 2 * wp, mask=rows < left, other=0.0)
        if AFFINE:
            vsum += tl.sum(v.to(tl.float32) * w[:, None], 0)
        cos, sin = _angles(COS, SIN, cs, start, tokens, D, BS, BD, ROPE)
        turned = _turn(phi, cos, sin, BS, BD, ROPE)
        ksum += _row_sum(phi, once, v.dtype)
        state += _dot(tl.trans(turned.to(v.dtype)), v)
    if PLANES == 0:
        mean = 1.0 / tokens
    elif PLANES == 1:
        mean = 1.0 / tl.load(COUNT + b)
    else:
        mean = 1.0
    OUT += (bh.to(tl.int64) * tl.num_programs(0) + part) * ((D + 2) * D)
    _store_record(OUT, state * mean, ksum * mean, vsum * mean, tile, D, BD, vcols)


@triton.jit
def _record(R, parts, D: tl.constexpr, BD: tl.constexpr, vcols):
    """State tile and row of means out of a head's partial records."""
    cols = tl.arange(0, BD)
    ok = (cols < D)[:, None] & (vcols < D)[None, :]
    state = tl.load(R + cols[:, None] * D + vcols[None, :], mask=ok, other=0.0)
    kmean = tl.load(R + D * D + cols, mask=cols < D, other=0.0)
    for part in range(1, parts):
        more = R + part * ((D + 2) * D)
        state += tl.load(more + cols[:, None] * D + vcols[None, :], mask=ok, other=0.0)
        kmean += tl.load(more + D * D + cols, mask=cols < D, other=0.0)
    return state, kmean


@triton.jit
def _mean_row(R, parts, D: tl.constexpr, cols):
    """The last row: mean(v), or its gradient."""
    row = tl.load(R + (D + 1) * D + cols, mask=cols < D, other=0.0)
    for part in range(1, parts):
        row += tl.load(R + part * ((D + 2) * D) + (D + 1) * D + cols, mask=cols < D, other=0.0)
    return row


@triton.jit
def output_kernel(
    Q, R, COS, SIN, OUT, tokens, chunk, heads, group, parts, eps, scale,
    qb, qs, qh, ob, os, oh, cb, cs, ch,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
    ALIGN: tl.constexpr, PHI: tl.constexpr, ROPE: tl.constexpr, NORMALIZE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """`chunk` queries read their head's record: grid (chunks, B * heads, tiles of v's channels)."""
    part, bh, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows, cols, vcols = tl.arange(0, BS), tl.arange(0, BD), tile * BV + tl.arange(0, BV)
    qb, qs, qh = _aligned(qb, ALIGN), _aligned(qs, ALIGN), _aligned(qh, ALIGN)
    ob, os, oh = _aligned(ob, ALIGN), _aligned(os, ALIGN), _aligned(oh, ALIGN)
    Q += b * qb + h * qh
    OUT += b * ob + h * oh
    COS += b * cb + h * ch
    SIN += b * cb + h * ch
    R += (bh // group).to(tl.int64) * parts * ((D + 2) * D)
    state, kmean = _record(R, parts, D, BD, vcols)
    if SCALED:
        state, kmean = state * scale, kmean * scale
    state = state.to(Q.dtype.element_ty)
    if NORMALIZE == "inline" or NORMALIZE == "mala":
        vmean = _mean_row(R, parts, D, vcols)
    first = part * chunk
    for i in tl.range(0, tl.cdiv(tl.minimum(chunk, tokens - first), BS), num_stages=STAGES):
        start = first + i * BS
        at, left = start.to(tl.int64), tokens - start
        q = _load(Q, at, qs, rows, cols, left, D, False)
        phi = _features(q, cols, D, PHI)
        alpha, beta = _epilogue(tl.sum(phi * kmean[None, :], 1), eps, NORMALIZE)
        cos, sin = _angles(COS, SIN, cs, start, tokens, D, BS, BD, ROPE)
        turned = _turn(phi, cos, sin, BS, BD, ROPE)
        out = _dot(turned.to(q.dtype), state) * alpha[:, None]
        if NORMALIZE == "inline" or NORMALIZE == "mala":
            out += beta[:, None] * vmean[None, :]
        there = (rows < left)[:, None] & (vcols < D)[None, :]
        tl.store(OUT + at * os + (rows[:, None] * os + vcols[None, :]), out.to(q.dtype), mask=there)


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def query_backward_kernel(
    Q, G, R, COS, SIN, DQ, OUT, tokens, chunk, heads, group, eps, scale, wp,
    qb, qs, qh, gb, gs, gh, cb, cs, ch,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
    ALIGN: tl.constexpr, PHI: tl.constexpr, ROPE: tl.constexpr, NORMALIZE: tl.constexpr, SCALED: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, contiguous `[B, S, H, D]`: grid (chunks, B * heads).

    If WHOLE, `OUT` takes the record's gradient from each chunk, as in `state_kernel`. Where there are too few registers
    for that, it takes three weights of each query, `[3, B, S, H]`, and `state_kernel` reads q and the gradient again.
    """
    part, bh = tl.program_id(0), tl.program_id(1)
    AFFINE: tl.constexpr = NORMALIZE == "inline" or NORMALIZE == "mala"
    TILES: tl.constexpr = (D + BV - 1) // BV
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows, cols, vcols = tl.arange(0, BS), tl.arange(0, BD), tl.arange(0, BV)
    qb, qs, qh = _aligned(qb, ALIGN), _aligned(qs, ALIGN), _aligned(qh, ALIGN)
    gb, gs, gh = _aligned(gb, ALIGN), _aligned(gs, ALIGN), _aligned(gh, ALIGN)
    Q += b * qb + h * qh
    G += b * gb + h * gh
    COS += b * cb + h * ch
    SIN += b * cb + h * ch
    DQ += (b * tokens * heads + h) * D
    if WHOLE:
        dstate = tl.zeros((BD, BV), tl.float32)
        dksum = tl.zeros((BD, 16), tl.float32)
        dvsum = tl.zeros((BV,), tl.float32)
    else:
        OUT += b * tokens * heads + h
    R += (bh // group).to(tl.int64) * ((D + 2) * D)
    state, kmean = _record(R, 1, D, BD, vcols)
    if SCALED:
        state, kmean = state * scale, kmean * scale
    state = tl.trans(state).to(Q.dtype.element_ty)
    first = part * chunk
    for i in tl.range(0, tl.cdiv(tl.minimum(chunk, tokens - first), BS), num_stages=STAGES):
        start = first + i * BS
        at, left = start.to(tl.int64), tokens - start
        q = _load(Q, at, qs, rows, cols, left, D, False)
        phi = _features(q, cols, D, PHI)
        cos, sin = _angles(COS, SIN, cs, start, tokens, D, BS, BD, ROPE)
        turned = _turn(phi, cos, sin, BS, BD, ROPE)
        dbeta = tl.zeros((BS,), tl.float32)
        if TILES > 1:
            product = tl.zeros((BS, BD), tl.float32)
        for j in tl.static_range(TILES):
            g = _load(G, at, gs, rows, j * BV + vcols, left, D, False)
            if TILES > 1:
                state, _ = _record(R, 1, D, BD, j * BV + vcols)
                if SCALED:
                    state = state * scale
                state = tl.trans(state).to(q.dtype)
                product += _dot(g, state)
            else:
                product = _dot(g, state)
            if AFFINE:
                dbeta += tl.sum(g.to(tl.float32) * _mean_row(R, 1, D, j * BV + vcols)[None, :], 1)
        # both sums in one reduction: then phi is needed in one layout only, that of the product
        t, dalpha = tl.reduce((phi * kmean[None, :], turned * product), 1, _add_both)
        alpha, beta = _epilogue(t, eps, NORMALIZE)
        dt = _epilogue_backward(alpha, dalpha, dbeta, NORMALIZE)
        dphi = _turn(product * alpha[:, None], cos, -sin, BS, BD, ROPE) + dt[:, None] * kmean[None, :]
        there = rows < left
        place = at * heads * D + (rows[:, None] * (heads * D) + cols[None, :])
        dq = _features_backward(dphi, phi, PHI).to(q.dtype)
        tl.store(DQ + place, dq, mask=there[:, None] & (cols < D)[None, :])
        if WHOLE:
            # q once more, out of the cache: kept in registers, phi would take more than there are
            phi = _features(_load(Q, at, qs, rows, cols, left, D, False), cols, D, PHI)
            turned = _turn(phi, cos, sin, BS, BD, ROPE)
            alpha = tl.where(there, alpha, 0.0)
            dstate += _dot(tl.trans((turned * alpha[:, None]).to(q.dtype)), g)
            dksum += _row_sum(phi, tl.where(there, dt, 0.0), q.dtype)
            if AFFINE:
                dvsum += tl.sum(g.to(tl.float32) * tl.where(there, beta, 0.0)[:, None], 0)
        else:
            weights = OUT + (at + rows) * heads
            tl.store(weights, alpha, mask=there)
            tl.store(weights + wp, -dalpha * alpha if NORMALIZE == "divide" else dt / alpha, mask=there)
            if AFFINE:
                tl.store(weights + 2 * wp, beta, mask=there)
    if WHOLE:
        OUT += (bh.to(tl.int64) * tl.num_programs(0) + part) * ((D + 2) * D)
        _store_record(OUT, dstate, dksum, dvsum, 0, D, BD, vcols)


@triton.jit
def key_backward_kernel(
    K, V, W, COUNT, R, COS, SIN, DK, DV, tokens, chunk, heads, parts,
    kb, ks, kh, vb, vs, vh, wb, ws, wh, cb, cs, ch,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
    ALIGN: tl.constexpr, PHI: tl.constexpr, ROPE: tl.constexpr, WEIGHTED: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, contiguous `[B, S, heads, D]`, from the record's: grid (chunks, B * heads)."""
    part, bh = tl.program_id(0), tl.program_id(1)
    TILES: tl.constexpr = (D + BV - 1) // BV
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows, cols = tl.arange(0, BS), tl.arange(0, BD)
    kb, ks, kh = _aligned(kb, ALIGN), _aligned(ks, ALIGN), _aligned(kh, ALIGN)
    vb, vs, vh = _aligned(vb, ALIGN), _aligned(vs, ALIGN), _aligned(vh, ALIGN)
    K += b * kb + h * kh
    V += b * vb + h * vh
    COS += b * cb + h * ch
    SIN += b * cb + h * ch
    DK += (b * tokens * heads + h) * D
    DV += (b * tokens * heads + h) * D
    R += bh.to(tl.int64) * parts * ((D + 2) * D)
    mean = 1.0 / tl.load(COUNT + b) if WEIGHTED else 1.0 / tokens
    state, dkmean = _record(R, parts, D, BD, tl.arange(0, BV))
    dstate = (state * mean).to(K.dtype.element_ty)
    dkmean *= mean
    first = part * chunk
    for i in tl.range(0, tl.cdiv(tl.minimum(chunk, tokens - first), BS), num_stages=STAGES):
        start = first + i * BS
        at, left = start.to(tl.int64), tokens - start
        k = _load(K, at, ks, rows, cols, left, D, False)
        phi = _features(k, cols, D, PHI)
        w = tl.zeros((BS,), tl.float32) + 1.0
        weighted = phi
        if WEIGHTED:
            w = tl.load(W + b * wb + h * wh + (at + rows) * ws, mask=rows < left, other=0.0).to(tl.float32)
            weighted = phi * w[:, None]
        cos, sin = _angles(COS, SIN, cs, start, tokens, D, BS, BD, ROPE)
        turned = _turn(weighted, cos, sin, BS, BD, ROPE).to(k.dtype)
        place = at * heads * D + rows[:, None] * (heads * D)
        if TILES > 1:
            product = tl.zeros((BS, BD), tl.float32)
        for j in tl.static_range(TILES):
            icols = j * BV + tl.arange(0, BV)
            v = _load(V, at, vs, rows, icols, left, D, False)
            if TILES > 1:
                dstate = (_record(R, parts, D, BD, icols)[0] * mean).to(k.dtype)
            dv = _dot(turned, dstate)
            if AFFINE:
                dv += w[:, None] * (mean * _mean_row(R, parts, D, icols))[None, :]
            tl.store(DV + place + icols[None, :], dv.to(k.dtype), mask=(rows < left)[:, None] & (icols < D)[None, :])
            if TILES > 1:
                product += _dot(v, tl.trans(dstate))
            else:
                product = _dot(v, tl.trans(dstate))
        dphi = _turn(product, cos, -sin, BS, BD, ROPE) + dkmean[None, :]
        if WEIGHTED:
            dphi = dphi * w[:, None]
        dk = _features_backward(dphi, phi, PHI)
        tl.store(DK + place + cols[None, :], dk.to(k.dtype), mask=(rows < left)[:, None] & (cols < D)[None, :])
