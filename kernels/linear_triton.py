"""Triton kernels of linear attention: one pass over keys and values, one over queries; two for the gradients.

What passes between them is one record per key head, `[D + 2, D]` in fp32: the state mean(phi(k)^T v), then the row
mean(phi(k)), then the row mean(v). Programs that share a head leave partial records, which are added in a fixed order.
`bench/NOTES.md` has the arithmetic behind the block sizes.
"""

import triton
import triton.language as tl


@triton.jit
def _features(x, ok, PHI: tl.constexpr):
    """phi of fp32 `[BS, BD]`; zero where not `ok`: what pads a head or a sequence must add nothing."""
    if PHI == "elu1":
        y = tl.where(x > 0, x + 1.0, tl.exp(x))
    elif PHI == "relu":
        y = tl.maximum(x, 0.0)
    elif PHI == "relu_eps":
        y = tl.maximum(x, 0.0) + 1e-6
    elif PHI == "softmax":
        x = tl.where(ok, x, -1e30)
        y = tl.exp(x - tl.max(x, 1)[:, None])
        y = y / tl.sum(y, 1)[:, None]
    else:
        y = x
    return tl.where(ok, y, 0.0)


@triton.jit
def _features_backward(grad, x, y, PHI: tl.constexpr):
    """The gradient of x from that of y = phi(x)."""
    if PHI == "elu1":
        out = grad * tl.where(x > 0, 1.0, y)
    elif PHI == "relu" or PHI == "relu_eps":
        out = tl.where(x > 0, grad, 0.0)
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
    # fp32 by three tf32 products: within rounding of fp32, on the matrix units
    return tl.dot(a, b, input_precision="tf32x3", out_dtype=tl.float32)


@triton.jit
def _epilogue(t, eps, NORMALIZE: tl.constexpr):
    """Factors of the numerator and of mean(v), from t = phi(q) . mean(phi(k))."""
    if NORMALIZE == "divide":
        alpha, beta = 1.0 / (t + eps), t * 0.0
    elif NORMALIZE == "inline":
        alpha, beta = t * 0.0 + 1.0, 1.0 - t
    elif NORMALIZE == "mala":
        alpha, beta = 1.0 + 1.0 / (t + eps), -t
    else:
        alpha, beta = t * 0.0 + 1.0, t * 0.0
    return alpha, beta


@triton.jit
def _epilogue_backward(t, eps, dalpha, dbeta, NORMALIZE: tl.constexpr):
    """The gradient of t from those of both factors."""
    if NORMALIZE == "divide" or NORMALIZE == "mala":
        dt = -dalpha / ((t + eps) * (t + eps))
        if NORMALIZE == "mala":
            dt -= dbeta
    elif NORMALIZE == "inline":
        dt = -dbeta
    else:
        dt = t * 0.0
    return dt


