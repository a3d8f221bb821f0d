"""SLA: exact attention to the blocks that matter, linear attention for the rest (arXiv 2509.24006, eq. 2 to 6)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..call import AttnCall, Site
from ..kernels import sparse_linear_attention, sparse_linear_pairs
from ..kernels.checks import check_routing
from .base import Mechanism, MechanismConfig


@dataclass(frozen=True)
class SLA(MechanismConfig):
    """Softmax over the key blocks with the highest scores, plus a projected linear part that starts at zero.

    Blocks are runs of tokens in the host's order (row by row, frame by frame), whatever the grid. Text tokens stand
    outside of them: all see them, and they see everything exactly. With `topk=1` it is exact attention until trained.

    Args:
        topk: share of the key blocks that each query block sees, in (0, 1], at least one block. Published: 0.05, with
            2000 steps of fine-tuning; 0.1 to 0.2 in the official releases.
        block_q, block_k: tokens per block of queries and of keys, multiples of 16.
        feature_map: of the linear part: "softmax", "elu1" or "relu".
        linear: what the linear part sums over: "all" tokens (the official code and weights), the "complement" of the
            chosen blocks, or "marginal", the complement less its lowest blocks (the paper).
        skip: share of the blocks that "marginal" drops. Published: 0.1.
    """

    name: ClassVar[str] = "sla"
    published: ClassVar[dict[str, str]] = {
        "attn_op.local_attn.proj_l.weight": "linear_weight", "attn_op.local_attn.proj_l.bias": "linear_bias",
    }  # fmt: skip
    topk: float
    block_q: int = 128
    block_k: int = 64
    feature_map: str = "softmax"
    linear: str = "all"
    skip: float = 0.0

    def __post_init__(self) -> None:
        check_routing(self.topk, self.block_q, self.block_k, self.feature_map, self.linear, self.skip)
        for name, size in (("block_q", self.block_q), ("block_k", self.block_k)):
            if size % 16:
                raise ValueError(f"{name} must be a multiple of 16 tokens, got {size}.")

    def build(self, site: Site) -> Mechanism:
        return SLAAttention(self, site)


class SLAAttention(Mechanism):
    config: SLA
    needs = frozenset({"references"})

    def __init__(self, config: SLA, site: Site) -> None:
        super().__init__(config, site)
        # the op takes them as tensors, so they are no nn.Linear: offload hooks would leave its weights elsewhere
        self.linear_weight = nn.Parameter(torch.zeros(site.head_dim, site.head_dim))
        self.linear_bias = nn.Parameter(torch.zeros(site.head_dim))

    def forward(self, call: AttnCall) -> Tensor:
        q, k = call.rotated()
        c, tokens = self.config, q.shape[1]
        keep = (0, call.text) if call.text_first else (tokens - call.text, tokens)
        out = sparse_linear_attention(
            q, k, call.v, topk=c.topk, block_q=c.block_q, block_k=c.block_k, feature_map=c.feature_map,
            linear=c.linear, skip=c.skip, keep=keep, text_mask=call.text_mask, proj_weight=self.linear_weight,
            proj_bias=self.linear_bias, scale=call.scale,
        )  # fmt: skip
        assert isinstance(out, Tensor)  # a pair only with return_parts
        return out

    def pairs(self, grid: tuple[int, ...], text: int) -> float:
        c, tokens = self.config, math.prod(grid)
        blocks = sparse_linear_pairs(
            tokens, self.site.head_dim, topk=c.topk, block_q=c.block_q, block_k=c.block_k, linear=c.linear, skip=c.skip
        )
        return blocks + tokens * text + text * (tokens + text)
