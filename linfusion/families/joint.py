"""What hosts of joint attention have in common besides their processors: which layers, and how wide."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..call import Site
from .base import HostLayer, class_names


def block_attention(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every `Attention` of the transformer blocks; IP-Adapters bring others of their own."""
    for name, module in model.named_modules():
        if name.partition(".")[0].endswith("transformer_blocks") and "Attention" in class_names(module):
            yield name, module


def joint_site(name: str, attn: HostLayer) -> Site:
    """An `Attention` whose sequence holds text; it has no `head_dim` of its own."""
    return Site(name, width=attn.query_dim, heads=attn.heads, head_dim=attn.inner_dim // attn.heads, joint=True)
