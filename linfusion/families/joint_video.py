"""Text and video in one sequence: CogVideoX (text first) and HunyuanVideo (text behind, padded)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..call import Layout, Site
from .base import DispatchProcessor, Family, HostLayer, Processor, argument, prepared_mask
from .flux import flux_rope
from .joint import block_attention, joint_site
from .video import volume


class CogVideoXProcessor(Processor):
    """Projections and norms are shared by text and video; only video tokens are rotated, in CogVideoX-2B none."""

    def __call__(
        self,
        attn: HostLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        mechanism = self.mechanism(attn, attention_mask)
        whole = self.join(encoder_hidden_states, hidden_states)
        mask = prepared_mask(attn, attention_mask, whole)
        out, _ = self.attend(mechanism, attn, whole, rope=flux_rope(image_rotary_emb, covers_text=False), mask=mask)
        out, text = attn.to_out[1](attn.to_out[0](out)), encoder_hidden_states.shape[1]
        return out[:, text:], out[:, :text]


class HunyuanVideoProcessor(DispatchProcessor):
    """Both kinds of block: text has projections of its own in double blocks, and shares the video's in single ones."""

    text_first = False

    def __call__(
        self,
        attn: HostLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        tokens = hidden_states.shape[1]
        text_mask = padding(attention_mask, tokens)
        mechanism = self.mechanism(attn, attention_mask if text_mask is None else None)
        settings: Any = {
            "rope": flux_rope(image_rotary_emb, covers_text=False), "mask": attention_mask, "text_mask": text_mask
        }  # fmt: skip
        if attn.add_q_proj is None:
            whole, _ = self.attend(mechanism, attn, self.join(encoder_hidden_states, hidden_states), **settings)
            video, text = whole[:, :tokens], whole[:, tokens:]
        else:
            video, words = self.attend(mechanism, attn, hidden_states, encoder_hidden_states, **settings)
            assert words is not None  # it came apart
            text = words
        if attn.to_out is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        return video, text if attn.to_add_out is None else attn.to_add_out(text)


def padding(mask: Tensor | None, tokens: int) -> Tensor | None:
    """Which text tokens are real, `[B, T]`, from the mask `[B, 1, 1, tokens + T]` that the model makes of the prompt's.

    That one always lets video tokens through. None for any other mask.
    """
    if mask is None or mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        return None
    return mask[:, 0, 0, tokens:]


def cogvideox_layout(host: HostLayer, args: tuple, kwargs: dict, needs: frozenset[str]) -> Layout:
    latents = argument(args, kwargs, 0, "hidden_states").shape  # B, frames, C, rows, columns
    patch = host.config.patch_size
    layout = volume((latents[1], *latents[-2:]), (host.config.patch_size_t or 1, patch, patch))
    layout.text = argument(args, kwargs, 1, "encoder_hidden_states").shape[1]
    return layout


def hunyuan_video_layout(host: HostLayer, args: tuple, kwargs: dict, needs: frozenset[str]) -> Layout:
    patch = host.config.patch_size
    sizes = argument(args, kwargs, 0, "hidden_states").shape[-3:]
    layout = volume(sizes, (host.config.patch_size_t, patch, patch))
    layout.text, layout.text_first = argument(args, kwargs, 2, "encoder_hidden_states").shape[1], False
    return layout


def joint_video_site(name: str, attn: HostLayer) -> Site:
    return replace(joint_site(name, attn), axes=3)


COGVIDEOX = Family(
    model="CogVideoXTransformer3DModel",
    about="CogVideoX 1.0, 1.5: joint attention",
    processor=CogVideoXProcessor,
    layers=block_attention,
    hosts=lambda model: iter([("", model)]),
    layout=cogvideox_layout,
    site=joint_video_site,
    stock=frozenset({"CogVideoXAttnProcessor2_0"}),
    joint=True,
)

HUNYUAN_VIDEO = Family(
    model="HunyuanVideoTransformer3DModel",
    about="HunyuanVideo: joint attention, double and single blocks",
    processor=HunyuanVideoProcessor,
    layers=block_attention,
    hosts=lambda model: iter([("", model)]),
    layout=hunyuan_video_layout,
    site=joint_video_site,
    stock=frozenset({"HunyuanVideoAttnProcessor2_0"}),
    joint=True,
)
