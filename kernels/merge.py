"""Token merging for Stable Diffusion (arXiv 2303.17604): similar tokens of a grid become one, and are copied back.

A merge is told by slots: which of the M tokens that are left each of the N tokens goes to. Slots have the grid's shape
whatever is merged, so that what decides it (the cell's side, the seed) may be a tensor that is only read when the op
runs: whole-model `torch.compile`, where the noise level cannot be read while tracing.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_SCORES = 2**24
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
    sums = x.new_zeros((x.shape[0], left, x.shape[2]), dtype=wide)
    counts = x.new_zeros((x.shape[0], left), dtype=wide)
    sums = sums.scatter_add(1, _columns(slots, x), x.to(wide))
    counts = counts.scatter_add(1, slots, counts.new_ones(()).expand(slots.shape))
    return (sums / counts[..., None]).to(x.dtype)


def unmerge(y: Tensor, slots: Tensor) -> Tensor:
    """`[B, M, C]` to `[B, N, C]`: every token takes what became of its slot."""
    return y.gather(1, _columns(slots, y))


def _columns(slots: Tensor, x: Tensor) -> Tensor:
    return slots[..., None].expand(-1, -1, x.shape[-1])


@torch.library.custom_op("linfusion::merge_slots", mutates_args=())
def _slots_op(x: Tensor, cell: Tensor, seed: Tensor, grid: Sequence[int], left: Sequence[int]) -> Tensor:
    targets, sources = (part.to(x.device) for part in _draw((grid[0], grid[1]), int(cell), int(seed)))
    # similarities in x's dtype, as published: at 2048 px they are more work than all attention, in fp32 by far
    unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(x.dtype)
    to = unit[:, targets].transpose(1, 2)
    chunk = max(1, _SCORES // (x.shape[0] * len(targets)))
    best = [(unit[:, part] @ to).max(dim=-1) for part in sources.split(chunk)]
    closest = torch.cat([b.indices for b in best], dim=1)
    order = torch.cat([b.values for b in best], dim=1).argsort(dim=-1, descending=True)
    slots = x.new_empty(len(left), *x.shape[:2], dtype=torch.int64)
    for plan, tokens in zip(slots, left, strict=True):
        if not 0 < tokens <= x.shape[1]:
            raise ValueError(f"{tokens} of {x.shape[1]} tokens cannot be left.")
        count, kept = min(x.shape[1] - tokens, len(sources)), max(tokens - len(targets), 0)
        plan[:, targets] = kept + torch.arange(len(targets), device=x.device)
        plan.scatter_(1, sources[order[:, count:]], torch.arange(kept, device=x.device).expand(x.shape[0], -1))
        gone = order[:, :count]
        plan.scatter_(1, sources[gone], kept + closest.gather(1, gone)).clamp_(max=tokens - 1)
    return slots


@_slots_op.register_fake
def _(x: Tensor, cell: int, seed: int, grid: list[int], left: list[int]) -> Tensor:
    return x.new_empty((len(left), *x.shape[:2]), dtype=torch.int64)


def _draw(grid: tuple[int, int], cell: int, seed: int) -> tuple[Tensor, Tensor]:
    """Targets, and all other tokens; drawn on the CPU: the same ones on every device."""
    rows, columns = grid[0] // cell, grid[1] // cell
    if rows * columns == 0:
        raise ValueError(f"A grid of {grid[0]} x {grid[1]} tokens has no {cell} x {cell} cell to merge into.")
    place = torch.randint(cell * cell, (rows, columns), generator=torch.Generator().manual_seed(seed))
    y = torch.arange(rows)[:, None] * cell + place // cell
    z = torch.arange(columns)[None] * cell + place % cell
    targets = (y * grid[1] + z).flatten()
    others = torch.ones(grid[0] * grid[1], dtype=torch.bool)
    others[targets] = False
    return targets, others.nonzero().flatten()
