"""Triton kernels of attention to listed blocks, with a linear part in the same passes: forward, dq, dk and dv.

    out = softmax over the keys in the query block's list + w STATE + bias,    w = phi(q) z / (phi(q) . z + eps)

where z = mean(phi(k)) and row a of STATE is row a of mean(phi(k)^T v) over z[a], projected: means of v again, so that
both factors keep within fp16's range. Softmax is in powers of 2. Blocked tokens stand in a row, kept ones at one end of
the sequence; list number `blocks` names all key blocks and serves kept queries. `bench/NOTES.md` has the arithmetic.
"""

import triton
import triton.language as tl

from .linear_triton import _add_both, _aligned, _dot, _exp2, _features, _features_backward, _inverse


@triton.jit
def _tile(X, at, stride, rows, cols, left, D: tl.constexpr, MASK: tl.constexpr):
    """Rows `[B, BD]` from token `at` on; with MASK zeros from row `left` on."""
    place = X + at.to(tl.int64) * stride + (rows[:, None] * stride + cols[None, :])
    if MASK:
        x = tl.load(place, mask=(rows < left)[:, None] & (cols < D)[None, :], other=0.0)
    elif tl.constexpr(D) % cols.shape[0] != 0:
        x = tl.load(place, mask=(cols < D)[None, :], other=0.0)
    else:
        x = tl.load(place)
    return x


