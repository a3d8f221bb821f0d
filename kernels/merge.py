"""Token merging for Stable Diffusion (arXiv 2303.17604): similar tokens of a grid become one, and are copied back.

A merge is told by slots: which of the M tokens that are left each of the N tokens goes to. Slots have the grid's shape
whatever is merged, so that what decides it (the cell's side, the seed) may be a tensor that is only read when the op
runs: whole-model `torch.compile`, where the noise level cannot be read while tracing.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_SCORES = 2**26
"""Similarities held at a time."""


def merge_slots(x: Tensor, *, grid: Sequence[int], cell: Tensor, left: Sequence[int], seed: Tensor) -> Tensor:
    """Plans that merge different numbers of tokens into the same targets: the most similar ones, each into one target.

    Args:
        x: `[B, N, C]`, what similarity (cosine) is measured on.
        grid: `(h, w)`, h * w = N.
        cell: an integer; one token in every `cell x cell` block, drawn at random, is a target. Rows and columns that
            do not fill a block have none.
        left: tokens that each plan leaves, M; see `tokens_left`. Where that is less than there are targets, the last
            ones become one.
        seed: an integer, of the draw; the same for all samples (guidance needs equal halves).

    Returns:
        `[len(left), B, N]` int64, slots below M: tokens that stay as they are first, then targets row by row.

    Raises:
        ValueError: no block fits on the grid, or more tokens are to be left than there are.
    """
    return _slots_op(x.detach(), cell, seed, list(grid), list(left))


def tokens_left(count: int, *, grid: Sequence[int], cell: int) -> int:
    """How many tokens of a grid are left when `count` are to be merged: targets stay."""
    return grid[0] * grid[1] - max(0, min(count, grid[0] * grid[1] - (grid[0] // cell) * (grid[1] // cell)))


def merge(x: Tensor, slots: Tensor, left: int) -> Tensor:
    """`[B, N, C]` to `[B, left, C]`, each the mean of all that goes to its slot; `slots` is `[B, N]`.

    Summed and counted in fp32: flat regions send hundreds of tokens to one slot, and bf16 has no 257.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = x.new_zeros((x.shape[0], left, x.shape[2]), dtype=wide).scatter_add_(1, _columns(slots, x), x.to(wide))
    ones = x.new_ones((1, 1), dtype=wide).expand(slots.shape)
    counts = x.new_zeros((x.shape[0], left), dtype=wide).scatter_add_(1, slots, ones)
    return (sums / counts[..., None]).to(x.dtype)


def unmerge(y: Tensor, slots: Tensor) -> Tensor:
    """`[B, M, C]` to `[B, N, C]`: every token takes what became of its slot."""
    return y.gather(1, _columns(slots, y))


def _columns(slots: Tensor, x: Tensor) -> Tensor:
    return slots[..., None].expand(-1, -1, x.shape[-1])


@torch.library.custom_op("linfusion::merge_slots", mutates_args=())
def _slots_op(x: Tensor, cell: Tensor, seed: Tensor, grid: Sequence[int], left: Sequence[int]) -> Tensor:
    (batch, tokens), side = x.shape[:2], int(cell)
    ordered, place = _draw((grid[0], grid[1]), side, int(seed)).to(x.device)
    targets = (grid[0] // side) * (grid[1] // side)
    # similarities in x's dtype, as published: at 2048 px they are more work than all attention, in fp32 by far
    unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(x.dtype)[:, ordered]
    to = unit[:, :targets].mT
    chunk = max(1, _SCORES // (batch * targets))
    best = [(part @ to).max(dim=-1) for part in unit[:, targets:].split(chunk, dim=1)]
    values, closest = best[0] if len(best) == 1 else (torch.cat(parts, dim=1) for parts in zip(*best, strict=True))
    # ranks of the sources, the most similar first; targets go before all, each to itself
    rank = torch.full((batch, tokens), -1, dtype=torch.int64, device=x.device)
    counted = torch.arange(tokens, device=x.device).expand(batch, -1)
    rank[:, targets:].scatter_(1, values.argsort(dim=-1, descending=True), counted)
    rank = rank[:, place]
    closest = torch.cat((counted[:, :targets], closest), dim=1)[:, place]
    plans = []
    for few in left:
        if not 0 < few <= tokens:
            raise ValueError(f"{few} of {tokens} tokens cannot be left.")
        count, kept = min(tokens - few, tokens - targets), max(few - targets, 0)
        plans.append(torch.where(rank < count, closest + kept, rank - count).clamp_(max=few - 1))
    return torch.stack(plans)


@_slots_op.register_fake
def _(x: Tensor, cell: int, seed: int, grid: list[int], left: list[int]) -> Tensor:
    return x.new_empty((len(left), *x.shape[:2]), dtype=torch.int64)


def _draw(grid: tuple[int, int], cell: int, seed: int) -> Tensor:
    """All tokens, targets first, and where among them each token is, `[2, N]`.

    Drawn on the CPU: the same ones on every device.
    """
    corners, inside = _cells(grid, cell)
    generator = torch.Generator().manual_seed(seed)
    targets = corners + inside[torch.randint(cell * cell, corners.shape, generator=generator)]
    others = torch.ones(grid[0] * grid[1], dtype=torch.bool)
    others[targets] = False
    ordered = torch.cat((targets, others.nonzero()[:, 0]))
    return torch.stack((ordered, ordered.argsort()))


@lru_cache(maxsize=8)
def _cells(grid: tuple[int, int], cell: int) -> tuple[Tensor, Tensor]:
    """The first token of each cell, and how much further its tokens are."""
    rows, columns = grid[0] // cell, grid[1] // cell
    if rows * columns == 0:
        raise ValueError(f"A grid of {grid[0]} x {grid[1]} tokens has no {cell} x {cell} cell to merge into.")
    with torch.inference_mode(False):  # the cache outlives an inference-mode caller
        across, down = torch.arange(columns) * cell, torch.arange(rows)[:, None] * (cell * grid[1])
        step = torch.arange(cell)
        return (down + across).flatten(), (step[:, None] * grid[1] + step).flatten()
