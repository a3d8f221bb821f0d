"""Agent Attention: a few agents gather from all tokens, every token reads the agents (arXiv 2312.08874)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..call import AttnCall, Site
from ..kernels import agent_attention, bias_factors, pool_agents
from .base import Mechanism, MechanismConfig
from .joint import mix_text, text_pairs
from .local import LocalBranch, check_kernel_size

TABLE = 7
"""Rows and columns of the position tables, as published; resized to whatever grid there is."""


@dataclass(frozen=True)
class Agent(MechanismConfig):
    """`softmax(s q A^T + b2) softmax(s A k^T + b1) v + conv(v)`, the agents A being means of q over cells of the grid.

    Rotating hosts pool the rotated q. In models with text in the same sequence everything that involves text stays
    softmax (EDiT's rule). Untrained, it changes pictures; it is meant to be distilled, or used with `weights=`.

    The biases b1 and b2 are bilinearly resized 7 x 7 tables per head and agent, the same for every frame of a video;
    the published tables per row and column are left out, since they are made for one resolution. Published: both
    drawn from a normal distribution of deviation 0.02 and the convolution from PyTorch's default, trained from scratch.
    Here both start at zero, so that the first output is the host's own q, k and v under agent attention alone.

    Args:
        agents: how many, factorised so that their cells are as square as can be (a prime number makes strips), or a
            tuple of the cells along each axis of the grid. No layer may have fewer tokens. Published: 49; 9, 16, 49
            and 49 in the stages of hierarchical models.
        kernel_size: of the depthwise convolution of v, in tokens, odd; per frame on video. Published: 3.
        bias: whether there are position biases.
    """

    name: ClassVar[str] = "agent"
    agents: int | tuple[int, ...] = 49
    kernel_size: int = 3
    bias: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.agents, list):
            object.__setattr__(self, "agents", tuple(self.agents))
        cells = self.agents if isinstance(self.agents, tuple) else (self.agents,)
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in cells) or len(cells) not in (1, 2, 3):
            raise ValueError(
                f"agents must be a positive number, or one per axis of the grid (2 or 3), got {self.agents!r}."
            )
        check_kernel_size(self.kernel_size)
        if not isinstance(self.bias, bool):
            raise ValueError(f"bias must be true or false, got {self.bias!r}.")

    @property
    def count(self) -> int:
        """How many agents there are."""
        return math.prod(self.agents) if isinstance(self.agents, tuple) else self.agents

    def build(self, site: Site) -> Mechanism:
        if isinstance(self.agents, tuple) and len(self.agents) != site.axes:
            raise ValueError(
                f"{site.name}: agents={self.agents!r} has {len(self.agents)} axes, the grid has {site.axes}."
            )
        return AgentAttention(self, site)


class AgentAttention(Mechanism):
    config: Agent
    kernel = "agent_attention"
    needs = frozenset({"grid"})

    def __init__(self, config: Agent, site: Site) -> None:
        super().__init__(config, site)
        if config.bias:
            shape = (site.heads, config.count, TABLE, TABLE)
            self.key_bias = nn.Parameter(torch.zeros(shape))
            self.query_bias = nn.Parameter(torch.zeros(shape))
        self.local = LocalBranch(site.heads * site.head_dim, config.kernel_size)

    def forward(self, call: AttnCall) -> Tensor:
        assert call.grid is not None  # the processor has checked `needs`
        (_, q), (_, k), (_, v) = (call.split(x) for x in (*call.rotated(), call.v))
        tokens = q.shape[1]
        if self.config.count > tokens:
            raise ValueError(
                f"{self.site.name}: {self.config.count} agents are more than the grid's {tokens} tokens. Use fewer, or "
                "choose other layers."
            )
        key_bias = query_bias = None
        if self.config.bias:
            key_bias = bias_factors(self.key_bias, grid=call.grid, tokens=tokens, dtype=q.dtype)
            query_bias = bias_factors(self.query_bias, grid=call.grid, tokens=tokens, dtype=q.dtype)
        agents = pool_agents(q, grid=call.grid, agents=self.config.agents)
        image = agent_attention(q, k, v, agents, scale=call.scale, key_bias=key_bias, query_bias=query_bias)
        return self.local(call, mix_text(call, image))

    def pairs(self, grid: tuple[int, ...], text: int) -> float:
        tokens = math.prod(grid)
        return 2 * self.config.count * tokens + text_pairs(tokens, text) + self.local.pairs(tokens)