@triton.jit
def _block(
    X, TILES, b, h, at, stride, rows, cols, left, D: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """`_tile` of sample b and head h, to which X points; by the copy engine, past `left` come the next tokens, if any,
    then zeros."""
    if TMA:
        x = TILES.load([b.to(tl.int32), at, h.to(tl.int32), 0]).reshape(rows.shape[0], cols.shape[0])
    else:
        x = _tile(X, at, stride, rows, cols, left, D, MASK)
    return x


@triton.jit
def _put(X, at, stride, rows, cols, left, value, D: tl.constexpr):
    place = X + at.to(tl.int64) * stride + (rows[:, None] * stride + cols[None, :])
    tl.store(place, value.to(X.dtype.element_ty), mask=(rows < left)[:, None] & (cols < D)[None, :])


@triton.jit
def _matrix(X, D: tl.constexpr, BD: tl.constexpr):
    cols = tl.arange(0, BD)
    ok = (cols < D)[:, None] & (cols < D)[None, :]
    return tl.load(X + cols[:, None] * D + cols[None, :], mask=ok, other=0.0)


@triton.jit
def _program(pid, count, first, kept, kept_at, blocks, pairs, BLOCK: tl.constexpr, B: tl.constexpr, KEPT: tl.constexpr):
    """Which tile a program has, of `count` blocked and `kept` kept tokens: those of kept ones, the longest, come first.

    Returns the (sample, head) pair, the list's number, whether the tokens are blocked, the first one's number among
    its kind and place in the sequence, and how many there are of this block and kind from there on.
    """
    TILES: tl.constexpr = (BLOCK + B - 1) // B
    if KEPT > 0:
        dense = tl.cdiv(kept, B)
        blocked = pid >= dense * pairs
        each = tl.where(blocked, blocks * TILES, dense)
        local = tl.where(blocked, pid - dense * pairs, pid)
        pair, tile = local // each, local % each
        token = tl.where(blocked, tile // TILES * BLOCK + tile % TILES * B, tile * B)
        left = tl.where(blocked, tl.minimum(BLOCK - tile % TILES * B, count - token), kept - token)
        block = tl.where(blocked, tile // TILES, blocks)
        at = token + tl.where(blocked, first, kept_at)
    else:
        blocked = True
        pair, tile = pid // (blocks * TILES), pid % (blocks * TILES)
        block = tile // TILES
        token = block * BLOCK + tile % TILES * B
        left = tl.minimum(BLOCK - tile % TILES * B, count - token)
        at = first + token
    return pair, block, blocked, token, at, left


@triton.jit
def _listed(INDEX, i, BLOCK: tl.constexpr, B: tl.constexpr):
    """Step `i` through a list's blocks in tiles of `B`: block, and the tile's first token within the block."""
    STEPS: tl.constexpr = (BLOCK + B - 1) // B
    if STEPS == 1:
        return tl.load(INDEX + i), 0
    else:
        return tl.load(INDEX + i // STEPS), i % STEPS * B


@triton.jit
def _list(INDEX, START, group, capacity, starts, number):
    """The list's pointer and length."""
    START += group * starts + number
    start = tl.load(START)
    return INDEX + group.to(tl.int64) * capacity + start, tl.load(START + 1) - start


@triton.jit
def _whole(INDEX, count, tokens, last, BLOCK: tl.constexpr, B: tl.constexpr, RAGGED: tl.constexpr):
    """How many of a list's blocks need no mask: all but one that is cut short, which stands last."""
    if BLOCK % B != 0:
        return count * 0
    elif RAGGED:
        return count - (tl.load(INDEX + count - 1, mask=count > 0, other=-1) == last).to(tl.int32)
    else:
        return count


@triton.jit
def _real(REAL, rows, left, MASK: tl.constexpr):
    ok = rows < left
    if MASK > 1:
        ok = ok & (tl.load(REAL + rows, mask=ok, other=0) != 0)
    return ok


@triton.jit
def _forward_step(
    q, K, V, KT, VT, b, h, at, left, REAL, ks, vs, acc, peak, total, scale,
    D: tl.constexpr, BK: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    rows, cols = tl.arange(0, BK), tl.arange(0, q.shape[1])
    k = _block(K, KT, b, h, at, ks, rows, cols, left, D, MASK > 0, TMA)
    v = _block(V, VT, b, h, at, vs, rows, cols, left, D, MASK > 0, TMA)
    s = _dot(q, tl.trans(k))
    if MASK > 0:
        s = tl.where(_real(REAL, rows, left, MASK)[None, :], s, float("-inf"))
    if not FAST:
        higher = tl.maximum(peak, tl.max(s, 1) * scale)
        shrink = _exp2(peak - higher)
        acc, peak, total = acc * shrink[:, None], higher, total * shrink
    p = _exp2(s * scale - peak[:, None])
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, peak, total + tl.sum(p, 1)


@triton.jit
def _behind(
    q, K, V, KT, VT, b, h, index, steps, first, s, ks, vs, acc, peak, total, scale,
    D: tl.constexpr, BK: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Whole tiles of the listed blocks, `s` being the first one's scores: values are summed one tile behind, so that
    the tensor cores do it while the next exponentials are taken."""
    rows, cols = tl.arange(0, BK), tl.arange(0, q.shape[1])
    p = _exp2(s * scale - peak[:, None])
    total = tl.where(steps > 0, tl.sum(p, 1), 0.0)
    place = first + tl.load(index, mask=steps > 0, other=0) * BLOCK_K
    for i in tl.range(1, steps, num_stages=STAGES):
        n, offset = _listed(index, i, BLOCK_K, BK)
        v = _block(V, VT, b, h, place, vs, rows, cols, BK, D, False, TMA)
        place = first + n * BLOCK_K + offset
        k = _block(K, KT, b, h, place, ks, rows, cols, BK, D, False, TMA)
        s = _dot(q, tl.trans(k))
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        p = _exp2(s * scale - peak[:, None])
        total += tl.sum(p, 1)
    if steps > 0:
        v = _block(V, VT, b, h, place, vs, rows, cols, BK, D, False, TMA)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total


@triton.jit
def _attend(
    q, K, V, KT, VT, b, h, index, whole, count, REAL, ks, vs, s, peak, keys, first, kept, kept_at, scale,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, KEPT: tl.constexpr, RAGGED: tl.constexpr, TMA: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Sums of values and of their weights over the listed blocks and the kept keys, and what scores are measured from:
    their highest so far or, if FAST, what `peak` says from the start."""
    STEPS: tl.constexpr = (BLOCK_K + BK - 1) // BK
    acc = tl.zeros((BQ, BD), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    if FAST and BLOCK_K % BK == 0:
        acc, total = _behind(
            q, K, V, KT, VT, b, h, index, whole * STEPS, first, s, ks, vs, acc, peak, total, scale, D, BK, BLOCK_K,
            STAGES, TMA,
        )  # fmt: skip
    if not FAST and BLOCK_K % BK == 0:
        for i in tl.range(0, whole * STEPS, num_stages=STAGES):
            n, offset = _listed(index, i, BLOCK_K, BK)
            place = first + n * BLOCK_K + offset
            acc, peak, total = _forward_step(
                q, K, V, KT, VT, b, h, place, BK, REAL, ks, vs, acc, peak, total, scale, D, BK, 0, TMA, FAST
            )
    if RAGGED:
        for i in tl.range(whole * STEPS, count * STEPS, num_stages=1):
            n, offset = _listed(index, i, BLOCK_K, BK)
            there = tl.minimum(BLOCK_K - offset, keys - n * BLOCK_K - offset)
            place = first + n * BLOCK_K + offset
            acc, peak, total = _forward_step(
                q, K, V, KT, VT, b, h, place, there, REAL, ks, vs, acc, peak, total, scale, D, BK, 1, TMA, FAST
            )
    if KEPT > 0:
        real = REAL + b * kept
        for i in tl.range(0, tl.cdiv(kept, BK), num_stages=STAGES):
            acc, peak, total = _forward_step(
                q, K, V, KT, VT, b, h, kept_at + i * BK, kept - i * BK, real + i * BK, ks, vs, acc, peak, total, scale,
                D, BK, 0 if KEPT == 1 else 2, TMA, FAST,
            )  # fmt: skip
    return acc, peak, total


@triton.jit
def _weights(q, Z, cols, blocked, eps, D: tl.constexpr, PHI: tl.constexpr):
    """Of the rows of the linear part's state: phi(q) z over its sum; 0 for kept queries."""
    w = _features(q, cols, D, PHI) * tl.load(Z + cols, mask=cols < D, other=0.0)[None, :]
    w *= tl.where(blocked, _inverse(tl.sum(w, 1) + eps), 0.0)[:, None]
    return w.to(q.dtype)


@triton.jit
def forward_kernel(
    Q, K, V, OUT, LSE, INDEX, START, REAL, LIN, STATE, Z, BIAS, KT, VT,
    queries, keys, first, kept, kept_at, blocks, pairs, heads, group, capacity, starts, scale, eps,
    qb, qs, qh, kb, ks, kh, vb, vs, vh, ob, os, oh,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr, KEPT: tl.constexpr, RAGGED: tl.constexpr,
    PHI: tl.constexpr, LINEAR: tl.constexpr, PROJECT: tl.constexpr, BIASED: tl.constexpr, PARTS: tl.constexpr,
    TMA: tl.constexpr, MOST: tl.constexpr, EQUAL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`OUT` and log2 of the sums `LSE` `[B, H, S]`: grid (tiles of queries of all heads).

    LINEAR "all" makes the linear part from `STATE` and `Z`; "given" reads it, unprojected, in `LIN`, where `STATE` is
    the projection if PROJECT. PARTS leaves the linear part in `LIN` instead of adding it.
    KEPT: 0 no kept keys, 1 keys that need no mask, 2 some that are not real by `REAL` `[B, kept]` or past the end.
    KT, VT: keys and values as tiles for the copy engine, if TMA. EQUAL: `starts` entries in every list but the last.
    EARLY makes phi(q) before the loop, which takes memory on the chip; else from q, read again behind it.

    What is subtracted from a row's scores is the highest of the first block, which later ones need not wait for. Only
    if others are higher by far (a sum above MOST, a limit of the inputs' dtype) is it all done again, by the highest
    so far.
    """
    pair, block, blocked, token, at, left = _program(
        tl.program_id(0), queries, first, kept, kept_at, blocks, pairs, BLOCK_Q, BQ, KEPT
    )
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    rows, cols = tl.arange(0, BQ), tl.arange(0, BD)
    qb, qs, qh = _aligned(qb, ALIGN), _aligned(qs, ALIGN), _aligned(qh, ALIGN)
    kb, ks, kh = _aligned(kb, ALIGN), _aligned(ks, ALIGN), _aligned(kh, ALIGN)
    vb, vs, vh = _aligned(vb, ALIGN), _aligned(vs, ALIGN), _aligned(vh, ALIGN)
    ob, os, oh = _aligned(ob, ALIGN), _aligned(os, ALIGN), _aligned(oh, ALIGN)
    Q += b * qb + h * qh
    K += b * kb + h // group * kh
    V += b * vb + h // group * vh
    q = _tile(Q, at, qs, rows, cols, left, D, True)
    h_k = h // group
    if EQUAL:  # one wait for memory less
        index = INDEX + pair.to(tl.int64) * capacity + block * starts
        count = tl.where(blocked, starts, tl.cdiv(keys, BLOCK_K))
    else:
        index, count = _list(INDEX, START, pair, capacity, starts, block)
    whole = _whole(index, count, keys, tl.cdiv(keys, BLOCK_K) - 1, BLOCK_K, BK, RAGGED)
    record = (pair // group).to(tl.int64)
    if LINEAR == "all" and EARLY:
        part = _weights(q, Z + record * D, cols, blocked, eps, D, PHI)
    n = tl.load(index, mask=count > 0, other=0) * BLOCK_K
    keyed = tl.arange(0, BK)
    there = tl.minimum(BLOCK_K, keys - n)
    s = tl.zeros((BQ, BK), tl.float32)
    if left > 0:  # always; products that stand in the loop's own block keep their memory until it ends
        s = _dot(q, tl.trans(_block(K, KT, b, h_k, first + n, ks, keyed, cols, there, D, True, TMA)))
    peak = tl.max(tl.where((keyed < there)[None, :], s, float("-inf")), 1) * scale
    acc, peak, total = _attend(
        q, K, V, KT, VT, b, h_k, index, whole, count, REAL, ks, vs, s, peak, keys, first, kept, kept_at, scale,
        D, BD, BQ, BK, BLOCK_K, STAGES, KEPT, RAGGED, TMA, True,
    )  # fmt: skip
    if tl.sum((total >= MOST).to(tl.int32)) > 0:
        acc, peak, total = _attend(
            q, K, V, KT, VT, b, h_k, index, whole, count, REAL, ks, vs, s, peak - float("inf"), keys, first, kept,
            kept_at, scale, D, BD, BQ, BK, BLOCK_K, 1, KEPT, RAGGED, TMA, False,
        )  # fmt: skip
    tokens = queries + kept
    total = tl.where(total > 0, total, 1.0)  # a list may be empty
    lse = peak.to(LSE.dtype.element_ty) + tl.log2(total)
    tl.store(LSE + pair.to(tl.int64) * tokens + at + rows, lse, mask=rows < left)
    acc *= _inverse(total)[:, None]

    LIN += (b * queries * heads + h) * D
    if LINEAR == "all":
        STATE += record * (D * D)
        if not EARLY:
            again = _tile(Q, at, qs, rows, cols, left, D, True)
            part = _weights(again, Z + record * D, cols, blocked, eps, D, PHI)
    if LINEAR == "given":
        part = _tile(LIN, token, heads * D, rows, cols, tl.where(blocked, left, 0), D, True)
    if LINEAR != "none":
        if PARTS:
            sparse, acc = acc, tl.zeros((BQ, BD), tl.float32)
        if LINEAR == "all" or PROJECT:
            acc = tl.dot(part, _matrix(STATE, D, BD), acc, input_precision="ieee")
        else:
            acc += part.to(tl.float32)
        if BIASED:
            bias = tl.load(BIAS + cols, mask=cols < D, other=0.0).to(tl.float32)
            acc += tl.where(blocked, bias, 0.0)[None, :]
        if PARTS:
            _put(LIN, token, heads * D, rows, cols, tl.where(blocked, left, 0), acc, D)
            acc = sparse
    _put(OUT + b * ob + h * oh, at, os, rows, cols, left, acc, D)


@triton.jit
def _query_step(
    q, g, K, V, KT, VT, b, h, at, left, REAL, ks, vs, lse, delta, acc, scale,
    D: tl.constexpr, BK: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    rows, cols = tl.arange(0, BK), tl.arange(0, q.shape[1])
    k = _block(K, KT, b, h, at, ks, rows, cols, left, D, MASK > 0, TMA)
    v = _block(V, VT, b, h, at, vs, rows, cols, left, D, MASK > 0, TMA)
    p = _exp2((_dot(q, tl.trans(k)).to(lse.dtype) * scale - lse[:, None]).to(tl.float32))
    if MASK > 0:
        p = tl.where(_real(REAL, rows, left, MASK)[None, :], p, 0.0)
    ds = p * (_dot(g, tl.trans(v)) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit
def query_backward_kernel(
    Q, K, V, G, GL, OUT, LSE, INDEX, START, REAL, STATE, Z, BIAS, DQ, STATS, PLANES, KT, VT,
    queries, keys, first, kept, kept_at, blocks, pairs, heads, group, capacity, starts, scale, eps, wp,
    qb, qs, qh, kb, ks, kh, vb, vs, vh, gb, gs, gh, lb, ls, lh, ob, os, oh,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr, KEPT: tl.constexpr, RAGGED: tl.constexpr,
    PHI: tl.constexpr, LINEAR: tl.constexpr, BIASED: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, contiguous, and in `STATS` `[B * H, S, 2]` (S made even) `LSE` and delta, what softmax
    takes off its gradients.

    `OUT` is the sum, and what the linear part adds to delta is taken off again, since it is known here anyhow.
    LINEAR "all" leaves three weights of each query in `PLANES` `[3, B, H, queries]`, which make the record's gradient:
    of phi, of the sum of phi besides, and of the gradient alone. LINEAR "given" finds the linear part of `DQ` written,
    and the second of these planes. PARTS: `GL` is the linear part's own gradient and `OUT` the sparse part.
    """
    pair, block, blocked, token, at, left = _program(
        tl.program_id(0), queries, first, kept, kept_at, blocks, pairs, BLOCK_Q, BQ, KEPT
    )
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    rows, cols = tl.arange(0, BQ), tl.arange(0, BD)
    tokens = queries + kept
    qb, qs, qh = _aligned(qb, ALIGN), _aligned(qs, ALIGN), _aligned(qh, ALIGN)
    kb, ks, kh = _aligned(kb, ALIGN), _aligned(ks, ALIGN), _aligned(kh, ALIGN)
    vb, vs, vh = _aligned(vb, ALIGN), _aligned(vs, ALIGN), _aligned(vh, ALIGN)
    gb, gs, gh = _aligned(gb, ALIGN), _aligned(gs, ALIGN), _aligned(gh, ALIGN)
    ob, os, oh = _aligned(ob, ALIGN), _aligned(os, ALIGN), _aligned(oh, ALIGN)
    Q += b * qb + h * qh
    K += b * kb + h // group * kh
    V += b * vb + h // group * vh
    DQ += (b * tokens * heads + h) * D
    index, count = _list(INDEX, START, pair, capacity, starts, block)
    whole = _whole(index, count, keys, tl.cdiv(keys, BLOCK_K) - 1, BLOCK_K, BK, RAGGED)
    STEPS: tl.constexpr = (BLOCK_K + BK - 1) // BK

    g = _tile(G + b * gb + h * gh, at, gs, rows, cols, left, D, True)
    wide = g.to(tl.float32)
    out = _tile(OUT + b * ob + h * oh, at, os, rows, cols, left, D, True).to(tl.float32)
    if BIASED and not PARTS:
        bias = tl.load(BIAS + cols, mask=cols < D, other=0.0).to(tl.float32)
        out -= tl.where(blocked, bias, 0.0)[None, :]
    delta = tl.sum(wide * out, 1)
    PLANES += pair.to(tl.int64) * queries + token + rows
    there = (rows < left) & blocked
    if LINEAR == "none":
        acc = tl.zeros((BQ, BD), tl.float32)
    if LINEAR == "given":
        acc = _tile(DQ, at, heads * D, rows, cols, tl.where(blocked, left, 0), D, True).to(tl.float32)
        acc *= 1.4426950408889634 / scale
        if not PARTS:
            delta += tl.load(PLANES + wp, mask=there, other=0.0)
    if LINEAR == "all":
        gl = g
        if PARTS:
            lb, ls, lh = _aligned(lb, ALIGN), _aligned(ls, ALIGN), _aligned(lh, ALIGN)
            gl = _tile(GL + b * lb + h * lh, token, ls, rows, cols, tl.where(blocked, left, 0), D, True)
        state = (pair // group).to(tl.int64)
        product = tl.zeros((BQ, BD), tl.float32)
        if left > 0:  # always; products that stand in the loop's own block keep their memory until it ends
            product = _dot(gl, tl.trans(_matrix(STATE + state * (D * D), D, BD)))
        phi = _features(_tile(Q, at, qs, rows, cols, left, D, True), cols, D, PHI)
        z = tl.load(Z + state * D + cols, mask=cols < D, other=0.0)
        # both sums in one reduction: then phi is needed in one layout only, that of the product
        sums, mean = tl.reduce((phi * z[None, :], phi * z[None, :] * product), 1, _add_both)
        alpha = tl.where(there, _inverse(sums + eps), 0.0)
        mean *= alpha
        if not PARTS:
            delta -= mean
        tl.store(PLANES, alpha, mask=there)
        tl.store(PLANES + wp, -mean, mask=there)
        if BIASED:
            tl.store(PLANES + 2 * wp, alpha * 0.0 + 1.0, mask=there)
        # natural exponentials are wanted of the gradients: `scale` is in powers of 2
        alpha *= 1.4426950408889634 / scale
        # again, rather than kept in registers
        phi = _features(_tile(Q, at, qs, rows, cols, left, D, True), cols, D, PHI)
        z = tl.load(Z + state * D + cols, mask=cols < D, other=0.0)
        acc = _features_backward((product - mean[:, None]) * z[None, :] * alpha[:, None], phi, PHI)
    lse = tl.load(LSE + pair.to(tl.int64) * tokens + at + rows, mask=rows < left, other=float("inf"))
    STATS += (pair.to(tl.int64) * ((tokens + 1) // 2 * 2) + at + rows) * 2
    tl.store(STATS, lse, mask=rows < left)
    tl.store(STATS + 1, delta, mask=rows < left)
    q = _tile(Q, at, qs, rows, cols, left, D, True)

    if BLOCK_K % BK == 0:
        for i in tl.range(0, whole * STEPS, num_stages=STAGES):
            n, offset = _listed(index, i, BLOCK_K, BK)
            place = first + n * BLOCK_K + offset
            acc = _query_step(
                q, g, K, V, KT, VT, b, h // group, place, BK, REAL, ks, vs, lse, delta, acc, scale, D, BK, 0, TMA
            )
    if RAGGED:
        for i in tl.range(whole * STEPS, count * STEPS, num_stages=1):
            n, offset = _listed(index, i, BLOCK_K, BK)
            some = tl.minimum(BLOCK_K - offset, keys - n * BLOCK_K - offset)
            place = first + n * BLOCK_K + offset
            acc = _query_step(
                q, g, K, V, KT, VT, b, h // group, place, some, REAL, ks, vs, lse, delta, acc, scale, D, BK, 1, TMA
            )
    if KEPT > 0:
        real = REAL + b * kept
        for i in tl.range(0, tl.cdiv(kept, BK), num_stages=STAGES):
            acc = _query_step(
                q, g, K, V, KT, VT, b, h // group, kept_at + i * BK, kept - i * BK, real + i * BK, ks, vs, lse, delta,
                acc, scale, D, BK, 0 if KEPT == 1 else 2, TMA,
            )  # fmt: skip
    _put(DQ, at, heads * D, rows, cols, left, acc * (scale * 0.6931471805599453), D)


@triton.jit
def _key_step(
    k, v, Q, G, STATS, QT, GT, ST, b, h, pair, at, left, qs, gs, dk, dv, scale,
    D: tl.constexpr, BQ: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    rows, cols = tl.arange(0, BQ), tl.arange(0, k.shape[1])
    near = tl.minimum(rows, left - 1)  # past the end, if need be of the whole tile, come last rows that weigh nothing
    q = _block(Q, QT, b, h, at, qs, near, cols, left, D, False, TMA)
    g = _block(G, GT, b, h, at, gs, near, cols, left, D, False, TMA)
    if TMA:
        lse, delta = tl.split(ST.load([pair.to(tl.int32), 2 * at]).reshape(BQ, 2))
    else:
        lse = tl.load(STATS + 2 * (at + rows), mask=rows < left, other=float("inf"))
        delta = tl.load(STATS + 2 * (at + rows) + 1, mask=rows < left, other=0.0)
    p = _exp2((_dot(k, tl.trans(q)).to(lse.dtype) * scale - lse[None, :]).to(tl.float32))
    delta = delta.to(tl.float32)
    if TMA and MASK:  # else what follows the last query are zeros
        p = tl.where((rows < left)[None, :], p, 0.0)
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
    ds = p * (_dot(v, tl.trans(g)) - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee"), dv


@triton.jit
def key_backward_kernel(
    Q, K, V, G, STATS, INDEX, START, REAL, STATE, Z, FACTOR, DK, DV, QT, GT, ST,
    queries, keys, first, kept, kept_at, blocks, query_blocks, pairs, heads, group, capacity, starts, scale,
    qb, qs, qh, kb, ks, kh, vb, vs, vh, gb, gs, gh,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr, KEPT: tl.constexpr, PHI: tl.constexpr,
    LINEAR: tl.constexpr, GROUPED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, contiguous: grid (tiles of keys of all key heads).

    Entries of the lists are query blocks, numbered through the query heads that share the key head. LINEAR "all" adds
    the gradients through the record, that of its state being `STATE` times `FACTOR`; "given" finds them written.
    """
    pair, block, blocked, token, at, left = _program(
        tl.program_id(0), keys, first, kept, kept_at, blocks, pairs, BLOCK_K, BK, KEPT
    )
    kv_heads = heads // group
    b, h = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    rows, cols = tl.arange(0, BK), tl.arange(0, BD)
    tokens = queries + kept
    qb, qs, qh = _aligned(qb, ALIGN), _aligned(qs, ALIGN), _aligned(qh, ALIGN)
    kb, ks, kh = _aligned(kb, ALIGN), _aligned(ks, ALIGN), _aligned(kh, ALIGN)
    vb, vs, vh = _aligned(vb, ALIGN), _aligned(vs, ALIGN), _aligned(vh, ALIGN)
    gb, gs, gh = _aligned(gb, ALIGN), _aligned(gs, ALIGN), _aligned(gh, ALIGN)
    place = (b * (keys + kept) * kv_heads + h) * D
    DK += place
    DV += place
    Q += b * qb + h * group * qh
    G += b * gb + h * group * gh
    each = (tokens + 1) // 2 * 2
    STATS += (b * heads + h * group) * each * 2
    index, count = _list(INDEX, START, pair, capacity, starts, block)
    STEPS: tl.constexpr = (BLOCK_Q + BQ - 1) // BQ

    k = _tile(K + b * kb + h * kh, at, ks, rows, cols, left, D, True)
    v = _tile(V + b * vb + h * vh, at, vs, rows, cols, left, D, True)
    if LINEAR == "none":
        dk = tl.zeros((BK, BD), tl.float32)
        dv = tl.zeros((BK, BD), tl.float32)
    if LINEAR == "given":
        inside = tl.where(blocked, left, 0)
        dk = _tile(DK, at, kv_heads * D, rows, cols, inside, D, True).to(tl.float32) * (1.4426950408889634 / scale)
        dv = _tile(DV, at, kv_heads * D, rows, cols, inside, D, True).to(tl.float32)
    if LINEAR == "all":
        dk = tl.zeros((BK, BD), tl.float32)
        dv = tl.zeros((BK, BD), tl.float32)
        if left > 0:  # always; products that stand in the loop's own block keep their memory until it ends
            state = _matrix(STATE + pair.to(tl.int64) * (D * D), D, BD)
            factor = tl.load(FACTOR + pair)
            dz = tl.load(Z + pair * D + cols, mask=cols < D, other=0.0)
            dphi = _dot(v, tl.trans(state)) * factor + dz[None, :]
            phi = _features(k, cols, D, PHI)
            dk = _features_backward(dphi, phi, PHI) * (1.4426950408889634 / scale)
            dv = _dot(phi.to(k.dtype), state) * factor

    for i in tl.range(0, count * STEPS, num_stages=STAGES):
        m, offset = _listed(index, i, BLOCK_Q, BQ)
        shift = tl.full((), 0, tl.int64)
        if GROUPED:
            shift += m // query_blocks
            m = m % query_blocks
        some = tl.minimum(BLOCK_Q - offset, queries - m * BLOCK_Q - offset)
        start = first + m * BLOCK_Q + offset
        dk, dv = _key_step(
            k, v, Q + shift * qh, G + shift * gh, STATS + shift * (each * 2), QT, GT, ST, b, h * group + shift,
            pair * group + shift, start, some, qs, gs, dk, dv, scale, D, BQ, KEPT > 0 or BLOCK_Q % BQ != 0, TMA,
        )  # fmt: skip
    if KEPT > 0:
        steps = tl.cdiv(kept, BQ)
        for i in tl.range(0, group * steps, num_stages=STAGES):
            shift, tile = (i // steps).to(tl.int64), i % steps
            dk, dv = _key_step(
                k, v, Q + shift * qh, G + shift * gh, STATS + shift * (each * 2), QT, GT, ST, b, h * group + shift,
                pair * group + shift, kept_at + tile * BQ, kept - tile * BQ, qs, gs, dk, dv, scale, D, BQ, True, TMA,
            )  # fmt: skip
    if KEPT > 1:
        real = _real(REAL + b * kept + token, rows, tl.where(blocked, 0, left), 2) | blocked
        dk, dv = tl.where(real[:, None], dk, 0.0), tl.where(real[:, None], dv, 0.0)
    _put(DK, at, kv_heads * D, rows, cols, left, dk * (scale * 0.6931471805599453), D)
    _put(DV, at, kv_heads * D, rows, cols, left, dv, D)


@triton.jit
def fold_kernel(
    RECORDS, W, SUMS, STATE, Z, parts, we, wd,
    D: tl.constexpr, BD: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr, PROJECT: tl.constexpr,
):  # fmt: skip
    """Add up a head's partial records `[parts, D + 2, D]`, project and normalise: grid (B * H_kv, tiles of features).

    `SUMS` `[D, D]` is mean(phi(k)^T v), `Z` `[D]` mean(phi(k)), `STATE` what `forward_kernel` says.
    """
    bh, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    a, cols = tile * BA + tl.arange(0, BA), tl.arange(0, BD)
    RECORDS += bh * parts * ((D + 2) * D)
    z = tl.zeros((BA,), tl.float32)
    for part in range(parts):
        z += tl.load(RECORDS + part * ((D + 2) * D) + D * D + a, mask=a < D, other=0.0)
    out = tl.zeros((BA, BD), tl.float32)
    for first in tl.static_range(0, D, BC):
        c = first + tl.arange(0, BC)
        ok = (a < D)[:, None] & (c < D)[None, :]
        s = tl.zeros((BA, BC), tl.float32)
        for part in range(parts):
            s += tl.load(RECORDS + part * ((D + 2) * D) + a[:, None] * D + c[None, :], mask=ok, other=0.0)
        tl.store(SUMS + bh * (D * D) + a[:, None] * D + c[None, :], s, mask=ok)
        s = s * tl.where(z > 0, 1.0 / tl.where(z > 0, z, 1.0), 0.0)[:, None]
        if PROJECT:
            ok = (cols < D)[:, None] & (c < D)[None, :]
            w = tl.load(W + cols[:, None] * we + c[None, :] * wd, mask=ok, other=0.0).to(tl.float32)
            out = tl.dot(s, tl.trans(w), out, input_precision="ieee")
        else:
            tl.store(STATE + bh * (D * D) + a[:, None] * D + c[None, :], s.to(STATE.dtype.element_ty), mask=ok)
    if PROJECT:
        ok = (a < D)[:, None] & (cols < D)[None, :]
        tl.store(STATE + bh * (D * D) + a[:, None] * D + cols[None, :], out.to(STATE.dtype.element_ty), mask=ok)
    tl.store(Z + bh * D + a, z, mask=a < D)
