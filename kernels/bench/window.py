"""Window attention (`linfusion.kernels.window_attention`) next to FlexAttention with the same mask and exact attention.

CLEAR on FLUX at 1024 to 8192 px (`g` token grid, `t` text tokens, `r` radius), the same radii as a `box` (the shape of
NATTEN's windows), and heads of 64 without text, as SDXL has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .. import reference, window_attention, window_pairs
from ..backend import without_triton
from . import peers
from .linear import random_qkv
from .op import DIRECTIONS, Call, Case, Op, Provider, View, head_views, shrunk
from .report import OURS, percent
from .table import Shape

if TYPE_CHECKING:
    from .runner import Session

TILE = (8, 16)
EXACT = "sdpa-cudnn"
FLEX = ("flex-raster", "flex-tiled")
# tokens that the specification can hold in float64; more are left to the tile-by-tile path, which tests hold to it
LARGEST = 20_000


def _case(px: int, radius: int, *words: str, forward_only: bool = False, skip: tuple[str, ...] = ()) -> Case:
    return _shaped(1, 24, px // 16, 128, 512, radius, *words, forward_only=forward_only, skip=skip)


def _shaped(
    batch: int, heads: int, side: int, dim: int, text: int, radius: int, *words: str,
    forward_only: bool = False, skip: tuple[str, ...] = (),
) -> Case:  # fmt: skip
    settings = (("g", (side, side)), ("t", text), ("r", radius), *((w, True) for w in words))
    shape = Shape(batch, heads, text + side * side, dim, settings)
    return Case("window", shape, directions=DIRECTIONS[:1] if forward_only else DIRECTIONS, skip=skip)


class Window(Op):
    name = "window"
    cases = (
        _case(2048, 8),
        _case(2048, 16),
        _case(8192, 16, forward_only=True),
        _case(8192, 8, forward_only=True, skip=(EXACT,)),
        _case(1024, 8, skip=FLEX),
        _case(1024, 16, skip=FLEX),
        _case(2048, 32, forward_only=True, skip=FLEX[1:]),
        _case(4096, 8, forward_only=True, skip=FLEX),
        _case(4096, 16, forward_only=True, skip=FLEX[1:]),
        _case(4096, 32, forward_only=True, skip=FLEX),
        _case(2048, 16, "box", skip=FLEX),
        _shaped(2, 10, 128, 64, 0, 16, skip=FLEX),
    )

    def run(self, cases: list[Case], session: Session) -> None:
        for case in cases:
            super().run([case], session)
            for line in rates(case, session):
                session.say(line)

    def passes(self, shape: Shape, direction: str) -> int:
        return 4 if direction == "forward" else 8  # q, k, v, out; then these, the gradient of out and three more

    def inputs(self, case: Case, device: torch.device) -> dict[str, Tensor]:
        return random_qkv(case, device)

    def ours(self, case: Case) -> Provider:
        return Provider(partial(window_attention, **_settings(case)))

    def oracle(self, case: Case) -> Call:
        if case.shape.tokens > LARGEST:
            return self.formula(case).call
        return partial(reference.window_attention, **_settings(case))

    def formula(self, case: Case) -> Provider:
        ours = self.ours(case).call

        def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
            with without_triton():
                return ours(q, k, v)

        return Provider(call)

    def peers(self, case: Case) -> dict[str, Callable[[], list[Provider]]]:
        return {
            "flex-raster": lambda: peers.compiled([flex(case.shape)]),
            "flex-tiled": lambda: peers.compiled([flex(case.shape, TILE)]),
            EXACT: lambda: [peers.exact(SDPBackend.CUDNN_ATTENTION)],
        }

    def views(self, case: Case) -> list[View]:
        return head_views(case.shape)

    def cut(self, case: Case, tokens: int) -> Case:
        """A grid of whole tiles."""
        columns = max(1, round(math.sqrt(tokens) / TILE[1]))
        grid = (TILE[0] * (2 * columns - 1), TILE[1] * columns)
        text, radius = case.shape.get("t") and tokens // 8 + 1, min(case.shape.get("r"), grid[0] // 2)
        return shrunk(case, text + math.prod(grid), g=grid, t=text, r=radius)


def _settings(case: Case) -> dict[str, Any]:
    shape = case.shape
    return {
        "grid": shape.get("g"), "radius": shape.get("r"), "text": shape.get("t"),
        "shape": "box" if shape.get("box") else "ellipsoid",
    }  # fmt: skip


def flex(shape: Shape, tile: tuple[int, int] | None = None, device: str = "cuda") -> Provider:
    """FlexAttention with the window as its mask: image tokens row by row, as CLEAR has published it, or tile by tile.

    Tokens are put in tiles before the clock starts: a model would do that once, not in each layer.
    """
    (rows, columns), text, radius, box = (shape.get(key) for key in ("g", "t", "r", "box"))

    def place(i: Tensor) -> tuple[Tensor, Tensor]:
        if tile is None:
            return i // columns, i % columns
        height, width = tile
        number, inside, across = i // (height * width), i % (height * width), columns // width
        return number // across * height + inside // width, number % across * width + inside % width

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        (q_y, q_x), (k_y, k_x) = place(q - text), place(k - text)
        y, x = q_y - k_y, q_x - k_x
        near = y * y + x * x < radius * radius
        if box:
            near = (y * y < radius * radius) & (x * x < radius * radius)
        return (q < text) | (k < text) | near

    build = create_block_mask if device == "cpu" else torch.compile(create_block_mask)
    mask = build(seen, None, None, shape.tokens, shape.tokens, device=device)
    y, x = place(torch.arange(rows * columns, device=device))
    order = torch.cat([torch.arange(text, device=device), text + y * columns + x])
    back = order.argsort()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flex_attention(q, k, v, block_mask=mask)

    return Provider(
        call, lambda name, x: peers.heads_first(name, x[:, order]), lambda name, x: peers.heads_first(name, x)[:, back]
    )


def pairs(shape: Shape) -> int:
    """How many (query, key) pairs of one head the window has."""
    grid, radius, text = shape.get("g"), shape.get("r"), shape.get("t")
    image = math.prod(window_pairs((n,), radius) for n in grid) if shape.get("box") else window_pairs(grid, radius)
    return image + text * (2 * math.prod(grid) + text)


def rates(case: Case, session: Session) -> Iterator[str]:
    """A line for each direction: the speed on the window's own pairs, next to exact attention's on all pairs."""
    shape = case.shape
    for direction in case.directions:
        products = 2 if direction == "forward" else 5
        taken = {
            r.provider: r.ms_p50 for r in session.rows
            if (r.op, r.shape, r.direction) == (case.op, str(shape), direction)
        }  # fmt: skip
        if OURS not in taken:
            continue
        work = 2 * products * shape.dim * shape.heads * shape.batch / 1e9
        ours = work * pairs(shape) / taken[OURS]
        line = f"  {direction}: {ours:.0f} TFLOP/s on the pairs in sight"
        if EXACT in taken:
            exact = work * shape.tokens**2 / taken[EXACT]
            line += f", {percent(ours / exact)} of the {exact:.0f} of {EXACT} on all pairs"
        yield line
