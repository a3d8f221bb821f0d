"""Token merging for Stable Diffusion (arXiv 2303.17604): similar tokens of a grid become one, and are copied back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_SCORES = 2**24
"""Similarities held at a time."""


@dataclass(frozen=True)
class Merge:
    """Which tokens of `[B, N, C]` are merged into which: the `count` most similar sources, each into one target.

    Attributes:
        kept: `[B, N - T - count]`, sources that stay as they are.
        gone: `[B, count]`, sources that are merged.
        into: `[B, count]`, index into `targets` for each of them.
        targets: `[T]`, one token of every cell.
    """

    kept: Tensor
    gone: Tensor
    into: Tensor
    targets: Tensor

    @property
    def tokens(self) -> int:
        """Tokens that are left: N - count."""
        return self.kept.shape[1] + self.targets.shape[0]

    def merge(self, x: Tensor) -> Tensor:
        """`[B, N, C]` to `[B, N - count, C]`: kept tokens, then targets, each the mean of all that went into it."""
        targets = x[:, self.targets]
        index = _columns(self.into, x)
        targets = targets.scatter_reduce(1, index, x.gather(1, _columns(self.gone, x)), "mean", include_self=True)
        return torch.cat((x.gather(1, _columns(self.kept, x)), targets), dim=1)

    def unmerge(self, y: Tensor) -> Tensor:
        """`[B, N - count, C]` to `[B, N, C]`: a merged token takes its target's value."""
        kept, targets = y.split((self.kept.shape[1], self.targets.shape[0]), dim=1)
        out = y.new_empty(y.shape[0], self.tokens + self.gone.shape[1], y.shape[2])
        out[:, self.targets] = targets
        out = out.scatter(1, _columns(self.kept, y), kept)
        return out.scatter(1, _columns(self.gone, y), targets.gather(1, _columns(self.into, y)))


def merge_plans(x: Tensor, *, grid: tuple[int, int], cell: int, counts: tuple[int, ...], seed: int) -> list[Merge]:
    """Plans that merge different numbers of tokens into the same targets.

    Args:
        x: `[B, N, C]`, what similarity (cosine) is measured on.
        grid: `(h, w)`, h * w = N.
        cell: one token in every `cell x cell` block, drawn at random, is a target; rows and columns that do not fill
            a block have none.
        counts: tokens to merge, each cut off at the number of sources.
        seed: of the draw, the same for all samples (guidance needs equal halves).

    Raises:
        ValueError: no block fits on the grid.
    """
    rows, columns = grid[0] // cell, grid[1] // cell
    if rows * columns == 0:
        raise ValueError(f"A grid of {grid[0]} x {grid[1]} tokens has no {cell} x {cell} cell to merge into.")
    # drawn on the CPU: the same targets on every device
    place = torch.randint(cell * cell, (rows, columns), generator=torch.Generator().manual_seed(seed))
    y = torch.arange(rows)[:, None] * cell + place // cell
    z = torch.arange(columns)[None] * cell + place % cell
    targets = (y * grid[1] + z).flatten()
    sources = torch.ones(grid[0] * grid[1], dtype=torch.bool)
    sources[targets] = False
    targets, sources = targets.to(x.device), sources.nonzero().flatten().to(x.device)

    unit = F.normalize(x.detach().to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
    to = unit[:, targets].transpose(1, 2)
    chunk = max(1, _SCORES // (x.shape[0] * len(targets)))
    best = [(unit[:, part] @ to).max(dim=-1) for part in sources.split(chunk)]
    closest = torch.cat([b.indices for b in best], dim=1)
    order = torch.cat([b.values for b in best], dim=1).argsort(dim=-1, descending=True)
    plans = []
    for count in counts:
        count = max(0, min(count, len(sources)))
        gone, kept = order[:, :count], order[:, count:]
        plans.append(Merge(sources[kept], sources[gone], closest.gather(1, gone), targets))
    return plans


def _columns(index: Tensor, x: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, x.shape[-1])
