"""Triton kernels of pooling agents from the grid: means of cells, and their gradient.

A grid is (frames, h, w). Cell c of n along an axis of L tokens has those from floor(c L / n) to ceil((c + 1) L / n), so
that cells overlap where n does not divide L.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

# no kernel is compiled again for another grid
GRID = ("frames", "height", "width", "across_f", "across_h", "across_w", "cover_f", "cover_h", "cover_w")


@triton.jit
def _first(cell, length, cells):
    return cell * length // cells


@triton.jit
def _stop(cell, length, cells):
    return ((cell + 1) * length + cells - 1) // cells


@triton.jit(do_not_specialize=GRID)
def pool_kernel(
    X, OUT, frames, height, width, across_f, across_h, across_w, heads, xb, xs, xh,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One cell of one head, `[B, n, H, D]`: grid (cells, H, B)."""
    cell, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    u, y, z = cell // (across_h * across_w), cell // across_w % across_h, cell % across_w
    first_u, first_y, first_z = _first(u, frames, across_f), _first(y, height, across_h), _first(z, width, across_w)
    tall = _stop(y, height, across_h) - first_y
    wide = _stop(z, width, across_w) - first_z
    count = (_stop(u, frames, across_f) - first_u) * tall * wide
    cols = tl.arange(0, BD)
    total = tl.zeros((BS, BD), tl.float32)
    for start in range(0, count, BS):
        i = start + tl.arange(0, BS)
        token = ((first_u + i // (tall * wide)) * height + first_y + i // wide % tall) * width + first_z + i % wide
        place = X + b * xb + h * xh + token.to(tl.int64)[:, None] * xs + cols[None, :]
        total += tl.load(place, mask=(i < count)[:, None] & (cols < D)[None, :], other=0.0).to(tl.float32)
    to = OUT + ((b * tl.num_programs(0) + cell) * heads + h) * D + cols
    tl.store(to, (tl.sum(total, 0) / count).to(OUT.dtype.element_ty), mask=cols < D)


@triton.jit
def _covering(at, offset, length, cells):
    """The cell so many places after the first that covers tokens `at`, how many tokens it has, 0 where none is."""
    cell = at * cells // length + offset
    first, stop = _first(cell, length, cells), _stop(cell, length, cells)
    return cell, tl.where((cell < cells) & (first <= at) & (at < stop), stop - first, 0)


@triton.jit(do_not_specialize=GRID)
def pool_backward_kernel(
    G, DX, frames, height, width, across_f, across_h, across_w, cover_f, cover_h, cover_w, heads, gb, gn, gh,
    D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """A block of tokens, each at most in `cover` cells along an axis: grid (blocks, H, B)."""
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i, cols = tl.program_id(0) * BS + tl.arange(0, BS), tl.arange(0, BD)
    tokens = frames * height * width
    total = tl.zeros((BS, BD), tl.float32)
    for offset in range(cover_f * cover_h * cover_w):
        u, deep = _covering(i // (height * width), offset // (cover_h * cover_w), frames, across_f)
        y, tall = _covering(i // width % height, offset // cover_w % cover_h, height, across_h)
        z, wide = _covering(i % width, offset % cover_w, width, across_w)
        count = deep * tall * wide
        there = (count > 0) & (i < tokens)
        cell = ((u * across_h + y) * across_w + z).to(tl.int64)
        place = G + b * gb + h * gh + cell[:, None] * gn + cols[None, :]
        grad = tl.load(place, mask=there[:, None] & (cols < D)[None, :], other=0.0).to(tl.float32)
        total += grad * (1.0 / tl.maximum(count, 1).to(tl.float32))[:, None]
    to = DX + ((b * tokens + i.to(tl.int64)) * heads + h)[:, None] * D + cols[None, :]
    tl.store(to, total.to(DX.dtype.element_ty), mask=(i < tokens)[:, None] & (cols < D)[None, :])
