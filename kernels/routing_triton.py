"""Triton kernels that choose key blocks for query blocks: block means, their products, the highest of each row.

All sums are in fp32. What is chosen is written as lists of block numbers in rising order, one list to a query block;
`list_kernel` turns a map the other way, into one list of query blocks to a key block.
"""

import triton
import triton.language as tl

from .linear_triton import _aligned

HUGE = tl.constexpr(3.0e38)


@triton.jit
def means_kernel(
    X, OUT, tokens, blocks, heads, xb, xs, xh,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
    PIVOT: tl.constexpr,
):  # fmt: skip
    """Means over blocks of tokens, `[B * H, blocks, D]`: grid (blocks, B * H).

    PIVOT takes the first token off all the others: what they share must not drown the rest in rounding.
    """
    block, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows, cols = tl.arange(0, BS), tl.arange(0, BD)
    xb, xs, xh = _aligned(xb, ALIGN), _aligned(xs, ALIGN), _aligned(xh, ALIGN)
    X += b * xb + h * xh
    held = tl.minimum(BLOCK, tokens - block * BLOCK)
    total = tl.zeros((BS, BD), tl.float32)
    if PIVOT:
        pivot = tl.load(X + cols, mask=cols < D, other=0.0).to(tl.float32)
    X += (block * BLOCK).to(tl.int64) * xs
    for i in tl.static_range((BLOCK + BS - 1) // BS):
        row = i * BS + rows
        there = (row < held)[:, None] & (cols < D)[None, :]
        x = tl.load(X + row[:, None] * xs + cols[None, :], mask=there, other=0.0).to(tl.float32)
        if PIVOT:
            x = tl.where(there, x - pivot[None, :], 0.0)
        total += x
    mean = tl.sum(total, 0) / held
    tl.store(OUT + (bh.to(tl.int64) * blocks + block) * D + cols, mean, mask=cols < D)


@triton.jit
def centre_kernel(
    MEANS, OUT, tokens, blocks, D: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The mean over all tokens out of block means, `[B * H, D]`: grid (B * H, tiles of D)."""
    bh, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, cols = tl.arange(0, BN), tile * BC + tl.arange(0, BC)
    MEANS += bh * blocks * D
    total = tl.zeros((BN, BC), tl.float32)
    for first in range(0, blocks, BN):
        n = first + rows
        x = tl.load(MEANS + n[:, None] * D + cols[None, :], mask=(n < blocks)[:, None] & (cols < D)[None, :], other=0.0)
        total += x * tl.minimum(BLOCK, tokens - n * BLOCK).to(tl.float32)[:, None]
    tl.store(OUT + bh * D + cols, tl.sum(total, 0) / tokens, mask=cols < D)


@triton.jit
def scores_kernel(
    PQ, PK, CENTRE, OUT, queries, keys, group,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of query block means and centred key block means: grid (tiles of queries, tiles of keys, B * H)."""
    bh = tl.program_id(2).to(tl.int64)
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    PQ += bh * queries * D
    PK += bh // group * keys * D
    CENTRE += bh // group * D
    scores = tl.zeros((BM, BN), tl.float32)
    for first in tl.range(0, D, BC, num_stages=1):
        cols = first + tl.arange(0, BC)
        ok = cols < D
        a = tl.load(PQ + m[:, None] * D + cols[None, :], mask=(m < queries)[:, None] & ok[None, :], other=0.0)
        b = tl.load(PK + n[:, None] * D + cols[None, :], mask=(n < keys)[:, None] & ok[None, :], other=0.0)
        b -= tl.load(CENTRE + cols, mask=ok, other=0.0)[None, :]
        scores = tl.dot(a, tl.trans(b), scores, input_precision=PRECISION)
    place = bh * queries * keys + m.to(tl.int64)[:, None] * keys + n[None, :]
    tl.store(OUT + place, scores, mask=(m < queries)[:, None] & (n < keys)[None, :])


@triton.jit
def _highest(x, there, count):
    """Which are the `count` highest of each row of `x`; of equals the first ones.

    Bisection between the row's least and highest number, until exactly `count` are no lower, or no number is between.
    """
    least = tl.min(tl.where(there, x, HUGE), 1)
    beyond = tl.max(tl.where(there, x, -HUGE), 1)
    # the highest itself is enough where there are `count` of it
    ties = tl.sum((there & (x >= beyond[:, None])).to(tl.int32), 1) >= count
    least = tl.where(ties, beyond, least)
    middle = least * 0.5 + beyond * 0.5
    open = ((middle > least) & (middle < beyond)).to(tl.int32)
    while tl.sum(open) > 0:
        no_lower = tl.sum((there & (x >= middle[:, None])).to(tl.int32), 1)
        least = tl.where((open > 0) & (no_lower >= count), middle, least)
        beyond = tl.where((open > 0) & (no_lower < count), middle, beyond)
        middle = least * 0.5 + beyond * 0.5
        open = (open > 0) & (no_lower != count) & (middle > least) & (middle < beyond)
        open = open.to(tl.int32)
    above, equal = there & (x > least[:, None]), there & (x == least[:, None])
    room = count - tl.sum(above.to(tl.int32), 1)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= room[:, None]))


