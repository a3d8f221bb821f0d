"""Triton kernels of agent attention: softmax over the tokens for every agent, and over the agents for every token.

Forward, agents gather from the keys (split along the sequence, merged by log-sum-exp) and queries read the agents.
Backward, both sides have one form. Tokens x meet agents a in `s = scale (x a^T + w t^T)`, w t^T the bias in two
factors; `p = exp(s - lse)` is computed again, and with `dp = y c^T` its gradient is `ds = p (dp - delta)`:

    side      x, y             c      lse and delta of    gradients of x, y          of a, c, t
    queries   q, out's grad    va     every token         scale ds a, -              scale ds^T x, p^T y, ds^T w
    keys      k, v             dva    every agent         scale ds a, p c            scale ds^T x, -,     ds^T w

va being what the agents gathered. Where all agents fit a tile one pass makes all of them; of more agents a pass over
tokens makes the first and one over agents the second. Logarithms are in base 2. `bench/NOTES.md` has the arithmetic.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from .linear_triton import _aligned, _exp2, _load

LOG2E = tl.constexpr(1.4426950408889634)
# what follows from a sequence's length: no kernel is compiled again for another one
LENGTHS = ("tokens", "chunk", "parts", "slot", "slots")


@triton.jit
def _dot(a, b, c):
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def _product(a, b):
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def _scores(x, y, w, t, R: tl.constexpr):
    """`x y^T`, plus `w t^T` where there is a bias."""
    s = _product(x, y)
    if R > 0:
        s = _dot(w, tl.trans(t), s)
    return s


@triton.jit
def _weights(W, at, rows, left, x, R: tl.constexpr, ZEROS: tl.constexpr):
    """The bias's factor of the tokens, contiguous; x stands in for none."""
    if R > 0:
        return _load(W, at, R, rows, tl.arange(0, R), left, R, ZEROS).to(x.dtype)
    else:
        return x


@triton.jit
def _table(T, agents, count, a, scale, R: tl.constexpr):
    """That of the agents, over the scale by which all is multiplied afterwards."""
    if R > 0:
        return (_load(T, 0, R, agents, tl.arange(0, R), count, R, False).to(tl.float32) / scale).to(a.dtype)
    else:
        return a


@triton.jit
def _rows(P, at, rows, left, D: tl.constexpr, cols):
    """Where contiguous rows of D are stored, and the mask."""
    return P + at * D + (rows[:, None] * D + cols[None, :]), (rows < left)[:, None] & (cols < D)[None, :]


