"""Triton kernels of window attention: image queries in tiles of the grid, keys in boxes of it; text in plain rows.

Every program owns `BM` tokens and walks over blocks of `BN` others: first a run of the sequence (all text for an image
tile, a piece of everything for text), then pooled keys, then the boxes of its table, those that lie wholly inside all
of its windows first, without a mask. Windows are symmetric, so one table serves the gradients of keys, too.
`bench/NOTES.md` has the arithmetic.
"""

import triton
import triton.language as tl

from .linear_triton import _exp2

# a coordinate that is nowhere near, its square still far from infinity
FAR = tl.constexpr(1.0e12)
# lower than any score, and not infinite: what is subtracted from a row that has seen nothing yet
LOWEST = tl.constexpr(-1.0e30)
# box numbers: 11 bits for the column of boxes, 11 for the row, the rest for the frame
ROW, FRAME, LAST = tl.constexpr(11), tl.constexpr(22), tl.constexpr(2047)
LN2, LOG2E = tl.constexpr(0.6931471805599453), tl.constexpr(1.4426950408889634)
# numbers for whose being 1, or a multiple of 16, nothing is compiled anew
SIZES = (
    "tokens", "text", "text_at", "image_at", "run_at", "run_end", "F", "H", "W", "tiles_y", "tiles_x", "pieces",
    "piece", "text_programs", "images", "heads", "group", "pooled", "own", "real_b",
)  # fmt: skip


@triton.jit
def _dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def _load(X, offsets, cols, D: tl.constexpr):
    if tl.constexpr(D) % cols.shape[0] != 0:
        return tl.load(X + offsets, mask=(cols < D)[None, :], other=0.0)
    else:
        return tl.load(X + offsets)


@triton.jit
def _held(x):
    """x, out of a product that adds nothing: only so does the compiler keep it in registers, and leaves the shared
    memory, and its bandwidth, to what comes and goes."""
    nothing = tl.zeros((x.shape[0], 16), x.dtype)
    return _dot(nothing, tl.zeros((16, x.shape[1]), x.dtype), x.to(tl.float32)).to(x.dtype)


@triton.jit
def _place(n, TF: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr):
    """Frame, row and column of token n of a tile."""
    return n // (TX * TY), n // TX % TY, n % TX


@triton.jit
def _unpack(code, BF: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr):
    """First frame, row and column of a box."""
    return (code >> FRAME) * BF, ((code >> ROW) & LAST) * BY, (code & LAST) * BX


@triton.jit
def _near(qf, qy, qx, kf, ky, kx, wf, wy, wx, bound, AXES: tl.constexpr, BOX: tl.constexpr):
    """Which pairs lie within the window, `[queries, keys]`. fp32 compares whole numbers exactly."""
    dy, dx = qy[:, None] - ky[None, :], qx[:, None] - kx[None, :]
    dy, dx = dy * dy * wy, dx * dx * wx
    if BOX:  # noqa: SIM108
        near = (dy < bound) & (dx < bound)
    else:
        near = dx < bound - dy
    if AXES == 3:
        df = qf[:, None] - kf[None, :]
        df = df * df * wf
        if BOX:  # noqa: SIM108
            near = near & (df < bound)
        else:
            near = dx < (bound - dy) - df
    return near