@triton.jit
def state_kernel(
    K, V, W, COUNT, COS, SIN, OUT, tokens, chunk, heads,
    kb, ks, kh, vb, vs, vh, wb, ws, wh, cb, cs, ch,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
    PHI: tl.constexpr, ROPE: tl.constexpr, WEIGHTED: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """A partial record of `chunk` keys and values: grid (chunks, B * heads, tiles of v's channels)."""
    part, bh, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows, cols, vcols = tl.arange(0, BS), tl.arange(0, BD), tile * BV + tl.arange(0, BV)
    K += b * kb + h * kh
    V += b * vb + h * vh
    COS += b * cb + h * ch
    SIN += b * cb + h * ch
    state = tl.zeros((BD, BV), tl.float32)
    ksum = tl.zeros((BD,), tl.float32)
    vsum = tl.zeros((BV,), tl.float32)
    first = part * chunk
    for i in tl.range(0, tl.cdiv(tl.minimum(chunk, tokens - first), BS), num_stages=STAGES):
        start = first + i * BS
        at = start.to(tl.int64)
        there = start + rows < tokens
        ok = there[:, None] & (cols < D)[None, :]
        k = tl.load(K + at * ks + (rows[:, None] * ks + cols[None, :]), mask=ok, other=0.0)
        v = tl.load(
            V + at * vs + (rows[:, None] * vs + vcols[None, :]), mask=there[:, None] & (vcols < D)[None, :], other=0.0
        )
        phi = _features(k.to(tl.float32), ok, PHI)
        if WEIGHTED:
            w = tl.load(W + b * wb + h * wh + (at + rows) * ws, mask=there, other=0.0).to(tl.float32)
            phi = phi * w[:, None]
        ksum += tl.sum(phi, 0)
        if AFFINE:
            if WEIGHTED:
                vsum += tl.sum(v.to(tl.float32) * w[:, None], 0)
            else:
                vsum += tl.sum(v.to(tl.float32), 0)
        cos, sin = _angles(COS, SIN, cs, start, tokens, D, BS, BD, ROPE)
        phi = _turn(phi, cos, sin, BS, BD, ROPE)
        state += _dot(tl.trans(phi.to(v.dtype)), v)
    mean = 1.0 / tl.load(COUNT + b) if WEIGHTED else 1.0 / tokens
    OUT += (bh.to(tl.int64) * tl.num_programs(0) + part) * ((D + 2) * D)
    tl.store(OUT + cols[:, None] * D + vcols[None, :], state * mean, mask=(cols < D)[:, None] & (vcols < D)[None, :])
    if tile == 0:
        tl.store(OUT + D * D + cols, ksum * mean, mask=cols < D)
    tl.store(OUT + (D + 1) * D + vcols, vsum * mean, mask=vcols < D)


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
    PHI: tl.constexpr, ROPE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """`chunk` queries read their head's record: grid (chunks, B * heads, tiles of v's channels)."""
    part, bh, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows, cols, vcols = tl.arange(0, BS), tl.arange(0, BD), tile * BV + tl.arange(0, BV)
    Q += b * qb + h * qh
    OUT += b * ob + h * oh
    COS += b * cb + h * ch
    SIN += b * cb + h * ch
    R += (bh // group).to(tl.int64) * parts * ((D + 2) * D)
    state, kmean = _record(R, parts, D, BD, vcols)
    state = state.to(Q.dtype.element_ty)
    if NORMALIZE == "inline" or NORMALIZE == "mala":
        vmean = _mean_row(R, parts, D, vcols)
    first = part * chunk
    for i in tl.range(0, tl.cdiv(tl.minimum(chunk, tokens - first), BS), num_stages=STAGES):
        start = first + i * BS
        at = start.to(tl.int64)
        there = start + rows < tokens
        ok = there[:, None] & (cols < D)[None, :]
        q = tl.load(Q + at * qs + (rows[:, None] * qs + cols[None, :]), mask=ok, other=0.0)
        phi = _features(q.to(tl.float32), ok, PHI) * scale
        alpha, beta = _epilogue(tl.sum(phi * kmean[None, :], 1), eps, NORMALIZE)
        cos, sin = _angles(COS, SIN, cs, start, tokens, D, BS, BD, ROPE)
        phi = _turn(phi, cos, sin, BS, BD, ROPE)
        out = _dot(phi.to(q.dtype), state) * alpha[:, None]
        if NORMALIZE == "inline" or NORMALIZE == "mala":
            out += beta[:, None] * vmean[None, :]
        tl.store(
            OUT + at * os + (rows[:, None] * os + vcols[None, :]), out.to(q.dtype),
            mask=there[:, None] & (vcols < D)[None, :],
        )  # fmt: skip


@triton.jit
def query_backward_kernel(
    Q, G, R, COS, SIN, DQ, OUT, tokens, chunk, heads, group, eps, scale,
    qb, qs, qh, gb, gs, gh, cb, cs, ch,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
    PHI: tl.constexpr, ROPE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, and a partial record of the record's: grid (chunks, B * heads, tiles).

    Every tile needs the product over all of v's channels; the first one writes `DQ`, contiguous `[B, S, H, D]`.
    """
    part, bh, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    AFFINE: tl.constexpr = NORMALIZE == "inline" or NORMALIZE == "mala"
    TILES: tl.constexpr = (D + BV - 1) // BV
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows, cols, vcols = tl.arange(0, BS), tl.arange(0, BD), tile * BV + tl.arange(0, BV)
    Q += b * qb + h * qh
    G += b * gb + h * gh
    COS += b * cb + h * ch
    SIN += b * cb + h * ch
    DQ += (b * tokens * heads + h) * D
    R += (bh // group).to(tl.int64) * ((D + 2) * D)
    whole, kmean = _record(R, 1, D, BD, tl.arange(0, BV))
    whole = tl.trans(whole).to(Q.dtype.element_ty)
    dstate = tl.zeros((BD, BV), tl.float32)
    dkmean = tl.zeros((BD,), tl.float32)
    dvmean = tl.zeros((BV,), tl.float32)
    first = part * chunk
    for i in tl.range(0, tl.cdiv(tl.minimum(chunk, tokens - first), BS), num_stages=STAGES):
        start = first + i * BS
        at = start.to(tl.int64)
        there = start + rows < tokens
        ok = there[:, None] & (cols < D)[None, :]
        q = tl.load(Q + at * qs + (rows[:, None] * qs + cols[None, :]), mask=ok, other=0.0)
        x = q.to(tl.float32)
        phi = _features(x, ok, PHI)
        t = tl.sum(phi * kmean[None, :], 1) * scale
        alpha, beta = _epilogue(t, eps, NORMALIZE)
        cos, sin = _angles(COS, SIN, cs, start, tokens, D, BS, BD, ROPE)
        turned = _turn(phi * scale, cos, sin, BS, BD, ROPE)
        product = tl.zeros((BS, BD), tl.float32)
        dbeta = tl.zeros((BS,), tl.float32)
        for j in tl.static_range(TILES):
            icols = j * BV + tl.arange(0, BV)
            g = tl.load(
                G + at * gs + (rows[:, None] * gs + icols[None, :]), mask=there[:, None] & (icols < D)[None, :],
                other=0.0,
            )  # fmt: skip
            if TILES > 1:
                whole = tl.trans(_record(R, 1, D, BD, icols)[0]).to(q.dtype)
            product += _dot(g, whole)
            if AFFINE:
                dbeta += tl.sum(g.to(tl.float32) * _mean_row(R, 1, D, icols)[None, :], 1)
        dt = _epilogue_backward(t, eps, tl.sum(turned * product, 1), dbeta, NORMALIZE)
        dphi = _turn(product * alpha[:, None], cos, -sin, BS, BD, ROPE) + dt[:, None] * kmean[None, :]
        if tile == 0:
            dq = _features_backward(dphi * scale, x, phi, PHI)
            place = at * heads * D + (rows[:, None] * (heads * D) + cols[None, :])
            tl.store(DQ + place, dq.to(q.dtype), mask=ok)
        if TILES > 1:
            g = tl.load(
                G + at * gs + (rows[:, None] * gs + vcols[None, :]), mask=there[:, None] & (vcols < D)[None, :],
                other=0.0,
            )  # fmt: skip
        wide = g.to(tl.float32)
        dstate += _dot(tl.trans(turned.to(q.dtype)), (wide * alpha[:, None]).to(q.dtype))
        dkmean += tl.sum(phi * (dt * scale)[:, None], 0)
        if AFFINE:
            dvmean += tl.sum(wide * beta[:, None], 0)
    OUT += (bh.to(tl.int64) * tl.num_programs(0) + part) * ((D + 2) * D)
    tl.store(OUT + cols[:, None] * D + vcols[None, :], dstate, mask=(cols < D)[:, None] & (vcols < D)[None, :])
    if tile == 0:
        tl.store(OUT + D * D + cols, dkmean, mask=cols < D)
    tl.store(OUT + (D + 1) * D + vcols, dvmean, mask=vcols < D)


@triton.jit
def key_backward_kernel(
    K, V, W, COUNT, R, COS, SIN, DK, DV, tokens, chunk, heads, parts,
    kb, ks, kh, vb, vs, vh, wb, ws, wh, cb, cs, ch,
    D: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
    PHI: tl.constexpr, ROPE: tl.constexpr, WEIGHTED: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, contiguous `[B, S, heads, D]`, from the record's: grid (chunks, B * heads)."""
    part, bh = tl.program_id(0), tl.program_id(1)
    TILES: tl.constexpr = (D + BV - 1) // BV
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows, cols = tl.arange(0, BS), tl.arange(0, BD)
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
    first = part * chunk
    for i in tl.range(0, tl.cdiv(tl.minimum(chunk, tokens - first), BS), num_stages=STAGES):
        start = first + i * BS
        at = start.to(tl.int64)
        there = start + rows < tokens
        ok = there[:, None] & (cols < D)[None, :]
        k = tl.load(K + at * ks + (rows[:, None] * ks + cols[None, :]), mask=ok, other=0.0)
        x = k.to(tl.float32)
        phi = _features(x, ok, PHI)
        weighted = phi
        if WEIGHTED:
            w = tl.load(W + b * wb + h * wh + (at + rows) * ws, mask=there, other=0.0).to(tl.float32)
            weighted = phi * w[:, None]
        cos, sin = _angles(COS, SIN, cs, start, tokens, D, BS, BD, ROPE)
        turned = _turn(weighted, cos, sin, BS, BD, ROPE).to(k.dtype)
        place = at * heads * D + rows[:, None] * (heads * D)
        product = tl.zeros((BS, BD), tl.float32)
        for j in tl.static_range(TILES):
            icols = j * BV + tl.arange(0, BV)
            iok = there[:, None] & (icols < D)[None, :]
            v = tl.load(V + at * vs + (rows[:, None] * vs + icols[None, :]), mask=iok, other=0.0)
            if TILES > 1:
                dstate = (_record(R, parts, D, BD, icols)[0] * mean).to(k.dtype)
            dv = _dot(turned, dstate)
            if AFFINE:
                share = mean * _mean_row(R, parts, D, icols)[None, :]
                if WEIGHTED:
                    dv += w[:, None] * share
                else:
                    dv += share
            tl.store(DV + place + icols[None, :], dv.to(k.dtype), mask=iok)
            product += _dot(v, tl.trans(dstate))
        dphi = _turn(product, cos, -sin, BS, BD, ROPE) + (dkmean * mean)[None, :]
        if WEIGHTED:
            dphi = dphi * w[:, None]
        dk = _features_backward(dphi, x, phi, PHI)
        tl.store(DK + place + cols[None, :], dk.to(k.dtype), mask=ok)
