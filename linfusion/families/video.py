"""Video tokens alone in their self-attention, text in cross-attention: Wan (2.1, 2.2, VACE) and LTX-Video."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_ltx import apply_rotary_emb
from torch import Tensor, nn

from ..call import Layout, Norms, Rope, Site
from ..kernels import RopeTables
from .base import DispatchProcessor, Family, HostLayer, argument, class_names, prepared_mask, to_heads
from .wan_original import parameter_here


class VideoProcessor(DispatchProcessor):
    """Norms over the channels of all heads."""

    norm_across_heads = True

    def norms(self, attn: HostLayer) -> Norms:
        return Norms(across_heads(attn.norm_q), across_heads(attn.norm_k))


class WanProcessor(VideoProcessor):
    def __call__(
        self,
        attn: HostLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        rope = None
        if rotary_emb is not None:
            rope = Rope(partial(wan_turn, tables=rotary_emb), RopeTables(*rotary_emb, interleaved=True))
        return self.attend_alone(attn, hidden_states, encoder_hidden_states, attention_mask, rope)


class LTXProcessor(VideoProcessor):
    def __call__(
        self,
        attn: HostLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        mask = prepared_mask(attn, attention_mask, hidden_states)
        rope = None
        if image_rotary_emb is not None:
            rope = ltx_rope(image_rotary_emb, attn.inner_dim // attn.heads)
        return self.attend_alone(attn, hidden_states, encoder_hidden_states, mask, rope)


def across_heads(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What the host does to `[B, S, H * D]`, before it splits heads, on `[B, S, H, D]`."""
    return lambda x: function(x.flatten(2)).unflatten(2, x.shape[2:])


def wan_turn(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Channels 2i and 2i + 1 by one angle; in the wider dtype of `x` and the tables, unlike `kernels.rotate`."""
    cos, sin = tables[0][..., 0::2], tables[1][..., 1::2]
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)


def ltx_rope(tables: tuple[Tensor, Tensor], head_dim: int) -> Rope:
    """The angles run over the channels of all heads, `[B, N, H * D]`, so that each head has angles of its own."""
    cos, sin = (to_heads(t, head_dim) for t in tables)
    return Rope(across_heads(partial(apply_rotary_emb, freqs=tables)), RopeTables(cos, sin, interleaved=True))


def wan_layout(host: HostLayer, args: tuple, kwargs: dict, needs: frozenset[str]) -> Layout:
    return volume(argument(args, kwargs, 0, "hidden_states").shape[-3:], host.config.patch_size)


def volume(sizes: Any, patch: tuple[int, int, int]) -> Layout:
    """The layout of latents of so many frames, rows and columns."""
    frames, height, width = (n // p for n, p in zip(sizes, patch, strict=True))
    return Layout((frames, height, width), tokens=frames * height * width)


def ltx_layout(host: HostLayer, args: tuple, kwargs: dict, needs: frozenset[str]) -> Layout:
    """The grid is given as three numbers, or stands in `video_coords`, which then go before the numbers.

    Those are a tensor: reading it waits for the device, so only who needs the grid pays.
    """
    tokens = argument(args, kwargs, 0, "hidden_states").shape[1]
    if "grid" not in needs:
        return Layout(tokens=tokens)
    coords = argument(args, kwargs, 8, "video_coords")
    if coords is None:
        grid = tuple(argument(args, kwargs, 4 + i, name) for i, name in enumerate(("num_frames", "height", "width")))
    elif torch.compiler.is_compiling():
        return Layout(coords_grid(coords), tokens)  # the op that uses it reads it, and checks it against the tokens
    else:
        grid = tuple(coords_grid(coords).tolist())
    if None in grid or math.prod(grid) != tokens:
        raise ValueError(
            f"num_frames, height and width, or video_coords, do not describe one grid of {tokens} video tokens, frame "
            "by frame and row by row. Condition frames in the sequence (LTXConditionPipeline, frame_index above 0) "
            "are not supported by mechanisms that need the grid."
        )
    return Layout(grid, tokens)


def coords_grid(coords: Tensor) -> Tensor:
    """Frames, rows and columns of `video_coords` `[B, 3, N]` as int64 `[3]` on the CPU; zeros when not one video's.

    Sizes come from the places where a coordinate falls back; then every token must stand where that grid puts it, in
    frames that follow each other: frames that were put in front or behind have times that do not.
    """
    time, y, x = coords.unbind(dim=1)
    tokens = coords.shape[2]
    rows = torch.where((x[0] == x[0, 0]).all(), tokens, (x[0, 1:] < x[0, :-1]).sum() + 1)
    frames = torch.where((y[0] == y[0, 0]).all(), rows, (y[0, 1:] < y[0, :-1]).sum() + 1)
    height, width = (rows // frames).clamp(min=1), tokens // rows
    place = torch.arange(tokens, device=coords.device)
    frame, row, column = place // (height * width), place // width % height, place % width
    one = (time == time[:, frame * height * width]).all() & (time[:, 1:] >= time[:, :-1]).all()
    one = one & (y == y[:, row * width]).all() & (x == x[:, column]).all() & (frames * height * width == tokens)
    return torch.stack((frames, height, width)).mul(one).to("cpu", torch.int64)


def video_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`attn1`; `attn2` is cross-attention, which LTX and older Wan VACE do not say of it."""
    for name, module in model.named_modules():
        if name.endswith(".attn1") and not {"WanAttention", "LTXAttention"}.isdisjoint(class_names(module)):
            yield name, module


def video_site(name: str, attn: HostLayer) -> Site:
    head_dim = attn.inner_dim // attn.heads
    return Site(name, width=attn.inner_dim, heads=attn.heads, head_dim=head_dim, axes=3, rotary=True)


WAN = Family(
    model="WanTransformer3DModel",
    about="Wan 2.1, 2.2: self-attention",
    processor=WanProcessor,
    layers=video_layers,
    hosts=lambda model: iter([("", model)]),
    layout=wan_layout,
    site=video_site,
    stock=frozenset({"WanAttnProcessor"}),
    original=parameter_here,
)

WAN_VACE = replace(
    WAN,
    model="WanVACETransformer3DModel",
    about="Wan VACE: self-attention, main and control blocks",
    original=None,
)

LTX = replace(
    WAN,
    model="LTXVideoTransformer3DModel",
    about="LTX-Video: self-attention",
    processor=LTXProcessor,
    layout=ltx_layout,
    stock=frozenset({"LTXVideoAttnProcessor"}),
    original=None,
)
