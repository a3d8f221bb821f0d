"""Triton kernels of linear attention to the key blocks that were not chosen: each query block has a state of its own.

No state is kept. Of the listed blocks' state and all blocks', whichever needs the shorter lists: a program sums the
listed blocks, and takes that from the total where the lists name what is left out. Both sums are of the same products,
in fp32, so that a small remainder is not lost: only what falls under 1e-6 of the total is taken for rounding, thus 0.
"""

import triton
import triton.language as tl

from .linear_triton import _add_both, _aligned, _column, _dot, _features, _features_backward, _from_column, _inverse
from .sparse_triton import _list, _listed, _matrix, _put, _tile


@triton.jit
def rest_query_kernel(
    Q, K, V, G, W, SUMS, Z, ENTRIES, START, PART, DQ, PLANES,
    queries, keys, first, blocks, heads, group, capacity, starts, eps, scale_of_sum, wp,
    qb, qs, qh, kb, ks, kh, vb, vs, vh, gb, gs, gh, db, ds, dh,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr, PHI: tl.constexpr, SUBTRACT: tl.constexpr,
    BACKWARD: tl.constexpr, PROJECT: tl.constexpr,
):  # fmt: skip
    """The linear part before its projection, `PART` `[B, queries, H, D]`: grid (tiles of queries, B * H).

    `SUMS`, `Z` are the means of phi(k)^T v and phi(k) over all blocked keys, `scale_of_sum` is one over their number.
    BACKWARD, from the gradient `G` of the projected part: also the gradient of the queries `DQ`, and the weights
    `[2, B, H, queries]` of phi and of the sum of phi besides, of which the gradients of states are made.
    """
    tile, pair = tl.program_id(0), tl.program_id(1)
    TILES: tl.constexpr = (BLOCK_Q + BQ - 1) // BQ
    block = tile // TILES
    token = block * BLOCK_Q + tile % TILES * BQ
    left = tl.minimum(BLOCK_Q - tile % TILES * BQ, queries - token)
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    rows, cols, keyed = tl.arange(0, BQ), tl.arange(0, BD), tl.arange(0, BK)
    qb, qs, qh = _aligned(qb, ALIGN), _aligned(qs, ALIGN), _aligned(qh, ALIGN)
    kb, ks, kh = _aligned(kb, ALIGN), _aligned(ks, ALIGN), _aligned(kh, ALIGN)
    vb, vs, vh = _aligned(vb, ALIGN), _aligned(vs, ALIGN), _aligned(vh, ALIGN)
    Q += b * qb + h * qh
    K += b * kb + h // group * kh
    V += b * vb + h // group * vh
    entries, count = _list(ENTRIES, START, pair, capacity, starts, block)
    STEPS: tl.constexpr = (BLOCK_K + BK - 1) // BK

    state = tl.zeros((BD, BD), tl.float32)
    total = tl.zeros((BD, 16), tl.float32)
    for i in tl.range(0, count * STEPS, num_stages=STAGES):
        n, offset = _listed(entries, i, BLOCK_K, BK)
        there = tl.minimum(BLOCK_K - offset, keys - n * BLOCK_K - offset)
        at = first + n * BLOCK_K + offset
        phi = tl.trans(_features(_tile(K, at, ks, keyed, cols, there, D, True), cols, D, PHI).to(Q.dtype.element_ty))
        v = _tile(V, at, vs, keyed, cols, there, D, True)
        total += _dot(phi, _column(tl.where(keyed < there, 1.0, 0.0)).to(v.dtype))
        state += _dot(phi, v)
    state *= scale_of_sum
    z = _from_column(total) * scale_of_sum
    record = (pair // group).to(tl.int64)
    if SUBTRACT:
        whole = tl.load(Z + record * D + cols, mask=cols < D, other=0.0)
        state = _matrix(SUMS + record * (D * D), D, BD) - state
        z = tl.where(whole - z > 1e-6 * whole, whole - z, 0.0)
    z = tl.where(cols < D, z, 0.0)
    state = (state * tl.where(z > 0, 1.0 / tl.where(z > 0, z, 1.0), 0.0)[:, None]).to(Q.dtype.element_ty)

    phi = _features(_tile(Q, first + token, qs, rows, cols, left, D, True), cols, D, PHI)
    there = rows < left
    place = (b * queries * heads + h) * D
    if BACKWARD:
        g = _tile(G + b * gb + h * gh, token, gs, rows, cols, left, D, True)
        if PROJECT:
            g = _dot(g, _matrix(W, D, BD)).to(g.dtype)
        product = _dot(g, tl.trans(state))
        sums, mean = tl.reduce((phi * z[None, :], phi * z[None, :] * product), 1, _add_both)
        alpha = _inverse(sums + eps)
        mean *= alpha
        PLANES += pair.to(tl.int64) * queries + token + rows
        tl.store(PLANES, alpha, mask=there)
        tl.store(PLANES + wp, -mean, mask=there)
        dphi = (product - mean[:, None]) * z[None, :] * alpha[:, None]
        _put(DQ + b * db + h * dh, first + token, ds, rows, cols, left, _features_backward(dphi, phi, PHI), D)
        phi = _features(_tile(Q, first + token, qs, rows, cols, left, D, True), cols, D, PHI)
    w = phi * z[None, :]
    w *= _inverse(tl.sum(w, 1) + eps)[:, None]
    _put(PART + place, token, heads * D, rows, cols, left, _dot(w.to(state.dtype), state), D)


@triton.jit
def rest_key_kernel(
    Q, K, V, G, W, SUMS, Z, ENTRIES, START, PLANES, DK, DV,
    queries, keys, first, blocks, query_blocks, heads, group, capacity, starts, scale_of_sum, wp,
    qb, qs, qh, kb, ks, kh, vb, vs, vh, gb, gs, gh, db, ds, dh,
    D: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr, PHI: tl.constexpr, SUBTRACT: tl.constexpr,
    PROJECT: tl.constexpr,
):  # fmt: skip
    """Gradients of the blocked keys and values through the linear part: grid (tiles of keys, B * H_kv).

    `SUMS` and `Z` are the gradients of the states of all queries together, before the projection; the same of the
    query blocks listed is made here.
    """
    tile, pair = tl.program_id(0), tl.program_id(1)
    TILES: tl.constexpr = (BLOCK_K + BK - 1) // BK
    block = tile // TILES
    token = block * BLOCK_K + tile % TILES * BK
    left = tl.minimum(BLOCK_K - tile % TILES * BK, keys - token)
    kv_heads = heads // group
    b, h = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    rows, cols, queried = tl.arange(0, BK), tl.arange(0, BD), tl.arange(0, BQ)
    qb, qs, qh = _aligned(qb, ALIGN), _aligned(qs, ALIGN), _aligned(qh, ALIGN)
    kb, ks, kh = _aligned(kb, ALIGN), _aligned(ks, ALIGN), _aligned(kh, ALIGN)
    vb, vs, vh = _aligned(vb, ALIGN), _aligned(vs, ALIGN), _aligned(vh, ALIGN)
    gb, gs, gh = _aligned(gb, ALIGN), _aligned(gs, ALIGN), _aligned(gh, ALIGN)
    Q += b * qb + h * group * qh
    G += b * gb + h * group * gh
    PLANES += (b * heads + h * group) * queries
    entries, count = _list(ENTRIES, START, pair, capacity, starts, block)
    STEPS: tl.constexpr = (BLOCK_Q + BQ - 1) // BQ

    state = tl.zeros((BD, BD), tl.float32)
    total = tl.zeros((BD, 16), tl.float32)
    for i in tl.range(0, count * STEPS, num_stages=STAGES):
        m, offset = _listed(entries, i, BLOCK_Q, BQ)
        shift = (m // query_blocks).to(tl.int64)
        m = m % query_blocks
        start = m * BLOCK_Q + offset
        there = tl.minimum(BLOCK_Q - offset, queries - start)
        planes = PLANES + shift * queries + start + queried
        alpha = tl.load(planes, mask=queried < there, other=0.0)
        once = tl.load(planes + wp, mask=queried < there, other=0.0)
        q = _tile(Q + shift * qh, first + start, qs, queried, cols, there, D, True)
        g = _tile(G + shift * gh, start, gs, queried, cols, there, D, True)
        phi = tl.trans((_features(q, cols, D, PHI) * alpha[:, None]).to(q.dtype))
        total += _dot(phi, _column(once).to(q.dtype))
        state += _dot(phi, g)
    dz = _from_column(total)
    if SUBTRACT:
        state = _matrix(SUMS + pair.to(tl.int64) * (D * D), D, BD) - state
        dz = tl.load(Z + pair * D + cols, mask=cols < D, other=0.0) - dz
    dz *= scale_of_sum
    state = tl.where((cols < D)[:, None], state, 0.0)  # features that pad a block are not zero
    largest = tl.maximum(tl.max(tl.max(tl.abs(state), 1), 0), 1e-30)
    state = (state / largest).to(K.dtype.element_ty)
    factor = largest * scale_of_sum
    if PROJECT:
        state = _dot(state, _matrix(W, D, BD)).to(state.dtype)

    place = b * db + h * dh
    k = _tile(K + b * kb + h * kh, first + token, ks, rows, cols, left, D, True)
    v = _tile(V + b * vb + h * vh, first + token, vs, rows, cols, left, D, True)
    phi = _features(k, cols, D, PHI)
    _put(DV + place, first + token, ds, rows, cols, left, _dot(phi.to(k.dtype), state) * factor, D)
    dphi = _dot(v, tl.trans(state)) * factor + dz[None, :]
    _put(DK + place, first + token, ds, rows, cols, left, _features_backward(dphi, phi, PHI), D)
