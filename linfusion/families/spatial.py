"""Self-attention over picture tokens alone: UNets (SD, AnimateDiff, SVD, ControlNet), PixArt, DiT and HunyuanDiT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..call import Layout, Site
from .base import Family, HostLayer, Processor, argument, class_names, prepared_mask, skipped_as
from .flux import flux_rope

STOCK = frozenset({"AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor"})


class SpatialProcessor(Processor):
    """Self-attention of `BasicTransformerBlock`: hidden states `[B, N, C]`, no rotation, no text."""

    def __call__(
        self,
        attn: HostLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        mask = prepared_mask(attn, attention_mask, hidden_states)
        return self.attend_alone(attn, hidden_states, encoder_hidden_states, mask)


skipped_as(SpatialProcessor, "attention_processor", "AttnProcessor2_0")


class HunyuanDiTProcessor(Processor):
    """The same with a rotation; stock sets its processor on self- and cross-attention alike."""

    def __call__(
        self,
        attn: HostLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        mask = prepared_mask(attn, attention_mask, hidden_states)
        return self.attend_alone(attn, hidden_states, encoder_hidden_states, mask, flux_rope(image_rotary_emb))


def self_attention(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """attn1, and attn2 where it is self-attention too; temporal and motion modules are another axis."""
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[-1] not in ("attn1", "attn2") or "Attention" not in class_names(module):
            continue
        if module.is_cross_attention or any("temporal" in p or "motion" in p for p in parts):
            continue
        yield name, module


def transformers_2d(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The UNet's spatial transformers: each one's input is the exact grid of its blocks, odd sizes included.

    In video UNets that is every frame as a picture of its own: `[B * frames, C, height, width]`.
    """
    for name, module in model.named_modules():
        if not {"Transformer2DModel", "TransformerSpatioTemporalModel"}.isdisjoint(class_names(module)):
            yield name, module


def unet_layout(host: HostLayer, args: tuple, kwargs: dict, needs: frozenset[str]) -> Layout:
    height, width = argument(args, kwargs, 0, "hidden_states").shape[-2:]
    return Layout((height, width), tokens=height * width)


def unet_levels(model: nn.Module) -> dict[str, int]:
    """Each block halves the grid of the one above it; counted from the finest with self-attention."""
    down = len(getattr(model, "down_blocks", ()))
    depths = {}
    for name, _ in self_attention(model):
        part, _, rest = name.partition(".")
        block = int(rest.split(".")[0]) if part != "mid_block" else down - 1
        depths[name] = down - 1 - block if part == "up_blocks" else block
    finest = min(depths.values(), default=0)
    return {name: depth - finest for name, depth in depths.items()}


def thousandths(model: HostLayer, args: tuple, kwargs: dict, position: int = 1) -> Tensor:
    """Time of hosts whose `timestep` runs from 1000 (noise) to 0."""
    time = argument(args, kwargs, position, "timestep")
    # in this order: not every device has float64
    time = time.flatten()[0].cpu().double() if isinstance(time, Tensor) else torch.tensor(time, dtype=torch.float64)
    return time / 1000


def block_norm(name: str) -> str:
    """`attn1` has `norm1` in front of it, `attn2` (where it is self-attention) `norm2`."""
    return f"{name.rpartition('.')[0]}.norm{name[-1]}"


def patch_layout(host: HostLayer, args: tuple, kwargs: dict, needs: frozenset[str]) -> Layout:
    height, width = argument(args, kwargs, 0, "hidden_states").shape[-2:]
    patch = host.config.patch_size
    height, width = height // patch, width // patch
    return Layout((height, width), tokens=height * width)


def spatial_site(name: str, attn: HostLayer) -> Site:
    return Site(name, width=attn.query_dim, heads=attn.heads, head_dim=attn.inner_dim // attn.heads)


def rotating_site(name: str, attn: HostLayer) -> Site:
    return replace(spatial_site(name, attn), rotary=True)


def plain(name: str, attn: HostLayer) -> None:
    if attn.group_norm is not None or attn.spatial_norm is not None or attn.residual_connection:
        raise NotImplementedError(f"{name}: attention with its own norm or residual is not supported.")
    if attn.rescale_output_factor != 1.0:
        raise NotImplementedError(f"{name}: rescale_output_factor={attn.rescale_output_factor} is not supported.")


UNET = Family(
    model="UNet2DConditionModel",
    about="SD 1.5, 2.1, XL: spatial self-attention",
    processor=SpatialProcessor,
    layers=self_attention,
    hosts=transformers_2d,
    layout=unet_layout,
    site=spatial_site,
    check=plain,
    stock=STOCK,
    levels=unet_levels,
    time=thousandths,
    norm=block_norm,
)

MOTION_UNET = replace(UNET, model="UNetMotionModel", about="AnimateDiff: spatial self-attention, each frame a picture")
# its time argument is a logarithm of sigma, which says nothing of the share of the steps
SPATIO_TEMPORAL_UNET = replace(
    UNET, model="UNetSpatioTemporalConditionModel", about="SVD: spatial self-attention, each frame a picture", time=None
)
CONTROLNET = replace(UNET, model="ControlNetModel", about="of UNets (`pipe.controlnet`): spatial self-attention")
PIXART = replace(
    UNET,
    model="PixArtTransformer2DModel",
    about="PixArt: self-attention",
    hosts=lambda model: iter([("", model)]),
    layout=patch_layout,
    levels=None,
    time=partial(thousandths, position=2),
)
DIT = replace(PIXART, model="DiTTransformer2DModel", about="DiT: self-attention", time=thousandths)
HUNYUAN_DIT = replace(
    PIXART,
    model="HunyuanDiT2DModel",
    about="Hunyuan-DiT: self-attention",
    processor=HunyuanDiTProcessor,
    site=rotating_site,
    time=thousandths,
    stock=frozenset({"HunyuanAttnProcessor2_0"}),
)
