"""LiT: ReLU linear attention with few heads and a depthwise convolution of the values (arXiv 2501.12976)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..call import AttnCall, Site
from .base import Mechanism, MechanismConfig
from .joint import attend, check_text, linear_pairs
from .local import LocalBranch, check_kernel_size

EPS = 1e-6
NORMALIZE = ("divide", "inline", "mala")


@dataclass(frozen=True)
class LiT(MechanismConfig):
    """Linear attention with features relu(x) + 1e-6, plus a depthwise convolution of v that all heads share.

    `out = phi(q) mean(phi(k)^T v) / (phi(q) . mean(phi(k)) + 1e-6) + conv(v)`. Untrained, it changes pictures a lot: it
    is meant to be distilled, or used with `weights=`. The paper initialises q, k, v anew and trains for 40 million
    samples; here the host's are inherited and the convolution starts at zero.

    Args:
        kernel_size: of the convolution, in tokens of the layer's own grid, odd; per frame on video; None for no
            convolution. Published: 5.
        heads: split the layer's channels into so many heads after the ReLU (and the host's rotation, which turns the
            numerator only); must divide them. Fewer heads see more at about the same latency: published are 2 to 4.
            None keeps the host's. The convolution has one weight per channel of such a head.
        text: of models with text in the same sequence: "exact" keeps all that involves text softmax (EDiT's rule),
            "linear" lets text and image go through linear attention together.
        normalize: what makes the weights of a query sum to one: "divide", as above and published; or a subtraction,
            "inline" (InLine, arXiv 2412.06590) or "mala" (MALA, arXiv 2507.00698), for comparison: see
            `linear_attention`, with `1 / sqrt(channels of a head)` for their scale.
    """

    name: ClassVar[str] = "lit"
    kernel_size: int | None = 5
    heads: int | None = None
    text: str = "exact"
    normalize: str = "divide"

    def __post_init__(self) -> None:
        if self.kernel_size is not None:
            check_kernel_size(self.kernel_size)
        heads = self.heads
        if heads is not None and (isinstance(heads, bool) or not isinstance(heads, int) or heads < 1):
            raise ValueError(f"heads must be a positive number or None, got {heads!r}.")
        check_text(self.text)
        if self.normalize not in NORMALIZE:
            raise ValueError(f"normalize must be one of {', '.join(NORMALIZE)}, got {self.normalize!r}.")

    def build(self, site: Site) -> Mechanism:
        channels = site.heads * site.head_dim
        if self.heads is not None and channels % self.heads:
            raise ValueError(f"{site.name}: heads={self.heads} does not divide the layer's {channels} channels.")
        return LiTAttention(self, site)


class LiTAttention(Mechanism):
    config: LiT
    kernel = "linear_attention"
    needs = frozenset({"grid"})

    def __init__(self, config: LiT, site: Site) -> None:
        super().__init__(config, site)
        self.head_dim = site.heads * site.head_dim // (config.heads or site.heads)
        self.local = None if config.kernel_size is None else LocalBranch(self.head_dim, config.kernel_size)

    def forward(self, call: AttnCall) -> Tensor:
        c = self.config
        scale = 1.0 if c.normalize == "divide" else self.head_dim**-0.5  # which would only move eps
        out = attend(
            call, c.text, feature_map="relu_eps", normalize=c.normalize, eps=EPS, scale=scale, heads=c.heads
        )  # fmt: skip
        return out if self.local is None else self.local(call, out, c.heads)

    def pairs(self, grid: tuple[int, ...], text: int) -> float:
        tokens = math.prod(grid)
        local = 0.0 if self.local is None else self.local.pairs(tokens)
        return linear_pairs(tokens, text, self.config.text, self.head_dim) + local
