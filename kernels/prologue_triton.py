"""Triton kernels of the prologue: norm and rotation of queries and keys, and the joining of text and image.

A program takes one token and all its heads, for q, k and v at once, so that q and k share the angles. Norm, rotation
and layout cost one read and one write of each tensor. `bench/NOTES.md` has the arithmetic.
"""

import triton
import triton.language as tl


@triton.jit
def _load(X, D: tl.constexpr, BD: tl.constexpr, ok, PAIRED: tl.constexpr):
    """Both channels of each pair, `[BH, BD / 2]` each in fp32; `X` has a head on each row."""
    heads: tl.constexpr = ok.shape[0]
    pairs = tl.arange(0, BD // 2)
    if PAIRED:  # side by side
        cols = tl.arange(0, BD)
        x = tl.load(X + tl.arange(0, heads)[:, None] * D + cols[None, :], mask=ok & (cols < D)[None, :], other=0.0)
        a, b = tl.split(tl.reshape(x.to(tl.float32), (heads, BD // 2, 2)))
    else:  # half a head apart
        at = X + tl.arange(0, heads)[:, None] * D + pairs[None, :]
        half = ok & (pairs < D // 2)[None, :]
        a = tl.load(at, mask=half, other=0.0).to(tl.float32)
        b = tl.load(at + D // 2, mask=half, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store(X, a, b, D: tl.constexpr, BD: tl.constexpr, ok, PAIRED: tl.constexpr):
    heads: tl.constexpr = ok.shape[0]
    pairs = tl.arange(0, BD // 2)
    if PAIRED:
        cols = tl.arange(0, BD)
        x = tl.reshape(tl.join(a, b), (heads, BD)).to(X.dtype.element_ty)
        tl.store(X + tl.arange(0, heads)[:, None] * D + cols[None, :], x, mask=ok & (cols < D)[None, :])
    else:
        at = X + tl.arange(0, heads)[:, None] * D + pairs[None, :]
        half = ok & (pairs < D // 2)[None, :]
        tl.store(at, a.to(X.dtype.element_ty), mask=half)
        tl.store(at + D // 2, b.to(X.dtype.element_ty), mask=half)


@triton.jit
def _angles(COS, SIN, stride, D: tl.constexpr, BD: tl.constexpr, ok, PAIRED: tl.constexpr, PER_HEAD: tl.constexpr):
    """One angle for each pair, `[1 or BH, BD / 2]`; tables write each twice."""
    heads: tl.constexpr = ok.shape[0] if PER_HEAD else 1
    pairs = tl.arange(0, BD // 2)
    step: tl.constexpr = 2 if PAIRED else 1
    at = tl.arange(0, heads)[:, None] * stride + step * pairs[None, :]
    there = (pairs < D // 2)[None, :]
    if PER_HEAD:
        there = there & ok
    return tl.load(COS + at, mask=there, other=0.0).to(tl.float32), tl.load(SIN + at, mask=there, other=0.0).to(
        tl.float32
    )


@triton.jit
def _norm_weight(W, D: tl.constexpr, BD: tl.constexpr, ok, PAIRED: tl.constexpr, ACROSS: tl.constexpr):
    if ACROSS:
        a, b = _load(W, D, BD, ok, PAIRED)
    else:
        a, b = _load(W, D, BD, tl.full((1, 1), True, tl.int1), PAIRED)
    return a, b


@triton.jit
def _inverse_rms(a, b, heads, eps, D: tl.constexpr, ACROSS: tl.constexpr):
    """1 / root mean square, `[BH, 1]` over a head's channels or `[1, 1]` over those of all heads."""
    squares = tl.sum(a * a + b * b, 1)[:, None]
    if ACROSS:
        squares = tl.sum(squares, 0)[:, None] / heads
    return tl.rsqrt(squares / D + eps)


@triton.jit
def _token(
    X, W, OUT, cos, sin, turns, heads, eps, ok,
    D: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, ACROSS: tl.constexpr,
    ROPE: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """One token of queries or of keys."""
    a, b = _load(X, D, BD, ok, PAIRED)
    if NORM:
        inverse = _inverse_rms(a, b, heads, eps, D, ACROSS)
        a, b = a * inverse, b * inverse
        if WEIGHT:
            wa, wb = _norm_weight(W, D, BD, ok, PAIRED, ACROSS)
            a, b = a * wa, b * wb
    if ROPE:
        c, s = tl.where(turns, cos, 1.0), tl.where(turns, sin, 0.0)
        a, b = a * c - b * s, b * c + a * s
    _store(OUT, a, b, D, BD, ok, PAIRED)


@triton.jit
def prologue_kernel(
    Q, K, V, TQ, TK, TV, QW, KW, TQW, TKW, COS, SIN, OQ, OK, OV,
    image, text, heads, kv_heads, image_at, text_at, turn_first, turn_tokens, eps,
    qb, qs, kb, ks, vb, vs, tqb, tqs, tkb, tks, tvb, tvs, cb, cs, ch,
    D: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr,
    ACROSS: tl.constexpr, ROPE: tl.constexpr, PAIRED: tl.constexpr, PER_HEAD: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Grid (text + image tokens, batch); `*_at` is where each part begins in the joint sequence."""
    token, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ok, kv_ok = (tl.arange(0, BH) < heads)[:, None], (tl.arange(0, BH) < kv_heads)[:, None]
    words = token < text
    place = tl.where(words, text_at + token, image_at + token - text)
    OQ += (b * (text + image) + place) * heads * D
    OK += (b * (text + image) + place) * kv_heads * D
    OV += (b * (text + image) + place) * kv_heads * D
    turns = (place >= turn_first) & (place < turn_first + turn_tokens)
    cos, sin = tl.zeros((1, 1), tl.float32), tl.zeros((1, 1), tl.float32)
    if ROPE:
        # tokens that do not turn read some row that is there, and then ignore it
        angle = b * cb + tl.where(turns, place - turn_first, 0).to(tl.int64) * cs
        cos, sin = _angles(COS + angle, SIN + angle, ch, D, BD, ok, PAIRED, PER_HEAD)
    if words:
        at = token.to(tl.int64)
        x, y = b * tqb + at * tqs, b * tkb + at * tks
        _token(TQ + x, TQW, OQ, cos, sin, turns, heads, eps, ok, D, BD, NORM, WEIGHT, ACROSS, ROPE, PAIRED)
        _token(TK + y, TKW, OK, cos, sin, turns, kv_heads, eps, kv_ok, D, BD, NORM, WEIGHT, ACROSS, ROPE, PAIRED)
        if VALUES:
            _token(
                TV + b * tvb + at * tvs,
                TV,
                OV,
                cos,
                sin,
                turns,
                heads,
                eps,
                kv_ok,
                D,
                BD,
                False,
                False,
                False,
                False,
                True,
            )
    else:
        at = (token - text).to(tl.int64)
        x, y = b * qb + at * qs, b * kb + at * ks
        _token(Q + x, QW, OQ, cos, sin, turns, heads, eps, ok, D, BD, NORM, WEIGHT, ACROSS, ROPE, PAIRED)
        _token(K + y, KW, OK, cos, sin, turns, kv_heads, eps, kv_ok, D, BD, NORM, WEIGHT, ACROSS, ROPE, PAIRED)
        if VALUES:
            _token(
                V + b * vb + at * vs, V, OV, cos, sin, turns, heads, eps, kv_ok, D, BD, False, False, False, False, True
            )


@triton.jit
def _token_backward(
    X, W, G, DX, cos, sin, turns, heads, eps, ok, sum_a, sum_b,
    D: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, ACROSS: tl.constexpr,
    ROPE: tl.constexpr, PAIRED: tl.constexpr, LEARN: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of one token of queries or keys; returns the sums, with the weight's where it will LEARN."""
    ga, gb = _load(G, D, BD, ok, PAIRED)
    if ROPE:
        c, s = tl.where(turns, cos, 1.0), tl.where(turns, sin, 0.0)
        ga, gb = ga * c + gb * s, gb * c - ga * s
    if NORM:
        a, b = _load(X, D, BD, ok, PAIRED)
        inverse = _inverse_rms(a, b, heads, eps, D, ACROSS)
        a, b = a * inverse, b * inverse
        if LEARN:
            sum_a += ga * a
            sum_b += gb * b
        if WEIGHT:
            wa, wb = _norm_weight(W, D, BD, ok, PAIRED, ACROSS)
            ga, gb = ga * wa, gb * wb
        along = tl.sum(ga * a + gb * b, 1)[:, None]
        if ACROSS:
            along = tl.sum(along, 0)[:, None] / heads
        along = along / D
        ga, gb = (ga - a * along) * inverse, (gb - b * along) * inverse
    _store(DX, ga, gb, D, BD, ok, PAIRED)
    return sum_a, sum_b


@triton.jit
def prologue_backward_kernel(
    Q, K, QW, KW, GQ, GK, COS, SIN, DQ, DK, PARTIAL,
    tokens, chunk, heads, kv_heads, at, turn_first, turn_tokens, eps,
    xb, xs, yb, ys, gb, gs, hb, hs, cb, cs, ch,
    D: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr,
    ACROSS: tl.constexpr, ROPE: tl.constexpr, PAIRED: tl.constexpr, PER_HEAD: tl.constexpr, LEARN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Text or image: grid (chunks, batch). `PARTIAL` takes what each chunk adds to the gradients of both weights:
    `[chunks * batch, 2, D]`, or `[chunks * batch, 2, H, D]` where the norm goes across heads."""
    part, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ok, kv_ok = (tl.arange(0, BH) < heads)[:, None], (tl.arange(0, BH) < kv_heads)[:, None]
    qa, qb = tl.zeros((BH, BD // 2), tl.float32), tl.zeros((BH, BD // 2), tl.float32)
    ka, kb = tl.zeros((BH, BD // 2), tl.float32), tl.zeros((BH, BD // 2), tl.float32)
    first = part * chunk
    for i in tl.range(0, tl.minimum(chunk, tokens - first), num_stages=STAGES):
        token = first + i
        place = at + token
        turns = (place >= turn_first) & (place < turn_first + turn_tokens)
        cos, sin = tl.zeros((1, 1), tl.float32), tl.zeros((1, 1), tl.float32)
        if ROPE:
            angle = b * cb + tl.where(turns, place - turn_first, 0).to(tl.int64) * cs
            cos, sin = _angles(COS + angle, SIN + angle, ch, D, BD, ok, PAIRED, PER_HEAD)
        here, joint = token.to(tl.int64), place.to(tl.int64)
        qa, qb = _token_backward(
            Q + b * xb + here * xs, QW, GQ + b * gb + joint * gs, DQ + (b * tokens + token) * heads * D,
            cos, sin, turns, heads, eps, ok, qa, qb, D, BD, NORM, WEIGHT, ACROSS, ROPE, PAIRED, LEARN,
        )  # fmt: skip
        ka, kb = _token_backward(
            K + b * yb + here * ys, KW, GK + b * hb + joint * hs, DK + (b * tokens + token) * kv_heads * D,
            cos, sin, turns, kv_heads, eps, kv_ok, ka, kb, D, BD, NORM, WEIGHT, ACROSS, ROPE, PAIRED, LEARN,
        )  # fmt: skip
    if LEARN:
        record = b * tl.num_programs(0) + part
        if ACROSS:
            PARTIAL += record * 2 * heads * D
            _store(PARTIAL, qa, qb, D, BD, ok, PAIRED)
            _store(PARTIAL + heads * D, ka, kb, D, BD, kv_ok, PAIRED)
        else:  # rows past the last head hold zeros
            PARTIAL += record * 2 * D
            one = tl.full((1, 1), 1, tl.int1)
            _store(PARTIAL, tl.sum(qa, 0, keep_dims=True), tl.sum(qb, 0, keep_dims=True), D, BD, one, PAIRED)
            _store(PARTIAL + D, tl.sum(ka, 0, keep_dims=True), tl.sum(kb, 0, keep_dims=True), D, BD, one, PAIRED)
