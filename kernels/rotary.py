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

    def to(self, device: torch.device) -> "RopeTables":
        """The tables on another device."""
        return RopeTables(self.cos.to(device), self.sin.to(device), self.interleaved)

    def slice(self, start: int, stop: int) -> "RopeTables":
        """The tables of tokens `start` to `stop`."""
        tokens = slice(start, stop) if self.cos.ndim == 2 else (slice(None), slice(start, stop))
        return RopeTables(self.cos[tokens], self.sin[tokens], self.interleaved)

    def still(self, tokens: int, *, first: bool) -> "RopeTables":
        """With so many tokens more that do not turn, before the others or after them."""

        def extend(table: Tensor, value: float) -> Tensor:
            axis = 0 if table.ndim == 2 else 1
            more = table.new_full((*table.shape[:axis], tokens, *table.shape[axis + 1 :]), value)
            return torch.cat((more, table) if first else (table, more), dim=axis)

        return RopeTables(extend(self.cos, 1.0), extend(self.sin, 0.0), self.interleaved)

    def expanded(self) -> tuple[Tensor, Tensor]:
        """cos and sin as `[B or 1, S, H or 1, D]`."""
        cos, sin = (t[None, :, None, :] if t.ndim == 2 else t for t in self[:2])
        return cos, sin


def alike(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Tables as kernels read them: both with the same strides, channels side by side."""
    if cos is None or sin is None or (sin.stride() == cos.stride() and cos.stride(-1) == 1):
        return cos, sin
    return cos.contiguous(), sin.contiguous()


def _fitting(x: Tensor) -> tuple[tuple[int, ...], ...]:
    """What each axis of expanded tables may be for `x` `[B, S, H, D]`."""
    batch, tokens, heads, dim = x.shape
    return (1, batch), (tokens,), (1, heads), (dim,)


def check_tables(x: Tensor, tables: RopeTables) -> None:
    """ValueError unless the tables have the length and head dim of `x` `[B, S, H, D]`, its batch and heads or one."""
    have = tables.cos.shape if tables.cos.ndim == 4 else (1, tables.cos.shape[0], 1, tables.cos.shape[-1])
    if any(n not in allowed for n, allowed in zip(have, _fitting(x), strict=True)):
        raise ValueError(f"Rotation tables {tuple(tables.cos.shape)} do not fit [B, S, H, D] = {tuple(x.shape)}.")


def rotate(x: Tensor, tables: RopeTables) -> Tensor:
    """Rotate `x` `[B, S, H, D]` by the tables, in fp32 at least; returns `x`'s dtype.

    Raises:
        ValueError: tables of another length or head dim, or of another batch or number of heads that is not one.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    check_tables(x, tables)
    cos, sin = (t.to(x.device, wide) for t in tables.expanded())
    y = x.to(wide)
    if tables.interleaved:
        a, b = y.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-b, a), dim=-1).flatten(-2)
    else:
        a, b = y.chunk(2, dim=-1)
        turned = torch.cat((-b, a), dim=-1)
    return (y * cos + turned * sin).to(x.dtype)
