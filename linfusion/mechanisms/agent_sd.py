"""AgentSD: Agent Attention on a trained UNet without training (arXiv 2312.08874, and its code)."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..call import AttnCall, Merged, Site
from ..kernels import agent_attention
from ..kernels.merge import merge, merge_slots, tokens_left, unmerge
from .base import Mechanism, MechanismConfig


@dataclass(frozen=True)
class AgentSD(MechanismConfig):
    """Token merging, and while the picture's layout forms, attention through a few merged tokens (agents).

    Training-free and meant for UNets, where it acts on the layers of the finest attention grid only (half the latents'
    in SDXL), of the picture alone. As in the published code, similarity is measured before the norm in front of the
    layer, and tokens are merged after it. Early steps: `softmax(s^agent_power Q A^T) softmax(s A K^T) V + shortcut V`
    over merged tokens, s = D^-0.5, A the queries of tokens merged further; late steps: softmax attention over merged
    tokens. Defaults are the published settings (there, SD 1.5 in 50 steps: FID 28.15, 28.84 untouched).

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
        if site.joint:
            return (
                "AgentSD reaches keys only through merged picture tokens, which gives the text in this layer's "
                "sequence no queries of its own. Agent keeps text exact."
            )
        return "AgentSD acts on the finest grid only." if site.level else None

    def build(self, site: Site) -> Mechanism:
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
    kernel = "agent_attention"
    needs = frozenset({"grid", "time", "stream"})
    merges_tokens = True

    def __init__(self, config: AgentSD, site: Site) -> None:
        super().__init__(config, site)
        self.salt = zlib.crc32(site.name.encode())

    def merge(self, x: Tensor) -> Merged:
        config, time, grid, hidden = self.config, self.clock.time, self.layout.grid, self.stream.take()
        assert time is not None and isinstance(grid, tuple) and hidden is not None  # the processor has checked `needs`
        if not x.shape[1] == hidden.shape[1] == math.prod(grid):
            raise ValueError(
                f"{self.site.name}: the grid {' x '.join(map(str, grid))} has {math.prod(grid)} tokens, but there are "
                f"{x.shape[1]}. Does something else merge tokens in this model?"
            )
        early = self.early()
        if torch.compiler.is_compiling():  # one graph for all steps: it makes agents for late ones too
            few, fewer = self.left(grid, config.cell)
            if few != self.left(grid, config.late_cell)[0]:
                raise NotImplementedError(
                    "In one graph AgentSD has to leave equally many tokens in early and in late steps; with "
                    f"merge={config.merge} it does not. Use less, or torch.compile without fullgraph."
                )
        else:
            side = config.cell if early else config.late_cell
            if min(grid) < side:
                raise ValueError(
                    f"{self.site.name}: a grid of {' x '.join(map(str, grid))} tokens is smaller than AgentSD's cell "
                    f"of {side} x {side}. Draw a larger picture, or use a smaller {'cell' if early else 'late_cell'}."
                )
            few, fewer = self.left(grid, side)
        cell = torch.where(early, config.cell, config.late_cell)
        # another draw for each step and layer, the same draw whenever this one is run again
        seed = (time * 1e6).round().long() + self.salt
        slots, more = merge_slots(hidden, grid=grid, cell=cell, left=(few, fewer), seed=seed)
        # agents pay where two passes over them cost less than one over all tokens
        agents = 2 * fewer < few and (torch.compiler.is_compiling() or bool(early))
        return Merged(merge(x, slots, few), merge(x, more, fewer) if agents else None, partial(unmerge, slots=slots))

    def forward(self, call: AttnCall) -> Tensor:
        q, k = call.rotated()  # only norms: no layer that rotates is taken
        if call.agents is None:
            return call.exact(q, k, call.v)
        agents = (call.agents if call.norms is None else call.norms.q(call.agents)).to(q.dtype)
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale

        def through_agents(q: Tensor, k: Tensor, v: Tensor, agents: Tensor) -> Tensor:
            sharper = scale**self.config.agent_power
            return agent_attention(q, k, v, agents, scale=scale, agent_scale=sharper, shortcut=self.config.shortcut)

        if not torch.compiler.is_compiling():
            return through_agents(q, k, call.v, agents)

        def exact(q: Tensor, k: Tensor, v: Tensor, agents: Tensor) -> Tensor:
            return call.exact(q, k, v)

        return torch.cond(self.early(), through_agents, exact, (q, k, call.v, agents))

    def early(self) -> Tensor:
        """Whether the latest forward's step is one with agents."""
        assert self.clock.time is not None
        return self.clock.time >= 1 - self.config.early

    def left(self, grid: tuple[int, ...], cell: int) -> tuple[int, int]:
        """Tokens that are left for queries, keys and values, and agents."""
        config, tokens = self.config, grid[0] * grid[1]
        counts = int(config.merge * tokens), int(config.agent_merge * tokens)
        few, fewer = (tokens_left(count, grid=grid, cell=cell) for count in counts)
        # plain numbers also where shapes are symbols: torch.cond takes no shapes made of those
        return len(range(few)), len(range(fewer))

    def pairs(self, grid: tuple[int, ...], text: int) -> float:
        """Over the whole schedule: early and late steps in their shares."""
        few, fewer = self.left(grid, self.config.cell)
        late = self.left(grid, self.config.late_cell)[0] ** 2
        early = 2 * fewer * few if 2 * fewer < few else few**2
        return self.config.early * early + (1 - self.config.early) * late
