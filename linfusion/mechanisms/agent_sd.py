"""AgentSD: Agent Attention on a trained UNet without training (arXiv 2312.08874, and its code)."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..call import AttnCall, Merged, Site
from ..kernels import agent_attention
from ..kernels.merge import merge_plans
from .base import Mechanism, MechanismConfig


@dataclass(frozen=True)
class AgentSD(MechanismConfig):
    """Token merging, and while the picture's layout forms, attention through a few merged tokens (agents).

    Training-free and meant for UNets, where it acts on the layers of the finest attention grid only (half the latents'
    in SDXL). Similarity is measured on the layer's input, after the block's norm. Early steps:
    `softmax(s^agent_power Q A^T) softmax(s A K^T) V + shortcut V` over merged tokens, s = D^-0.5, A the queries of
    tokens merged further; late steps: softmax attention over merged tokens. Defaults are the published settings (there,
    SD 1.5 in 50 steps: FID 28.15, 28.84 untouched).

    Args:
        early: share of the noise schedule, from pure noise on, with agents. The timestep tells, so with evenly spaced
            steps it is a share of the steps.
        merge: share of the tokens merged away before the projections.
        agent_merge: the same for the agents, out of all tokens; at least one token in each cell is left.
        cell, late_cell: side of the blocks with one target each, in early and in late steps.
        agent_power: exponent on s in the second softmax; 0.3 makes it D^-0.15, sharper than D^-0.5.
        shortcut: how much of V is added.
    """

    name: ClassVar[str] = "agent-sd"
    early: float = 0.4
    merge: float = 0.4
    agent_merge: float = 0.95
    cell: int = 4
    late_cell: int = 2
    agent_power: float = 0.3
    shortcut: float = 0.075

    def __post_init__(self) -> None:
        for name in ("early", "merge", "agent_merge"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be a share between 0 and 1, got {value!r}.")
        for name in ("cell", "late_cell"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 2:
                raise ValueError(f"{name} must be a whole number of tokens, at least 2, got {value!r}.")
        for name in ("agent_power", "shortcut"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} must be a number, got {value!r}.")

    def passes(self, site: Site) -> str | None:
        return "AgentSD acts on the finest grid only" if site.level else None

    def build(self, site: Site) -> Mechanism:
        if site.joint:
            raise NotImplementedError(
                f"{site.name}: AgentSD reaches keys only through merged picture tokens, which gives the text in this "
                "layer's sequence no queries of its own. Agent keeps text exact."
            )
        if site.rotary:
            raise NotImplementedError(
                f"{site.name}: AgentSD merges tokens before the projections, and a merged token stands at no grid "
                "position that this layer's rotation could turn it by. Agent pools after the rotation."
            )
        if site.axes != 2:
            raise NotImplementedError(
                f"{site.name}: AgentSD merges on (h, w) grids, this layer's has {site.axes} axes."
            )
        return AgentSDAttention(self, site)


class AgentSDAttention(Mechanism):
    config: AgentSD
    needs = frozenset({"grid", "time"})
    merges_tokens = True

    def merge(self, x: Tensor) -> Merged:
        config, time, grid = self.config, self.clock.time, self.layout.grid
        assert time is not None and isinstance(grid, tuple)  # the processor has checked `needs`
        early, tokens = time >= 1 - config.early, x.shape[1]
        counts = int(config.merge * tokens), int(config.agent_merge * tokens)
        # another draw for each step and layer, the same draw whenever this one is run again
        seed = zlib.crc32(f"{self.site.name} {time:.6f}".encode())
        cell = config.cell if early else config.late_cell
        few, fewer = merge_plans(x, grid=(grid[0], grid[1]), cell=cell, counts=counts, seed=seed)
        # agents pay where two passes over them cost less than one over all tokens
        agents = fewer.merge(x) if early and 2 * fewer.tokens < few.tokens else None
        return Merged(few.merge(x), agents, few.unmerge)

    def forward(self, call: AttnCall) -> Tensor:
        q, k = call.rotated()  # only norms: no layer that rotates is taken
        if call.agents is None:
            return call.exact(q, k, call.v)
        agents = (call.agents if call.norms is None else call.norms.q(call.agents)).to(q.dtype)
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        out = agent_attention(q, k, call.v, agents, scale=scale, agent_scale=scale**self.config.agent_power)
        return torch.add(out, call.v, alpha=self.config.shortcut)

    def pairs(self, grid: tuple[int, ...], text: int) -> float:
        """Over the whole schedule: early and late steps in their shares."""
        config, n = self.config, math.prod(grid)

        def left(share: float, cell: int) -> int:
            targets = (grid[0] // cell) * (grid[1] // cell)
            return n - min(int(share * n), n - targets)

        tokens, agents = left(config.merge, config.cell), left(config.agent_merge, config.cell)
        late = left(config.merge, config.late_cell) ** 2
        early = 2 * agents * tokens if 2 * agents < tokens else tokens**2
        return config.early * early + (1 - config.early) * late