@triton.jit
def _write(INDEX, START, m, n, hit, queries, width):
    """Lists of equal `width`, one to a row of `hit`."""
    place = INDEX + (m * width)[:, None] + tl.cumsum(hit.to(tl.int32), 1) - 1
    tl.store(place, tl.broadcast_to(n[None, :], hit.shape), mask=hit & (m < queries)[:, None])
    tl.store(START + m, m * width, mask=m <= queries)


@triton.jit
def select_kernel(
    SCORES, INDEX, START, OTHER, OTHER_START, queries, keys, chosen, dropped,
    ROWS: tl.constexpr, BN: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Lists of the `chosen` highest of each row, and a last list of all: grid (tiles of queries + 1, B * H).

    SECOND 1: other lists of what is chosen and the `dropped` lowest; 2: of what is neither.
    """
    tile, bh, n = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, BN)
    m = tile * ROWS + tl.arange(0, ROWS)
    INDEX += bh * (queries * chosen + keys)
    START += bh * (queries + 2)
    if tile == tl.num_programs(0) - 1:
        tl.store(START + queries + 1, queries * chosen + keys)
        tl.store(INDEX + queries * chosen + n, n, mask=n < keys)
    else:
        there = (m < queries + 1)[:, None] & (n < keys)[None, :]
        place = SCORES + (bh * queries + m)[:, None] * keys + n[None, :]
        x = tl.load(place, mask=there & (m < queries)[:, None], other=0.0)
        x = tl.where(x > -HUGE, tl.minimum(x, HUGE), -HUGE)  # neither infinite nor NaN
        best = _highest(x, there, chosen)
        _write(INDEX, START, m, n, best, queries, chosen)
        if SECOND > 0:
            above = _highest(x, there, keys - dropped)
            if SECOND == 1:
                second, width = there & (best | (above == 0)), chosen + dropped
            else:
                second, width = above & (best == 0), keys - chosen - dropped
            _write(OTHER + bh * queries * width, OTHER_START + bh * (queries + 1), m, n, second, queries, width)


@triton.jit
def list_kernel(
    MAP, START, INDEX, lists, entries, capacity, starts, mg, ml, me, BL: tl.constexpr, BE: tl.constexpr
):  # fmt: skip
    """Lists of what is not zero in a map of bytes: grid (tiles of lists + 1, groups).

    The map has strides `mg` to the next group, `ml` to the next list, `me` to the next entry. List `lists`, of all
    entries, is written by the last tile where `starts` has room for it.
    """
    tile, g = tl.program_id(0), tl.program_id(1).to(tl.int64)
    entry = tl.arange(0, BE)
    INDEX += g * capacity
    START += g * starts
    if tile * BL >= lists:
        if starts > lists + 1:
            at = tl.load(START + lists)
            for first in range(0, entries, BE):
                tl.store(INDEX + at + first + entry, first + entry, mask=first + entry < entries)
    else:
        which = tile * BL + tl.arange(0, BL)
        at = tl.load(START + which, mask=which < lists, other=0)
        for first in range(0, entries, BE):
            ok = (first + entry < entries)[:, None] & (which < lists)[None, :]
            place = MAP + g * mg + (first + entry).to(tl.int64)[:, None] * me + which.to(tl.int64)[None, :] * ml
            hit = (tl.load(place, mask=ok, other=0) != 0).to(tl.int32)
            value = tl.broadcast_to((first + entry)[:, None], (BE, BL))
            tl.store(INDEX + at[None, :] + tl.cumsum(hit, 0) - 1, value, mask=hit != 0)
            at += tl.sum(hit, 0)