@triton.jit(do_not_specialize=LENGTHS)
def gather_kernel(
    A, K, V, T, W, OUT, LSE, count, tokens, chunk, heads, group, parts, scale,
    ab, an, ah, kb, ks, kh, vb, vs, vh, th,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, R: tl.constexpr,
    STAGES: tl.constexpr, ALIGN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """BN agents gather from `chunk` keys: grid (parts * tiles, B * H). Tiles of a chunk are neighbours, so that one
    reads from memory and the others from the cache."""
    tiles = tl.cdiv(count, BN)
    part, tile, bh = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows, cols, agents = tl.arange(0, BS), tl.arange(0, BD), tile * BN + tl.arange(0, BN)
    kb, ks, kh = _aligned(kb, ALIGN), _aligned(ks, ALIGN), _aligned(kh, ALIGN)
    vb, vs, vh = _aligned(vb, ALIGN), _aligned(vs, ALIGN), _aligned(vh, ALIGN)
    K += b * kb + (h // group) * kh
    V += b * vb + (h // group) * vh
    a = _load(A + b * ab + h * ah, 0, an, agents, cols, count, D, False)
    t = _table(T + h * th, agents, count, a, scale, R)
    top = tl.full((BN,), float("-inf"), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    out = tl.zeros((BN, BD), tl.float32)
    first = part * chunk
    for i in tl.range(0, tl.cdiv(tl.minimum(chunk, tokens - first), BS), num_stages=STAGES):
        start = first + i * BS
        at, left = start.to(tl.int64), tokens - start
        k = _load(K, at, ks, rows, cols, left, D, False)
        w = _weights(W, at, rows, left, k, R, False)
        s = _scores(a, k, t, w, R) * (scale * LOG2E)
        if not EVEN:
            s = tl.where((rows < left)[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = _exp2(s - higher[:, None])
        shrink = _exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        v = _load(V, at, vs, rows, cols, left, D, False)
        out = _dot(p.to(v.dtype), v, out * shrink[:, None])
        top = higher
    record = (bh.to(tl.int64) * parts + part) * count
    place, there = _rows(OUT, record, agents, count, D, cols)
    tl.store(place, (out / total[:, None]).to(OUT.dtype.element_ty), mask=there)
    tl.store(LSE + record + agents, top + tl.log2(total), mask=agents < count)


@triton.jit(do_not_specialize=LENGTHS)
def merge_kernel(
    PARTS, LSES, OUT, LSE, count, parts,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What agents gathered from all chunks, weighted by the mass of each: grid (tiles, B * H)."""
    bh = tl.program_id(1).to(tl.int64)
    cols, agents = tl.arange(0, BD), tl.program_id(0) * BN + tl.arange(0, BN)
    top = tl.full((BN,), float("-inf"), tl.float32)
    for part in range(parts):
        top = tl.maximum(top, tl.load(LSES + (bh * parts + part) * count + agents, mask=agents < count, other=0.0))
    total = tl.zeros((BN,), tl.float32)
    out = tl.zeros((BN, BD), tl.float32)
    for part in range(parts):
        record = (bh * parts + part) * count
        mass = _exp2(tl.load(LSES + record + agents, mask=agents < count, other=0.0) - top)
        place, there = _rows(PARTS, record, agents, count, D, cols)
        total += mass
        out += mass[:, None] * tl.load(place, mask=there, other=0.0)
    place, there = _rows(OUT, bh * count, agents, count, D, cols)
    tl.store(place, (out / total[:, None]).to(OUT.dtype.element_ty), mask=there)
    tl.store(LSE + bh * count + agents, top + tl.log2(total), mask=agents < count)


@triton.jit
def _read_store(
    out, lse, v_shortcut, OUT, LSE, V, at, vs, rows, cols, left, heads, D: tl.constexpr, LSES: tl.constexpr,
    SHORTCUT: tl.constexpr,
):  # fmt: skip
    """One block of outputs `[B, S, H, D]`, the shortcut added before they are rounded."""
    if SHORTCUT:
        out += v_shortcut * _load(V, at, vs, rows, cols, left, D, False).to(tl.float32)
    place = OUT + at * heads * D + (rows[:, None] * (heads * D) + cols[None, :])
    tl.store(place, out.to(OUT.dtype.element_ty), mask=(rows < left)[:, None] & (cols < D)[None, :])
    if LSES:
        tl.store(LSE + at + rows, lse, mask=rows < left)


@triton.jit(do_not_specialize=LENGTHS)
def read_kernel(
    Q, A, C, T, W, V, OUT, LSE, count, tokens, chunk, heads, group, scale, shortcut,
    qb, qs, qh, ab, an, ah, vb, vs, vh, th,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, R: tl.constexpr,
    STAGES: tl.constexpr, ALIGN: tl.constexpr, ONE: tl.constexpr, FULL: tl.constexpr, LSES: tl.constexpr,
    SHORTCUT: tl.constexpr,
):  # fmt: skip
    """`chunk` queries read the agents: grid (chunks, B * H). If ONE tile holds the agents, they stay where they are
    while queries pass by; else all tiles pass by one block of queries. FULL tiles need no mask."""
    part, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows, cols, agents = tl.arange(0, BS), tl.arange(0, BD), tl.arange(0, BN)
    qb, qs, qh = _aligned(qb, ALIGN), _aligned(qs, ALIGN), _aligned(qh, ALIGN)
    ab, an, ah = _aligned(ab, ALIGN), _aligned(an, ALIGN), _aligned(ah, ALIGN)
    vb, vs, vh = _aligned(vb, ALIGN), _aligned(vs, ALIGN), _aligned(vh, ALIGN)
    Q += b * qb + h * qh
    A += b * ab + h * ah
    V += b * vb + (h // group) * vh
    C += bh.to(tl.int64) * (count * D)
    T += h * th
    OUT += (b * tokens * heads + h) * D
    LSE += bh.to(tl.int64) * tokens
    first = part * chunk
    if ONE:
        a = _load(A, 0, an, agents, cols, count, D, False)
        c = _load(C, 0, D, agents, cols, count, D, False)
        t = _table(T, agents, count, a, scale, R)
        for i in tl.range(0, tl.cdiv(tl.minimum(chunk, tokens - first), BS), num_stages=STAGES):
            start = first + i * BS
            at, left = start.to(tl.int64), tokens - start
            q = _load(Q, at, qs, rows, cols, left, D, False)
            w = _weights(W, at, rows, left, q, R, False)
            s = _scores(q, a, w, t, R) * (scale * LOG2E)
            if not FULL:
                s = tl.where((agents < count)[None, :], s, float("-inf"))
            top = tl.max(s, 1)
            p = _exp2(s - top[:, None])
            total = tl.sum(p, 1)
            out = tl.dot(p.to(c.dtype), c, input_precision="ieee") / total[:, None]
            _read_store(
                out, top + tl.log2(total), shortcut, OUT, LSE, V, at, vs, rows, cols, left, heads, D, LSES, SHORTCUT
            )
    else:
        at, left = first.to(tl.int64), tokens - first
        q = _load(Q, at, qs, rows, cols, left, D, False)
        w = _weights(W, at, rows, left, q, R, False)
        top = tl.full((BS,), float("-inf"), tl.float32)
        total = tl.zeros((BS,), tl.float32)
        out = tl.zeros((BS, BD), tl.float32)
        for j in tl.range(0, count, BN, num_stages=STAGES):
            a = _load(A, 0, an, j + agents, cols, count, D, False)
            t = _table(T, j + agents, count, a, scale, R)
            s = _scores(q, a, w, t, R) * (scale * LOG2E)
            if not FULL:
                s = tl.where((j + agents < count)[None, :], s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            p = _exp2(s - higher[:, None])
            shrink = _exp2(top - higher)
            total = total * shrink + tl.sum(p, 1)
            c = _load(C, 0, D, j + agents, cols, count, D, False)
            out = _dot(p.to(c.dtype), c, out * shrink[:, None])
            top = higher
        out = out / total[:, None]
        _read_store(
            out, top + tl.log2(total), shortcut, OUT, LSE, V, at, vs, rows, cols, left, heads, D, LSES, SHORTCUT
        )


@triton.jit(do_not_specialize=LENGTHS)
def whole_backward_kernel(
    X, Y, A, C, T, W, LSE, DELTA, DX, DY, DA, DC, DT, count, tokens, chunk, heads, group, slot, slots, scale,
    xb, xs, xh, yb, ys, yh, ab, an, ah, th,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, R: tl.constexpr,
    STAGES: tl.constexpr, ALIGN: tl.constexpr, FULL: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """All gradients of one side from `chunk` tokens, the agents in one tile: grid (chunks, B * H).

    Those of the tokens are whole, `[B, S, H, D]`; those of a are summed over the chunk, one of `slots` from `slot` on.
    Queries need neither LSE nor DELTA: all their weights are at hand.
    """
    part, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows, cols, agents = tl.arange(0, BS), tl.arange(0, BD), tl.arange(0, BN)
    xb, xs, xh = _aligned(xb, ALIGN), _aligned(xs, ALIGN), _aligned(xh, ALIGN)
    yb, ys, yh = _aligned(yb, ALIGN), _aligned(ys, ALIGN), _aligned(yh, ALIGN)
    X += b * xb + (h // group) * xh
    Y += b * yb + (h // group) * yh
    DX += (b * tokens * heads + h) * D
    DY += (b * tokens * heads + h) * D
    bh = bh.to(tl.int64)
    a = _load(A + b * ab + h * ah, 0, an, agents, cols, count, D, False)
    c = _load(C + bh * (count * D), 0, D, agents, cols, count, D, False)
    t = _table(T + h * th, agents, count, a, scale, R)
    if KEYS:  # an infinite lse leaves no weight to agents that pad the tile
        lse = tl.load(LSE + bh * count + agents, mask=agents < count, other=float("inf"))[None, :]
        delta = tl.load(DELTA + bh * count + agents, mask=agents < count, other=0.0)[None, :]
    da = tl.zeros((BN, BD), tl.float32)
    if not KEYS:
        dc = tl.zeros((BN, BD), tl.float32)
    if R > 0:
        dt = tl.zeros((BN, R), tl.float32)
    first = part * chunk
    for i in tl.range(0, tl.cdiv(tl.minimum(chunk, tokens - first), BS), num_stages=STAGES):
        start = first + i * BS
        at, left = start.to(tl.int64), tokens - start
        x = _load(X, at, xs, rows, cols, left, D, True)
        y = _load(Y, at, ys, rows, cols, left, D, True)
        w = _weights(W, at, rows, left, x, R, True)
        place = rows[:, None] * (heads * D) + cols[None, :]
        there = (rows < left)[:, None] & (cols < D)[None, :]
        s = _scores(x, a, w, t, R) * (scale * LOG2E)
        if KEYS:
            p = _exp2(s - lse)
            dy = tl.dot(p.to(x.dtype), c, input_precision="ieee")
            tl.store(DY + at * heads * D + place, dy.to(x.dtype), mask=there)
            dp = _product(y, c)
        else:
            if not FULL:
                s = tl.where((agents < count)[None, :], s, float("-inf"))
            p = _exp2(s - tl.max(s, 1)[:, None])
            p = p * (1.0 / tl.sum(p, 1))[:, None]
            dc = _dot(tl.trans(p.to(x.dtype)), y, dc)
            dp = _product(y, c)
            delta = tl.sum(p * dp, 1)[:, None]
        ds = (p * (dp - delta)).to(x.dtype)
        dx = tl.dot(ds, a, input_precision="ieee") * scale
        tl.store(DX + at * heads * D + place, dx.to(x.dtype), mask=there)
        da = _dot(tl.trans(ds), x, da)
        if R > 0:
            dt = _dot(tl.trans(ds), w, dt)
    place, there = _rows(DA, (bh * slots + slot + part) * count, agents, count, D, cols)
    tl.store(place, da * scale, mask=there)
    record = (bh * tl.num_programs(0) + part) * count
    if not KEYS:
        place, there = _rows(DC, record, agents, count, D, cols)
        tl.store(place, dc, mask=there)
    if R > 0:
        place, there = _rows(DT, record, agents, count, R, tl.arange(0, R))
        tl.store(place, dt, mask=there)


@triton.jit(do_not_specialize=LENGTHS)
def tokens_backward_kernel(
    X, Y, A, C, T, W, LSE, DELTA, OUT, DX, DY, count, tokens, heads, group, scale,
    xb, xs, xh, yb, ys, yh, ab, an, ah, th,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, R: tl.constexpr,
    STAGES: tl.constexpr, ALIGN: tl.constexpr, FULL: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of BS tokens, `[B, S, H, D]`, tiles of agents passing by: grid (blocks, B * H).

    OUT is what forward returned, of which queries make their DELTA, for `agents_backward_kernel` too.
    """
    bh = tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows, cols, agents = tl.arange(0, BS), tl.arange(0, BD), tl.arange(0, BN)
    xb, xs, xh = _aligned(xb, ALIGN), _aligned(xs, ALIGN), _aligned(xh, ALIGN)
    yb, ys, yh = _aligned(yb, ALIGN), _aligned(ys, ALIGN), _aligned(yh, ALIGN)
    ab, an, ah = _aligned(ab, ALIGN), _aligned(an, ALIGN), _aligned(ah, ALIGN)
    start = tl.program_id(0) * BS
    at, left = start.to(tl.int64), tokens - start
    bh = bh.to(tl.int64)
    A += b * ab + h * ah
    C += bh * (count * D)
    T += h * th
    x = _load(X + b * xb + (h // group) * xh, at, xs, rows, cols, left, D, False)
    y = _load(Y + b * yb + (h // group) * yh, at, ys, rows, cols, left, D, False)
    w = _weights(W, at, rows, left, x, R, False)
    place = (b * tokens * heads + h) * D + at * heads * D + (rows[:, None] * (heads * D) + cols[None, :])
    there = (rows < left)[:, None] & (cols < D)[None, :]
    if KEYS:
        LSE += bh * count
        DELTA += bh * count
        dy = tl.zeros((BS, BD), tl.float32)
    else:
        o = tl.load(OUT + place, mask=there, other=0.0)
        lse = tl.load(LSE + bh * tokens + at + rows, mask=rows < left, other=float("inf"))[:, None]
        delta = tl.sum(y.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(DELTA + bh * tokens + at + rows, delta, mask=rows < left)
        delta = delta[:, None]
    dx = tl.zeros((BS, BD), tl.float32)
    for j in tl.range(0, count, BN, num_stages=STAGES):
        a = _load(A, 0, an, j + agents, cols, count, D, False)
        c = _load(C, 0, D, j + agents, cols, count, D, False)
        t = _table(T, j + agents, count, a, scale, R)
        s = _scores(x, a, w, t, R) * (scale * LOG2E)
        if KEYS:
            lse = tl.load(LSE + j + agents, mask=j + agents < count, other=float("inf"))[None, :]
            delta = tl.load(DELTA + j + agents, mask=j + agents < count, other=0.0)[None, :]
        elif not FULL:
            s = tl.where((j + agents < count)[None, :], s, float("-inf"))
        p = _exp2(s - lse)
        ds = p * (_product(y, c) - delta)
        dx = _dot(ds.to(x.dtype), a, dx)
        if KEYS:
            dy = _dot(p.to(x.dtype), c, dy)
    tl.store(DX + place, (dx * scale).to(x.dtype), mask=there)
    if KEYS:
        tl.store(DY + place, dy.to(x.dtype), mask=there)


@triton.jit(do_not_specialize=LENGTHS)
def agents_backward_kernel(
    X, Y, A, C, T, W, LSE, DELTA, DA, DC, DT, count, tokens, chunk, heads, group, slot, slots, parts, scale,
    xb, xs, xh, yb, ys, yh, ab, an, ah, th,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, R: tl.constexpr,
    STAGES: tl.constexpr, ALIGN: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of BN agents summed over `chunk` tokens: grid (parts * tiles, B * H), as in `gather_kernel`."""
    tiles = tl.cdiv(count, BN)
    part, tile, bh = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows, cols, agents = tl.arange(0, BS), tl.arange(0, BD), tile * BN + tl.arange(0, BN)
    xb, xs, xh = _aligned(xb, ALIGN), _aligned(xs, ALIGN), _aligned(xh, ALIGN)
    yb, ys, yh = _aligned(yb, ALIGN), _aligned(ys, ALIGN), _aligned(yh, ALIGN)
    X += b * xb + (h // group) * xh
    Y += b * yb + (h // group) * yh
    bh = bh.to(tl.int64)
    a = _load(A + b * ab + h * ah, 0, an, agents, cols, count, D, False)
    c = _load(C + bh * (count * D), 0, D, agents, cols, count, D, False)
    t = _table(T + h * th, agents, count, a, scale, R)
    if KEYS:
        lse = tl.load(LSE + bh * count + agents, mask=agents < count, other=float("inf"))[:, None]
        delta = tl.load(DELTA + bh * count + agents, mask=agents < count, other=0.0)[:, None]
    else:
        LSE += bh * tokens
        DELTA += bh * tokens
        dc = tl.zeros((BN, BD), tl.float32)
    da = tl.zeros((BN, BD), tl.float32)
    if R > 0:
        dt = tl.zeros((BN, R), tl.float32)
    first = part * chunk
    for i in tl.range(0, tl.cdiv(tl.minimum(chunk, tokens - first), BS), num_stages=STAGES):
        start = first + i * BS
        at, left = start.to(tl.int64), tokens - start
        x = _load(X, at, xs, rows, cols, left, D, True)
        y = _load(Y, at, ys, rows, cols, left, D, True)
        w = _weights(W, at, rows, left, x, R, True)
        s = _scores(a, x, t, w, R) * (scale * LOG2E)
        if not KEYS:
            lse = tl.load(LSE + at + rows, mask=rows < left, other=0.0)[None, :]
            delta = tl.load(DELTA + at + rows, mask=rows < left, other=0.0)[None, :]
        p = _exp2(s - lse)
        ds = (p * (_product(c, y) - delta)).to(x.dtype)
        da = _dot(ds, x, da)
        if not KEYS:
            dc = _dot(p.to(x.dtype), y, dc)
        if R > 0:
            dt = _dot(ds, w, dt)
    place, there = _rows(DA, (bh * slots + slot + part) * count, agents, count, D, cols)
    tl.store(place, da * scale, mask=there)
    record = (bh * parts + part) * count
    if not KEYS:
        place, there = _rows(DC, record, agents, count, D, cols)
        tl.store(place, dc, mask=there)
    if R > 0:
        place, there = _rows(DT, record, agents, count, R, tl.arange(0, R))
        tl.store(place, dt, mask=there)


@triton.jit(do_not_specialize=LENGTHS)
def sum_kernel(
    PARTS, C, OUT, DELTA, count, parts, heads, ob, on, oh,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, DELTAS: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of an agents' gradient in a fixed order; DELTA is its product with C: grid (tiles, B * H)."""
    bh = tl.program_id(1).to(tl.int64)
    cols, agents = tl.arange(0, BD), tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BN, BD), tl.float32)
    for part in range(parts):
        place, there = _rows(PARTS, (bh * parts + part) * count, agents, count, D, cols)
        total += tl.load(place, mask=there, other=0.0)
    total = total.to(OUT.dtype.element_ty)
    if DELTAS:  # of what is stored, rounded: then the weights' gradients add up to zero
        place, there = _rows(C, bh * count, agents, count, D, cols)
        c = tl.load(place, mask=there, other=0.0).to(tl.float32)
        tl.store(DELTA + bh * count + agents, tl.sum(total.to(tl.float32) * c, 1), mask=agents < count)
    to = OUT + (bh // heads) * ob + (bh % heads) * oh + agents[:, None] * on + cols[None, :]
    tl.store(to, total, mask=(agents < count)[:, None] & (cols < D)[None, :])
