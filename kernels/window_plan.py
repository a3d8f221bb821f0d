"""Which boxes of keys each tile of queries sees: tables for the kernels, made once per grid and radius."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import window_weights

# frames, rows and columns of a box number in a table: 9, 11 and 11 bits
BITS = 11
Shape = tuple[int, int, int]


class Plan(NamedTuple):
    """Tables on the device.

    Attributes:
        boxes: int32, the boxes of all tiles one after the other; box numbers `frame << 22 | row << 11 | column`.
        starts: int32 `[2 * tiles + 1]`, for each tile where its open boxes begin (each token of the tile sees each of
            the box) and where those begin that need a mask.
        tiles: of queries, along each axis.
        weights, bound: within the window is `sum_i weights_i distance_i^2 < bound` (box: for each i), in fp32.
        even: whether tiles and boxes fit the grid exactly.
    """

    boxes: Tensor
    starts: Tensor
    tiles: Shape
    weights: tuple[float, float, float]
    bound: float
    even: bool


@functools.lru_cache(maxsize=64)
def rule(grid: Shape, radius: tuple[float, ...], box: bool) -> tuple[tuple[float, float, float], float] | None:
    """Weights and bound with which fp32 decides each pair of a grid as exact arithmetic does; None if it cannot."""
    weights, bound = window_weights(radius)
    missing = 3 - len(radius)
    weights, radius = [0.0] * missing + weights, (1.0,) * missing + radius
    squares = [
        torch.arange(min(n, math.ceil(r) + 1), dtype=torch.float64) ** 2 for n, r in zip(grid, radius, strict=True)
    ]
    f, y, x = (w * s for w, s in zip(weights, squares, strict=True))
    distance = torch.cat([f, y, x]) if box else (f[:, None, None] + y[:, None] + x).flatten()
    inside, largest = distance < bound, max(weights)
    scaled = tuple(w / largest for w in weights)
    if inside.all():
        return scaled, 1e20  # type: ignore[return-value]
    low, high = distance[inside].max().item(), distance[~inside].min().item()
    exact = set(scaled) <= {0.0, 1.0} and high < 1 << 23  # whole numbers
    if not exact and high - low < 4e-6 * high:
        return None
    return scaled, (low + high) / 2 / largest  # type: ignore[return-value]


@torch.compiler.assume_constant_result
def decidable(grid: Shape, radius: tuple[float, ...], box: bool) -> bool:
    """Whether there is a `rule`."""
    return rule(grid, radius, box) is not None


@functools.lru_cache(maxsize=16)
def plan(
    grid: Shape, weights: tuple[float, float, float], bound: float, box: bool, tile: Shape, block: Shape,
    device: torch.device,
) -> Plan:  # fmt: skip
    """Cached by value: grids with equally many tokens never share an entry."""
    with torch.inference_mode(False):
        tiles = tuple(-(-n // t) for n, t in zip(grid, tile, strict=True))
        boxes = tuple(-(-n // b) for n, b in zip(grid, block, strict=True))
        nearest, farthest = [], []
        for n, t, b, w, count, others in zip(grid, tile, block, weights, tiles, boxes, strict=True):
            q = torch.arange(count)[:, None] * t
            k = torch.arange(others)[None, :] * b
            q_last, k_last = (q + t - 1).clamp(max=n - 1), (k + b - 1).clamp(max=n - 1)
            apart = torch.maximum(torch.maximum(k - q_last, q - k_last), torch.zeros(()))
            nearest.append(apart.double() ** 2 * w)
            # padding of a ragged box is masked, never open
            whole = torch.where(k + b <= n, torch.maximum(k_last - q, q_last - k).double() ** 2 * w, math.inf)
            farthest.append(whole)
        seen, counts, opened = [], [], []
        reach = [_reach(near, bound) for near in nearest]
        for f in range(tiles[0]):
            for y in range(tiles[1]):
                near = _sum(nearest, reach, f, y, box)
                far = _sum(farthest, reach, f, y, box)
                (f0, f1), (y0, y1) = reach[0][f], reach[1][y]
                code = (torch.arange(f0, f1)[:, None, None] << 2 * BITS) | (torch.arange(y0, y1)[:, None] << BITS)
                code = (code | torch.arange(boxes[2])).flatten()
                # [tiles in x, boxes]: 0 open, 1 masked, 2 out of sight
                kind = torch.where(far < bound, 0, torch.where(near < bound, 1, 2)).to(torch.uint8)
                order = kind.sort(dim=1, stable=True)
                here = order.values < 2
                seen.append(code.expand(len(kind), -1).gather(1, order.indices)[here])
                counts.append(here.sum(1))
                opened.append((kind == 0).sum(1))
        count, open_ = torch.cat(counts), torch.cat(opened)
        begin = torch.cat([torch.zeros(1, dtype=torch.long), count.cumsum(0)])
        starts = torch.stack([begin[:-1], begin[:-1] + open_], 1).flatten()
        starts = torch.cat([starts, begin[-1:]]).to(device, torch.int32)
        # one more, which is read ahead and never used
        table = torch.cat([*seen, code.new_zeros(1)]).to(device, torch.int32)
    even = all(n % t == 0 and n % b == 0 for n, t, b in zip(grid, tile, block, strict=True))
    return Plan(table, starts, tiles, weights, bound, even)  # type: ignore[arg-type]


def _reach(near: Tensor, bound: float) -> list[tuple[int, int]]:
    """First and last box, exclusive, that each tile can reach along one axis."""
    within = near < bound
    first = within.int().argmax(1)
    return list(zip(first.tolist(), (first + within.sum(1)).tolist(), strict=True))


def _sum(axes: list[Tensor], reach: list[list[tuple[int, int]]], f: int, y: int, box: bool) -> Tensor:
    (f0, f1), (y0, y1) = reach[0][f], reach[1][y]
    a, b, c = axes[0][f, f0:f1], axes[1][y, y0:y1], axes[2]
    join = torch.maximum if box else torch.add
    return join(join(a[:, None, None], b[:, None])[None], c[:, None, None, :]).flatten(1)