@triton.jit
def _program(text_programs, images):
    """Which program of its head this is, which of all heads of all samples, and whether it is one of text: of all
    heads these come first, since they run longest; else a head's own follow each other and share its keys in cache."""
    pid = tl.program_id(0)
    lanes = tl.num_programs(0) // (text_programs + images)
    is_text = pid < text_programs * lanes
    words, image = tl.maximum(text_programs, 1), pid - text_programs * lanes
    images = tl.maximum(images, 1)
    lane = tl.where(is_text, pid // words, image // images)
    return tl.where(is_text, pid % words, text_programs + image % images), lane, is_text


@triton.jit
def _boxes(STARTS, tile, is_text):
    """Where a tile's open boxes begin in the table, where those that need a mask, and where they end."""
    first = STARTS + tl.maximum(tile, 0) * 2
    begin, edge, end = tl.load(first), tl.load(first + 1), tl.load(first + 2)
    return begin, tl.where(is_text, begin, edge), tl.where(is_text, begin, end)  # none for text


@triton.jit
def _own(
    pid, run_at, run_end, text, text_at, image_at, F, H, W, tiles_y, tiles_x, pieces, piece, text_programs,
    TF: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """What a program owns and the run of the sequence that it meets.

    Text programs come first, `pieces` to a tile. Returns the tile's number in the table, the tokens `[BM]` clamped to
    those there are, whether each is there, coordinates, and first and last of the run.
    """
    rows = tl.arange(0, TF * TY * TX)
    is_text = pid < text_programs
    tile = pid - text_programs
    rf, ry, rx = _place(rows, TF, TY, TX)
    f, y, x = rf, tile // tiles_x % tiles_y * TY + ry, tile % tiles_x * TX + rx
    if AXES == 3:
        f += tile // (tiles_x * tiles_y) * TF
    there = (f < F) & (y < H) & (x < W)
    y, x = tl.minimum(y, H - 1), tl.minimum(x, W - 1)
    at = image_at + y * W + x
    if AXES == 3:
        f = tl.minimum(f, F - 1)
        at += f * (H * W)
    word = pid // pieces * (TF * TY * TX) + rows
    there = (is_text & (word < text)) | (~is_text & there)
    at = tl.where(is_text, text_at + tl.minimum(word, text - 1), at)
    first = tl.where(is_text, run_at + pid % pieces * piece, text_at)
    last = tl.where(is_text, tl.minimum(first + piece, run_end), text_at + text)
    return tile, at, there, f.to(tl.float32), y.to(tl.float32), x.to(tl.float32), first, last


@triton.jit
def _box(
    code, H, W, n, nf, ny, nx, F, image_at,
    BF: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, AXES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A box's first frame, row and column, its first token, the others counted from it `[BN]`, and their coordinates:
    far away where nothing is."""
    f0, y0, x0 = _unpack(code, BF, BY, BX)
    f, y, x = (f0 + nf).to(tl.float32), (y0 + ny).to(tl.float32), (x0 + nx).to(tl.float32)
    first = image_at + y0 * W + x0
    if AXES == 3:
        first += f0 * (H * W)
    if EVEN:
        inside = ny * W + nx
        if AXES == 3:
            inside += nf * (H * W)
    else:
        y, x = tl.where(y0 + ny < H, y, FAR), tl.where(x0 + nx < W, x, FAR)
        inside = tl.minimum(ny, H - 1 - y0) * W + tl.minimum(nx, W - 1 - x0)
        if AXES == 3:
            f = tl.where(f0 + nf < F, f, FAR)
            inside += tl.minimum(nf, F - 1 - f0) * (H * W)
    return f0, y0, x0, first, inside, f, y, x


@triton.jit
def _run_of(X, TILES, b, h, start, rows, cols, stride, D: tl.constexpr, TMA: tl.constexpr):
    """A block of the sequence `[BN, BD]`. The copy engine reads on past the run's end and past the head: both are
    masked, or meet zeros."""
    if TMA:
        x = TILES.load([b.to(tl.int32), start, h * D]).reshape(rows.shape[0], cols.shape[0])
    else:
        x = _load(X + start.to(tl.int64) * stride, rows[:, None] * stride + cols[None, :], cols, D)
    return x


@triton.jit
def _box_of(
    X, TILES, b, h, f, y, x, first, inside, cols, stride, D: tl.constexpr, AXES: tl.constexpr, TMA: tl.constexpr
):
    """A box of the grid `[BN, BD]`."""
    if not TMA:
        rows = _load(X + first.to(tl.int64) * stride, inside[:, None] * stride + cols[None, :], cols, D)
    elif AXES == 3:
        rows = TILES.load([b.to(tl.int32), f, y, x, h * D]).reshape(inside.shape[0], cols.shape[0])
    else:
        rows = TILES.load([b.to(tl.int32), y, x, h * D]).reshape(inside.shape[0], cols.shape[0])
    return rows


@triton.jit
def _stats_of(STATS, TILES, lane, f, y, x, at, AXES: tl.constexpr, TMA: tl.constexpr):
    """Log-sum-exp and delta of a box's queries `[BN]`."""
    if not TMA:
        lse, delta = tl.load(STATS + 2 * at), tl.load(STATS + 2 * at + 1)
    elif AXES == 3:
        lse, delta = tl.split(TILES.load([lane, f, y, 2 * x]).reshape(at.shape[0], 2))
    else:
        lse, delta = tl.split(TILES.load([lane, y, 2 * x]).reshape(at.shape[0], 2))
    return lse, delta


@triton.jit
def _weigh(s, m, total, acc, v, scale, MODE: tl.constexpr):
    """One more block of the softmax: scores `[BM, BN]` in fp32, unscaled; `scale` includes log2(e)."""
    if MODE != "fast":
        highest = tl.maximum(m, tl.max(s, 1) * scale)
        fade = _exp2(m - highest)
        m, total, acc = highest, total * fade, acc * fade[:, None]
    p = _exp2(s * scale - m[:, None])
    return m, total + tl.sum(p, 1), _dot(p.to(v.dtype), v, acc)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    Q, K, V, PK, PV, REAL, TABLE, STARTS, REPAIR, OUT, LSE, PART, K_RUN, V_RUN, K_BOX, V_BOX,
    tokens, text, text_at, image_at, run_at, run_end, F, H, W, tiles_y, tiles_x, pieces, piece, text_programs, images,
    heads, group, wf, wy, wx, bound, scale, pooled,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, pk_b, pk_t, pk_h, pv_b, pv_t, pv_h, real_b,
    D: tl.constexpr, BD: tl.constexpr, TF: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    BF: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, AXES: tl.constexpr, BOX: tl.constexpr,
    EVEN: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr, POOLED: tl.constexpr, SAME: tl.constexpr,
    TMA: tl.constexpr, KEEP_LSE: tl.constexpr, MODE: tl.constexpr, MOST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Out `[B, S, H, D]` and, if kept, log-sum-exps `[B * H, S]`; text leaves a record for each piece in PART
    `[pieces, B * H, text, D + 1]` where there are several.

    What is subtracted from a row's scores is their highest so far, as usual, unless MODE is "fast": then it is the
    query's score with its own key, which nothing has to wait for. Only if others are higher by far (a sum above MOST),
    or, among pieces of text, lower by far, does that leave the range of numbers; REPAIR says where, and a second launch
    with MODE "repair" does those programs again.
    """
    BM: tl.constexpr = TF * TY * TX
    BN: tl.constexpr = BF * BY * BX
    if SAME:
        v_t = k_t
    if MODE == "repair":  # noqa: SIM102
        if tl.load(REPAIR + tl.program_id(0)) == 0:
            return
    pid, lane, is_text = _program(text_programs, images)
    lanes = tl.num_programs(0) // (text_programs + images)
    b, h = (lane // heads).to(tl.int64), lane % heads
    h_k = h // group
    tile, at, there, qf, qy, qx, first, last = _own(
        pid, run_at, run_end, text, text_at, image_at, F, H, W, tiles_y, tiles_x, pieces, piece, text_programs,
        TF, TY, TX, AXES,
    )  # fmt: skip
    n, cols = tl.arange(0, BN), tl.arange(0, BD)
    nf, ny, nx = _place(n, BF, BY, BX)
    Q += b * q_b + h * q_h
    K += b * k_b + h_k * k_h
    V += b * v_b + h_k * v_h
    q = _load(Q, at.to(tl.int64)[:, None] * q_t + cols[None, :], cols, D)
    if MODE == "fast":
        own = _load(K, at.to(tl.int64)[:, None] * k_t + cols[None, :], cols, D)
        m = tl.sum(q.to(tl.float32) * own.to(tl.float32), 1) * scale
    else:
        m = tl.full((BM,), LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)

    for i in tl.range(0, tl.cdiv(last - first, BN), num_stages=STAGES):
        start = first + i * BN
        rows = n
        if RAGGED:
            rows = tl.minimum(n, last - 1 - start)
        k = _run_of(K, K_RUN, b, h_k, start, rows, cols, k_t, D, TMA)
        v = _run_of(V, V_RUN, b, h_k, start, rows, cols, v_t, D, TMA)
        s = tl.dot(q, k.T, input_precision="ieee")
        if RAGGED or MASKED:
            seen = start + n < last
            if MASKED:
                seen = seen & (tl.load(REAL + b * real_b + start + n, mask=seen, other=0) != 0)
            s = tl.where(seen[None, :], s, float("-inf"))
        m, total, acc = _weigh(s, m, total, acc, v, scale, MODE)

    if POOLED:
        PK += b * pk_b + h_k * pk_h
        PV += b * pv_b + h_k * pv_h
        for i in tl.range(0, tl.cdiv(tl.where(is_text, 0, pooled), BN), num_stages=STAGES):
            start = pooled * 0 + i * BN
            rows = tl.minimum(n, pooled - 1 - start)
            k = _load(PK + start.to(tl.int64) * pk_t, rows[:, None] * pk_t + cols[None, :], cols, D)
            v = _load(PV + start.to(tl.int64) * pv_t, rows[:, None] * pv_t + cols[None, :], cols, D)
            s = tl.where((start + n < pooled)[None, :], tl.dot(q, k.T, input_precision="ieee"), float("-inf"))
            m, total, acc = _weigh(s, m, total, acc, v, scale, MODE)

    open_from, edge_from, end = _boxes(STARTS, tile, is_text)
    code = tl.load(TABLE + open_from)  # always one ahead, so that no copy waits for it
    for i in tl.range(open_from, edge_from, num_stages=STAGES):
        f, y, x, corner, inside, kf, ky, kx = _box(code, H, W, n, nf, ny, nx, F, image_at, BF, BY, BX, AXES, True)
        k = _box_of(K, K_BOX, b, h_k, f, y, x, corner, inside, cols, k_t, D, AXES, TMA)
        v = _box_of(V, V_BOX, b, h_k, f, y, x, corner, inside, cols, v_t, D, AXES, TMA)
        code = tl.load(TABLE + i + 1)
        m, total, acc = _weigh(tl.dot(q, k.T, input_precision="ieee"), m, total, acc, v, scale, MODE)
    for i in tl.range(edge_from, end, num_stages=STAGES):
        f, y, x, corner, inside, kf, ky, kx = _box(code, H, W, n, nf, ny, nx, F, image_at, BF, BY, BX, AXES, EVEN)
        k = _box_of(K, K_BOX, b, h_k, f, y, x, corner, inside, cols, k_t, D, AXES, TMA)
        v = _box_of(V, V_BOX, b, h_k, f, y, x, corner, inside, cols, v_t, D, AXES, TMA)
        code = tl.load(TABLE + i + 1)
        near = _near(qf, qy, qx, kf, ky, kx, wf, wy, wx, bound, AXES, BOX)
        s = tl.where(near, tl.dot(q, k.T, input_precision="ieee"), float("-inf"))
        m, total, acc = _weigh(s, m, total, acc, v, scale, MODE)

    if MODE == "fast":
        tl.store(REPAIR + tl.program_id(0), tl.max(tl.where((total > 1 / MOST) & (total < MOST), 0, 1)))
    lse = (m + tl.math.log2(total)) * LN2
    acc = acc / total[:, None]
    seen = there[:, None] & (cols < D)[None, :]
    if is_text & (pieces > 1):
        word = at - text_at
        place = ((pid % pieces).to(tl.int64) * lanes + lane) * text + word
        tl.store(PART + place[:, None] * (D + 1) + cols[None, :], acc, mask=seen)
        tl.store(PART + place * (D + 1) + D, lse, mask=there)
    else:
        place = (b * tokens + at) * heads + h
        tl.store(OUT + place[:, None] * D + cols[None, :], acc.to(OUT.dtype.element_ty), mask=seen)
        if KEEP_LSE:
            tl.store(LSE + lane.to(tl.int64) * tokens + at, lse, mask=there)


@triton.jit
def _query_step(dq, q, do, lse, delta, k, v, near, scale, MASK: tl.constexpr):
    """One block of keys `[BN, BD]` towards the queries' gradient; `near` `[BM, BN]` says which pairs there are."""
    p = _exp2(tl.dot(q, k.T, input_precision="ieee") * scale - lse[:, None])
    if MASK:
        p = tl.where(near, p, 0.0)
    ds = p * (tl.dot(do, v.T, input_precision="ieee") - delta[:, None])
    return _dot(ds.to(k.dtype), k, dq)


@triton.jit
def _key_step(dk, dv, k, v, q, do, lse, delta, near, scale, MASK: tl.constexpr):
    """One block of queries `[BN, BD]` towards the keys' and values' gradients; `near` `[BM, BN]`."""
    p = _exp2(tl.dot(k, q.T, input_precision="ieee") * scale - lse[None, :])
    if MASK:
        p = tl.where(near, p, 0.0)
    dv = _dot(p.to(do.dtype), do, dv)
    # a product that begins with -delta needs no registers for it, nor a subtraction
    dp = _dot(v, do.T, tl.broadcast_to(-delta[None, :], p.shape))
    return _dot((p * dp).to(q.dtype), q, dk), dv


@triton.jit(do_not_specialize=SIZES)
def query_backward_kernel(
    Q, K, V, PK, PV, REAL, TABLE, STARTS, OUT, DO, LSE, LSE_GRAD, STATS, DQ, PART,
    K_RUN, V_RUN, K_BOX, V_BOX,
    tokens, text, text_at, image_at, run_at, run_end, F, H, W, tiles_y, tiles_x, pieces, piece, text_programs, images,
    heads, group, wf, wy, wx, bound, scale, pooled,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, pk_b, pk_t, pk_h, pv_b, pv_t, pv_h, real_b, do_b, do_t, do_h, lg_b, lg_h, lg_t,  # noqa: E501
    D: tl.constexpr, BD: tl.constexpr, TF: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    BF: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, AXES: tl.constexpr, BOX: tl.constexpr,
    EVEN: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr, POOLED: tl.constexpr, SAME: tl.constexpr,
    TMA: tl.constexpr, LSE_HAS_GRAD: tl.constexpr, STAGES: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """dq `[B, S, H, D]`; of text in pieces, fp32 parts `[pieces, B * H, text, D]`. Leaves in STATS `[B * H, S, 2]` each
    query's log-sum-exp to the base 2, and what its scores' gradients are measured from: sum(out * grad), less the
    gradient of the log-sum-exp.
    """
    if SAME:
        v_t = k_t
    BM: tl.constexpr = TF * TY * TX
    BN: tl.constexpr = BF * BY * BX
    pid, lane, is_text = _program(text_programs, images)
    lanes = tl.num_programs(0) // (text_programs + images)
    b, h = (lane // heads).to(tl.int64), lane % heads
    h_k = h // group
    tile, at, there, qf, qy, qx, first, last = _own(
        pid, run_at, run_end, text, text_at, image_at, F, H, W, tiles_y, tiles_x, pieces, piece, text_programs,
        TF, TY, TX, AXES,
    )  # fmt: skip
    n, cols = tl.arange(0, BN), tl.arange(0, BD)
    nf, ny, nx = _place(n, BF, BY, BX)
    K += b * k_b + h_k * k_h
    V += b * v_b + h_k * v_h
    q = _load(Q + b * q_b + h * q_h, at.to(tl.int64)[:, None] * q_t + cols[None, :], cols, D)
    do = _load(DO + b * do_b + h * do_h, at.to(tl.int64)[:, None] * do_t + cols[None, :], cols, D)
    if HELD:
        q, do = _held(q), _held(do)
    place = (b * tokens + at) * heads + h
    out = _load(OUT, place[:, None] * D + cols[None, :], cols, D)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if LSE_HAS_GRAD:
        delta -= tl.load(LSE_GRAD + b * lg_b + at.to(tl.int64) * lg_t + h * lg_h).to(tl.float32)
    query = lane.to(tl.int64) * tokens + at
    lse = tl.load(LSE + query) * LOG2E
    tl.store(STATS + query * 2, lse, mask=there)
    tl.store(STATS + query * 2 + 1, delta, mask=there)
    dq = tl.zeros((BM, BD), tl.float32)

    for i in tl.range(0, tl.cdiv(last - first, BN), num_stages=STAGES):
        start = first + i * BN
        rows = n
        if RAGGED:
            rows = tl.minimum(n, last - 1 - start)
        k = _run_of(K, K_RUN, b, h_k, start, rows, cols, k_t, D, TMA)
        v = _run_of(V, V_RUN, b, h_k, start, rows, cols, v_t, D, TMA)
        seen = start + n < last
        if MASKED:
            seen = seen & (tl.load(REAL + b * real_b + start + n, mask=seen, other=0) != 0)
        dq = _query_step(dq, q, do, lse, delta, k, v, seen[None, :], scale, RAGGED or MASKED)

    if POOLED:
        PK += b * pk_b + h_k * pk_h
        PV += b * pv_b + h_k * pv_h
        for i in tl.range(0, tl.cdiv(tl.where(is_text, 0, pooled), BN), num_stages=STAGES):
            start = pooled * 0 + i * BN
            rows = tl.minimum(n, pooled - 1 - start)
            k = _load(PK + start.to(tl.int64) * pk_t, rows[:, None] * pk_t + cols[None, :], cols, D)
            v = _load(PV + start.to(tl.int64) * pv_t, rows[:, None] * pv_t + cols[None, :], cols, D)
            dq = _query_step(dq, q, do, lse, delta, k, v, (start + n < pooled)[None, :], scale, True)

    open_from, edge_from, end = _boxes(STARTS, tile, is_text)
    code = tl.load(TABLE + open_from)  # always one ahead, so that no copy waits for it
    for i in tl.range(open_from, edge_from, num_stages=STAGES):
        f, y, x, corner, inside, kf, ky, kx = _box(code, H, W, n, nf, ny, nx, F, image_at, BF, BY, BX, AXES, True)
        k = _box_of(K, K_BOX, b, h_k, f, y, x, corner, inside, cols, k_t, D, AXES, TMA)
        v = _box_of(V, V_BOX, b, h_k, f, y, x, corner, inside, cols, v_t, D, AXES, TMA)
        code = tl.load(TABLE + i + 1)
        dq = _query_step(dq, q, do, lse, delta, k, v, kx[None, :] < 0, scale, False)
    for i in tl.range(edge_from, end, num_stages=STAGES):
        f, y, x, corner, inside, kf, ky, kx = _box(code, H, W, n, nf, ny, nx, F, image_at, BF, BY, BX, AXES, EVEN)
        k = _box_of(K, K_BOX, b, h_k, f, y, x, corner, inside, cols, k_t, D, AXES, TMA)
        v = _box_of(V, V_BOX, b, h_k, f, y, x, corner, inside, cols, v_t, D, AXES, TMA)
        code = tl.load(TABLE + i + 1)
        near = _near(qf, qy, qx, kf, ky, kx, wf, wy, wx, bound, AXES, BOX)
        dq = _query_step(dq, q, do, lse, delta, k, v, near, scale, True)

    dq *= scale * LN2
    seen = there[:, None] & (cols < D)[None, :]
    if is_text & (pieces > 1):
        part = ((pid % pieces).to(tl.int64) * lanes + lane) * text + at - text_at
        tl.store(PART + part[:, None] * D + cols[None, :], dq, mask=seen)
    else:
        tl.store(DQ + place[:, None] * D + cols[None, :], dq.to(DQ.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=SIZES)
def key_backward_kernel(
    Q, K, V, REAL, TABLE, STARTS, DO, STATS, DK, DV, PART, Q_RUN, DO_RUN, Q_BOX, DO_BOX, S_RUN, S_BOX,
    tokens, text, text_at, image_at, run_at, run_end, F, H, W, tiles_y, tiles_x, pieces, piece, text_programs, images,
    heads, group, wf, wy, wx, bound, scale, own,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, real_b, do_b, do_t, do_h,
    D: tl.constexpr, BD: tl.constexpr, TF: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    BF: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, AXES: tl.constexpr, BOX: tl.constexpr,
    EVEN: tl.constexpr, RAGGED: tl.constexpr, MASKED: tl.constexpr, SAME: tl.constexpr, TMA: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv `[B, own, H, D]`, of each query head; of text in pieces, fp32 parts `[pieces, B * H, text, 2, D]`.

    An image tile's keys meet all text queries and the boxes of queries that see them, text keys the queries from
    `run_at` to `run_end`; pooled keys are a text of their own, with `own` tokens, in a launch without images.
    """
    if SAME:
        do_t = q_t
    BM: tl.constexpr = TF * TY * TX
    BN: tl.constexpr = BF * BY * BX
    pid, lane, is_text = _program(text_programs, images)
    lanes = tl.num_programs(0) // (text_programs + images)
    b, h = (lane // heads).to(tl.int64), lane % heads
    tile, at, there, kf, ky, kx, first, last = _own(
        pid, run_at, run_end, text, text_at, image_at, F, H, W, tiles_y, tiles_x, pieces, piece, text_programs,
        TF, TY, TX, AXES,
    )  # fmt: skip
    n, cols = tl.arange(0, BN), tl.arange(0, BD)
    nf, ny, nx = _place(n, BF, BY, BX)
    Q += b * q_b + h * q_h
    DO += b * do_b + h * do_h
    STATS += lane.to(tl.int64) * tokens * 2
    k = _load(K + b * k_b + h // group * k_h, at.to(tl.int64)[:, None] * k_t + cols[None, :], cols, D)
    v = _load(V + b * v_b + h // group * v_h, at.to(tl.int64)[:, None] * v_t + cols[None, :], cols, D)
    dk, dv = tl.zeros((BM, BD), tl.float32), tl.zeros((BM, BD), tl.float32)
    real = there
    if MASKED:
        real = tl.load(REAL + b * real_b + at) != 0

    for i in tl.range(0, tl.cdiv(last - first, BN), num_stages=STAGES):
        start = first + i * BN
        rows = n
        if RAGGED:
            rows = tl.minimum(n, last - 1 - start)
        q = _run_of(Q, Q_RUN, b, h, start, rows, cols, q_t, D, TMA)
        do = _run_of(DO, DO_RUN, b, h, start, rows, cols, do_t, D, TMA)
        if TMA:
            lse, delta = tl.split(S_RUN.load([lane, 2 * start]).reshape(BN, 2))
        else:
            lse, delta = tl.load(STATS + 2 * (start + rows)), tl.load(STATS + 2 * (start + rows) + 1)
        near = (start + n < last)[None, :] & real[:, None]
        dk, dv = _key_step(dk, dv, k, v, q, do, lse, delta, near, scale, RAGGED or MASKED)

    open_from, edge_from, end = _boxes(STARTS, tile, is_text)
    code = tl.load(TABLE + open_from)  # always one ahead, so that no copy waits for it
    for i in tl.range(open_from, edge_from, num_stages=STAGES):
        f, y, x, corner, inside, qf, qy, qx = _box(code, H, W, n, nf, ny, nx, F, image_at, BF, BY, BX, AXES, True)
        q = _box_of(Q, Q_BOX, b, h, f, y, x, corner, inside, cols, q_t, D, AXES, TMA)
        do = _box_of(DO, DO_BOX, b, h, f, y, x, corner, inside, cols, do_t, D, AXES, TMA)
        lse, delta = _stats_of(STATS, S_BOX, lane, f, y, x, corner + inside, AXES, TMA)
        code = tl.load(TABLE + i + 1)
        dk, dv = _key_step(dk, dv, k, v, q, do, lse, delta, qx[None, :] < 0, scale, False)
    for i in tl.range(edge_from, end, num_stages=STAGES):
        f, y, x, corner, inside, qf, qy, qx = _box(code, H, W, n, nf, ny, nx, F, image_at, BF, BY, BX, AXES, EVEN)
        q = _box_of(Q, Q_BOX, b, h, f, y, x, corner, inside, cols, q_t, D, AXES, TMA)
        do = _box_of(DO, DO_BOX, b, h, f, y, x, corner, inside, cols, do_t, D, AXES, TMA)
        lse, delta = _stats_of(STATS, S_BOX, lane, f, y, x, corner + inside, AXES, TMA)
        code = tl.load(TABLE + i + 1)
        near = _near(kf, ky, kx, qf, qy, qx, wf, wy, wx, bound, AXES, BOX)
        dk, dv = _key_step(dk, dv, k, v, q, do, lse, delta, near, scale, True)

    dk *= scale * LN2
    seen = there[:, None] & (cols < D)[None, :]
    if is_text & (pieces > 1):
        place = (((pid % pieces).to(tl.int64) * lanes + lane) * text + at - text_at) * 2
        tl.store(PART + place[:, None] * D + cols[None, :], dk, mask=seen)
        tl.store(PART + (place + 1)[:, None] * D + cols[None, :], dv, mask=seen)
    else:
        place = (b * own + at) * heads + h
        tl.store(DK + place[:, None] * D + cols[None, :], dk.to(DK.dtype.element_ty), mask=seen)
        tl.store(DV + place[:, None] * D + cols[None, :], dv.to(DV.dtype.element_ty), mask=seen)
