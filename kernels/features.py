"""Feature maps of linear attention by name, and the precision that sums are made in."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_MAPS = {
    "elu1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "softmax": lambda x: x.softmax(dim=-1),
    "identity": lambda x: x,
    "relu_eps": lambda x: F.relu(x) + 1e-6,
}


def wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in fp32, or as they are where that is wider."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def named_feature_map(name: str) -> Callable[[Tensor], Tensor]:
    """The feature map called `name`; ValueError listing them all when there is none."""
    if name not in FEATURE_MAPS:
        raise ValueError(f"Unknown feature_map={name!r}. Available: {', '.join(FEATURE_MAPS)}.")
    return FEATURE_MAPS[name]
