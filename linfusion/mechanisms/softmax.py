"""Exact attention: the host's own, through the same door as every mechanism. The oracle of the parity tests."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..call import AttnCall, Site
from .base import Mechanism, MechanismConfig


@dataclass(frozen=True)
class Softmax(MechanismConfig):
    """The host's exact softmax attention. Use it to leave some layers exact while others are replaced."""

    name: ClassVar[str] = "softmax"

    def build(self, site: Site) -> Mechanism:
        return SoftmaxAttention(self, site)


class SoftmaxAttention(Mechanism):
    honours_mask = True
    honours_backend = True

    def forward(self, call: AttnCall) -> Tensor:
        q, k = call.rotated(as_values=False)
        return call.exact(q, k, call.v, mask=call.mask)

    def pairs(self, grid: tuple[int, ...], text: int) -> float:
        return float(math.prod(grid) + text) ** 2
