"""Rotary position tables in the one form that every op takes."""

from typing import NamedTuple

import torch
from torch import Tensor


class RopeTables(NamedTuple):
    """Cosines and sines of a rotary embedding (RoFormer, arXiv 2104.09864, eq. 34).

    Attributes:
        cos, sin: one angle per token and channel, each pair's angle written twice: `[S, D]`, or
            `[B or 1, S, H or 1, D]` where samples or heads have angles of their own (Lumina 2, LTX).
        interleaved: True when channels (0, 1), (2, 3), ... form the pairs (FLUX, Wan, Qwen);
            False when channel i pairs with i + D / 2.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = True

    def slice(self, start: int, stop: int) -> "RopeTables":
        """The tables of tokens `start` to `stop`."""
        tokens = slice(start, stop) if self.cos.ndim == 2 else (slice(None), slice(start, stop))
        return RopeTables(self.cos[tokens], self.sin[tokens], self.interleaved)

    def expanded(self) -> tuple[Tensor, Tensor]:
        """cos and sin as `[B or 1, S, H or 1, D]`."""
        cos, sin = (t[None, :, None, :] if t.ndim == 2 else t for t in self[:2])
        return cos, sin


def rotate(x: Tensor, tables: RopeTables) -> Tensor:
    """Rotate `x` `[B, S, H, D]` by the tables, in fp32 at least; returns `x`'s dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(x.device, wide) for t in tables.expanded())
    y = x.to(wide)
    if tables.interleaved:
        a, b = y.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-b, a), dim=-1).flatten(-2)
    else:
        a, b = y.chunk(2, dim=-1)
        turned = torch.cat((-b, a), dim=-1)
    return (y * cos + turned * sin).to(x.dtype)
