"""The convolution of v added onto the attention, alone (LiT's 5 x 5, Agent's 3 x 3) and with the attention (LiT)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import depthwise_conv, linear_attention, reference
from . import peers
from .linear import random_qkv
from .op import Call, Case, Op, Provider, View, head_views, shrunk, small_grid
from .table import Shape

EPS = 1e-6
WEIGHTS = frozenset({"weight", "bias"})


def _shape(batch: int, heads: int, side: int, dim: int, kernel: int, *words: str) -> Shape:
    settings = (("g", (side, side)), ("c", kernel), *((w, True) for w in words))
    return Shape(batch, heads, side * side, dim, settings)


def _weights(case: Case, device: torch.device) -> dict[str, Tensor]:
    """`[D, k, k]` shared by the heads, or with the word `channels` `[H * D, k, k]`; about unit gain."""
    side, channels = case.shape.get("c"), case.shape.dim * (case.shape.heads if case.shape.get("channels") else 1)
    weight = torch.randn(channels, side, side, device=device, dtype=case.dtype) / side
    bias = torch.randn(channels, device=device, dtype=case.dtype)
    return {"weight": weight.requires_grad_(), "bias": bias.requires_grad_()}


class Grid(Op):
    """Cases on a square grid, checked head by head."""

    def views(self, case: Case) -> list[View]:
        return head_views(case.shape, WEIGHTS)

    def cut(self, case: Case, tokens: int) -> Case:
        grid = small_grid(tokens)
        return shrunk(case, grid[0] * grid[1], g=grid)


class Depthwise(Grid):
    name = "depthwise"
    cases = (
        Case("depthwise", _shape(2, 10, 128, 64, 5)),
        Case("depthwise", _shape(1, 24, 128, 128, 5)),
        Case("depthwise", _shape(1, 24, 256, 128, 5)),
        Case("depthwise", _shape(2, 10, 128, 64, 3, "channels")),
        Case("depthwise", _shape(2, 16, 64, 72, 5), small=True),
    )

    def passes(self, shape: Shape, direction: str) -> int:
        return 3  # v, add, out; then v and the gradients of out and v: that of add is out's own

    def inputs(self, case: Case, device: torch.device) -> dict[str, Tensor]:
        v, add = list(random_qkv(case, device).values())[:2]
        return {"v": v, "add": add, **_weights(case, device)}

    def ours(self, case: Case) -> Provider:
        grid = case.shape.get("g")

        def call(v: Tensor, add: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return depthwise_conv(v, grid=grid, weight=weight, bias=bias, add=add)

        return Provider(call)

    def oracle(self, case: Case) -> Call:
        grid = case.shape.get("g")

        def call(v: Tensor, add: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return add + reference.depthwise_conv(v, grid=grid, weight=weight, bias=bias)

        return call

    def formula(self, case: Case) -> Provider:
        return self._eager(case)[0]

    def peers(self, case: Case) -> dict[str, Callable[[], list[Provider]]]:
        return {"torch": lambda: self._eager(case), "torch.compile": lambda: peers.compiled(self._eager(case))}

    def _eager(self, case: Case) -> list[Provider]:
        return peers.eager_conv(case.shape.get("g"), case.shape.dim)


class LiT(Grid):
    name = "lit"
    cases = (
        Case("lit", _shape(2, 10, 128, 64, 5), small=True),
        Case("lit", _shape(1, 24, 128, 128, 5)),
        Case("lit", _shape(1, 24, 256, 128, 5)),
        Case("lit", _shape(2, 16, 64, 72, 5), small=True),
    )

    def passes(self, shape: Shape, direction: str) -> int:
        return 4 if direction == "forward" else 7

    def inputs(self, case: Case, device: torch.device) -> dict[str, Tensor]:
        return {**random_qkv(case, device), **_weights(case, device)}

    def ours(self, case: Case) -> Provider:
        grid = case.shape.get("g")

        def call(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            out = linear_attention(q, k, v, feature_map="relu_eps", eps=EPS)
            return depthwise_conv(v, grid=grid, weight=weight, bias=bias, add=out, inplace=True)

        return Provider(call)

    def oracle(self, case: Case) -> Call:
        grid = case.shape.get("g")

        def call(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            out = reference.linear_attention(q, k, v, feature_map="relu_eps", eps=EPS)
            return out + reference.depthwise_conv(v, grid=grid, weight=weight, bias=bias)

        return call

    def formula(self, case: Case) -> Provider:
        return peers.eager_lit(case.shape.get("g"), EPS)[0]

    def peers(self, case: Case) -> dict[str, Callable[[], list[Provider]]]:
        grid = case.shape.get("g")
        return {
            "torch": lambda: peers.eager_lit(grid, EPS),
            "torch.compile": lambda: peers.compiled(peers.eager_lit(grid, EPS)),
        }
