"""LinFusion: normalised non-causal linear attention (arXiv 2409.02097, eq. 6 and 7)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..call import AttnCall, Site
from .base import Mechanism, MechanismConfig
from .joint import attend, check_text, linear_pairs


@dataclass(frozen=True)
class LinFusion(MechanismConfig):
    """Linear attention with elu + 1 features, whose queries and keys see the input through a small residual MLP.

    Untrained, it changes pictures a lot: it is meant to be distilled, or used with `weights=`.

    Args:
        mid_dim: width of the two MLPs, `C -> mid_dim -> C`; None is C itself (as published for SD 1.5 and 2.1;
            SDXL's weights use C // 16).
        eps: added to the normaliser.
        text: of models with text in the same sequence: "exact" keeps all that involves text softmax (EDiT's rule),
            "linear" lets text and image go through linear attention together (the MLPs see image tokens only).
    """

    name: ClassVar[str] = "linfusion"
    mid_dim: int | None = None
    eps: float = 1e-4
    text: str = "exact"

    def __post_init__(self) -> None:
        mid = self.mid_dim
        if mid is not None and (isinstance(mid, bool) or not isinstance(mid, int) or mid < 1):
            raise ValueError(f"mid_dim must be a positive number of channels or None, got {mid!r}.")
        if not isinstance(self.eps, (int, float)) or not 0 <= self.eps < math.inf:
            raise ValueError(f"eps must be a number, not negative, got {self.eps!r}.")
        check_text(self.text)

    def build(self, site: Site) -> Mechanism:
        return LinFusionAttention(self, site)


class LinFusionAttention(Mechanism):
    config: LinFusion
    kernel = "linear_attention"
    needs = frozenset({"references"})
    changes_input = True

    def __init__(self, config: LinFusion, site: Site) -> None:
        super().__init__(config, site)
        mid = config.mid_dim or site.width
        self.q_mlp = _residual_mlp(site.width, mid)
        self.k_mlp = _residual_mlp(site.width, mid)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.q_mlp(x), x + self.k_mlp(x)

    def forward(self, call: AttnCall) -> Tensor:
        return attend(call, self.config.text, feature_map="elu1", eps=self.config.eps)

    def pairs(self, grid: tuple[int, ...], text: int) -> float:
        tokens, site = math.prod(grid), self.site
        # two MLPs of two products each; a pair of one head is two dot products of length D
        mlps = 2 * site.width * (self.config.mid_dim or site.width) / (site.heads * site.head_dim)
        return tokens * mlps + linear_pairs(tokens, text, self.config.text, site.head_dim)


def _residual_mlp(width: int, mid: int) -> nn.Sequential:
    """Starts at zero: the layer's first output is the host's projections under linear attention, nothing more."""
    last = nn.Linear(mid, width)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, mid), nn.LayerNorm(mid), nn.LeakyReLU(), last)
