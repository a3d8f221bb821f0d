"""CLEAR: each image token attends to its neighbours and to all text (arXiv 2412.16112, eq. 4 to 6)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..call import AttnCall, Site
from ..kernels import pool_grid, window_attention, window_pairs
from ..kernels.checks import check_radius
from .base import Mechanism, MechanismConfig


@dataclass(frozen=True)
class CLEAR(MechanismConfig):
    """Softmax attention within a disc of the token grid. With a radius that covers the grid it is exact attention.

    Args:
        radius: in tokens of each layer's own grid, strict (`dy^2 + dx^2 < radius^2`); one number is a disc (2-D) or a
            ball (video), one number per axis an ellipsoid. Published: 8, 16, 32.
        pool: also show every image query the keys and values averaged over `pool x pool` cells (per frame on video),
            with trained weights; 1 is none. Published: 4. Cost then grows with the square of the tokens / pool^2.
    """

    name: ClassVar[str] = "clear"
    radius: float | tuple[float, ...]
    pool: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.radius, list):
            object.__setattr__(self, "radius", tuple(self.radius))
        check_radius(self.radius)
        if isinstance(self.pool, bool) or not isinstance(self.pool, int) or self.pool < 1:
            raise ValueError(f"pool must be a whole number of tokens, 1 for none, got {self.pool!r}.")

    def build(self, site: Site) -> Mechanism:
        try:
            check_radius(self.radius, site.axes)
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from None
        return CLEARAttention(self, site)


class CLEARAttention(Mechanism):
    config: CLEAR
    kernel = "window_attention"
    needs = frozenset({"grid"})

    def __init__(self, config: CLEAR, site: Site) -> None:
        super().__init__(config, site)
        if config.pool > 1:  # one weight per place in a cell, shared by heads, channels, keys and values
            self.pool_weight = nn.Parameter(torch.full((config.pool, config.pool), config.pool**-2))

    def forward(self, call: AttnCall) -> Tensor:
        assert call.grid is not None  # the processor has checked `needs`
        q, k = call.rotated()
        pooled_k = pooled_v = None
        if self.config.pool > 1:
            # side by side through one call, so that a compiled graph knows both to be equally long
            image = torch.cat((call.split(k)[1], call.split(call.v)[1]), dim=2)
            pooled_k, pooled_v = pool_grid(image, grid=call.grid, weight=self.pool_weight).split(
                (k.shape[2], call.v.shape[2]), dim=2
            )
        out = window_attention(
            q, k, call.v, grid=call.grid, radius=self.config.radius, text=call.text, text_first=call.text_first,
            text_mask=call.text_mask, scale=call.scale, pooled_k=pooled_k, pooled_v=pooled_v,
        )  # fmt: skip
        assert isinstance(out, Tensor)  # a pair only with return_lse
        return out

    def pairs(self, grid: tuple[int, ...], text: int) -> float:
        tokens, pool = math.prod(grid), self.config.pool
        pooled = 0
        if pool > 1:
            pooled = math.prod(grid[:-2]) * math.ceil(grid[-2] / pool) * math.ceil(grid[-1] / pool)
        return window_pairs(grid, self.config.radius) + tokens * (text + pooled) + text * (tokens + text)
