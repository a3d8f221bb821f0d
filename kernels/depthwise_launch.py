"""Launches of the depthwise convolution's kernels: block sizes, and how the grid is cut into programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import HAS_TRITON, multiprocessors
from .launch import Launch, Remembered

if HAS_TRITON:
    from . import depthwise_triton as triton_kernels


class Tile(NamedTuple):
    """Channels of a program (32 times those of a thread), columns of a warp, warps, programs that a multiprocessor
    holds at once, which follows from the registers, and rows that are on their way from memory."""

    channels: int
    columns: int
    warps: int
    programs: int
    ahead: int = 1


# by kernel size; none of these spills on sm_90
TILES = {
    "forward": {1: Tile(64, 4, 4, 16), 3: Tile(64, 4, 4, 5), 5: Tile(64, 4, 4, 3, 2), 7: Tile(64, 2, 4, 2)},
    "value": {1: Tile(64, 4, 4, 16), 3: Tile(64, 4, 4, 7), 5: Tile(64, 4, 4, 3, 4), 7: Tile(64, 2, 4, 2)},
    "weight": {1: Tile(64, 4, 4, 10), 3: Tile(64, 4, 4, 6), 5: Tile(64, 4, 4, 3), 7: Tile(64, 2, 4, 2)},
}
# partial sums of the weight's gradient may take this share of what goes in and comes out
SCRATCH = 0.04
# what a program costs beyond its rows and the halo, counted in rows
START = 6


def cut(height: int, reach: int, columns: int, slots: int, most: int) -> int:
    """Rows of a piece, so that `columns` strips of `height` rows take least time in `slots` that run side by side.

    A piece also reads `reach` rows above and below it. At most `most` pieces to a strip.
    """

    def time(pieces: int) -> int:
        halo = 0 if pieces == 1 else 2 * reach
        return -(-columns * pieces // slots) * (-(-height // pieces) + halo + START)

    return -(-height // min(range(1, max(1, min(most, height, 64)) + 1), key=time))


def _constants(tile: Tile, size: int, channels: int, dim: int, *tensors: Tensor) -> dict[str, Any]:
    run = 8  # channels that lie side by side and aligned where heads do not follow each other
    for x in tensors:
        if x.stride(2) != dim:
            run = math.gcd(run, dim, x.stride(2), x.stride(1))
    return {
        "K": size, "CHANNELS": tile.channels, "COLUMNS": tile.columns, "TILES": tile.warps, "num_warps": tile.warps,
        "WHOLE": channels % tile.channels == 0, "VECTOR": run, "FLAT": tensors[0].stride(2) == dim,
    }  # fmt: skip


@Remembered
def _convolution(
    v: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, out: Tensor, height: int, width: int,
    frames: int, flip: bool,
) -> Launch:  # fmt: skip
    batch, _, heads, dim = v.shape
    channels, size = heads * dim, weight.shape[-1]
    tile = TILES["value" if flip else "forward"][size]
    blocks, strips = -(-channels // tile.channels), -(-width // (tile.columns * tile.warps))
    images = batch * frames
    rows = cut(height, size // 2, blocks * strips * images, tile.programs * multiprocessors(v.device), height)
    more = v if add is None else add
    return Launch(
        triton_kernels.forward_kernel, (blocks * strips, -(-height // rows), images),
        (height, width, rows, blocks, frames, channels, dim, weight.shape[0],
         v.stride(0), v.stride(2), more.stride(0), more.stride(2), out.stride(0)),
        _constants(tile, size, channels, dim, v, more) | {
            "V_TOKEN": v.stride(1), "ADD_TOKEN": more.stride(1), "OUT_TOKEN": out.stride(1), "AHEAD": tile.ahead,
            "PADDED": 1 << (size * size - 1).bit_length(), "ADD_FLAT": more.stride(2) == dim, "FLIP": flip,
            "BIAS": bias is not None, "ADD": add is not None,
        },
    )  # fmt: skip


def convolve(
    v: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, out: Tensor, grid: Sequence[int],
    flip: bool = False,
) -> None:  # fmt: skip
    """Writes `add + conv(v)` into `out`, a part of a `[B, S, H, D]` tensor whose channels lie side by side; or `add`.

    With `flip` the weight points the other way: the convolution's gradient.
    """
    weight = weight.contiguous()
    run = _convolution(v, weight, bias, add, out, *grid[-2:], math.prod(grid[:-2]), flip)
    run(v, weight, weight if bias is None else bias, v if add is None else add, out)


class WeightGradient(NamedTuple):
    """The gradient of one weight from values of one layout: partial sums of this shape, and their sum."""

    partial: tuple[int, ...]
    parts: Launch
    total: Launch


@Remembered
def _weight_gradient(
    v: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, frames: int
) -> WeightGradient:
    batch, _, heads, dim = v.shape
    channels, size = heads * dim, weight.shape[-1]
    tile, taps = TILES["weight"][size], size * size
    blocks, strips = -(-channels // tile.channels), -(-width // (tile.columns * tile.warps))
    columns = strips * batch * frames
    room = SCRATCH * 3 * v.numel() * v.element_size() / (4 * (taps + 1) * channels)
    parts = max(1, min(tile.programs * multiprocessors(v.device) // blocks, int(room)))
    rows = cut(height, size // 2, columns, parts, height)
    chunks = -(-height // rows)
    units = columns * chunks
    share = -(-units // parts)
    parts = -(-units // share)
    return WeightGradient(
        (parts, taps + 1, channels),
        Launch(
            triton_kernels.weight_kernel, (blocks, parts, 1),
            (height, width, rows, chunks, strips, units, share, frames, channels, dim,
             *v.stride()[:3], *grad.stride()[:3]),
            _constants(tile, size, channels, dim, v, grad) | {"GRAD_FLAT": grad.stride(2) == dim},
        ),
        Launch(
            triton_kernels.sum_kernel, (-(-weight.shape[0] // 64), taps + 1, 1),
            (parts, channels // weight.shape[0], channels, weight.shape[0]),
            {"TAPS": taps, "BIAS": bias is not None, "ROWS": 16, "CHANNELS": 64, "num_warps": 4},
        ),
    )  # fmt: skip


def weight_gradient(
    v: Tensor, grad: Tensor, weight: Tensor, bias: Tensor | None, grid: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the weight and the bias: partial sums in fp32, added up in a fixed order."""
    recipe = _weight_gradient(v, grad, weight, bias, *grid[-2:], math.prod(grid[:-2]))
    partial = torch.empty(recipe.partial, dtype=torch.float32, device=v.device)
    recipe.parts(v, grad, partial)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=v.device)
    dbias = None if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=v.device)
    recipe.total(partial, dweight, dweight if dbias is None else dbias)
    return dweight, dbias
