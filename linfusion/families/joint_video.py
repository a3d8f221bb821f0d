"""Text and video in one sequence: CogVideoX (text first) and HunyuanVideo (text behind, padded)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from ..call import AttnCall, Layout, Norms, Rope, Site
from ..kernels import RopeTables
from ..mechanisms import Mechanism
from .base import Family, HostLayer, Processor, argument, class_names, to_heads
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
        text, video = encoder_hidden_states, hidden_states
        mask = attention_mask
        if mask is not None:
            batch, tokens = video.shape[0], text.shape[1] + video.shape[1]
            mask = attn.prepare_attention_mask(mask, tokens, batch)
            mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
        x_q, x_k, x_v = joined(mechanism, text, video, text_first=True)
        head_dim = attn.inner_dim // attn.heads
        call = AttnCall(
            to_heads(attn.to_q(x_q), head_dim), to_heads(attn.to_k(x_k), head_dim),
            to_heads(attn.to_v(x_v), head_dim), grid=mechanism.layout.grid, text=text.shape[1], text_first=True,
            norms=head_norms(attn), rope=video_rope(image_rotary_emb), mask=mask,
        )  # fmt: skip
        out = mechanism(call).flatten(2).to(call.q.dtype)
        text, video = call.split(attn.to_out[1](attn.to_out[0](out)))
        return video, text


class HunyuanVideoProcessor(Processor):
    """Both kinds of block: text has projections of its own in double blocks, and shares the video's in single ones."""

    def __call__(
        self,
        attn: HostLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text, video = encoder_hidden_states, hidden_states
        text_mask = padding(attention_mask, video.shape[1])
        mechanism = self.mechanism(attn, attention_mask if text_mask is None else None)
        head_dim = attn.inner_dim // attn.heads
        norms = head_norms(attn)
        if attn.add_q_proj is None:
            x_q, x_k, x_v = joined(mechanism, text, video, text_first=False)
            q, k, v = (
                to_heads(project(x), head_dim) for project, x in ((attn.to_q, x_q), (attn.to_k, x_k), (attn.to_v, x_v))
            )
        else:
            x_q, x_k = mechanism.features(video)
            q, k, v = (
                torch.cat((to_heads(project(x), head_dim), to_heads(add(text), head_dim)), dim=1)
                for project, x, add in (
                    (attn.to_q, x_q, attn.add_q_proj),
                    (attn.to_k, x_k, attn.add_k_proj),
                    (attn.to_v, video, attn.add_v_proj),
                )
            )
            norms = norms._replace(text_q=attn.norm_added_q or nn.Identity(), text_k=attn.norm_added_k or nn.Identity())
        call = AttnCall(
            q, k, v, grid=mechanism.layout.grid, text=text.shape[1], text_first=False, text_mask=text_mask,
            norms=norms, rope=video_rope(image_rotary_emb), exact=self.exact, mask=attention_mask,
        )  # fmt: skip
        text, video = call.split(mechanism(call).flatten(2).to(q.dtype))
        if attn.to_out is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        return video, text if attn.to_add_out is None else attn.to_add_out(text)

    def exact(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=self._attention_backend)


def joined(mechanism: Mechanism, text: Tensor, video: Tensor, text_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of the projections to q, k and v: one sequence, made once where the mechanism leaves it alone."""

    def join(x: Tensor) -> Tensor:
        return torch.cat((text, x) if text_first else (x, text), dim=1)

    whole = join(video)
    if not mechanism.changes_input:
        return whole, whole, whole
    x_q, x_k = mechanism.features(video)
    return join(x_q), join(x_k), whole


def padding(mask: Tensor | None, tokens: int) -> Tensor | None:
    """Which text tokens are real, `[B, T]`, from the mask `[B, 1, 1, tokens + T]` that the model makes of the prompt's.

    That one always lets video tokens through. None for any other mask.
    """
    if mask is None or mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        return None
    return mask[:, 0, 0, tokens:]


def head_norms(attn: HostLayer) -> Norms:
    return Norms(attn.norm_q or nn.Identity(), attn.norm_k or nn.Identity())


def video_rope(tables: Any) -> Rope | None:
    if tables is None:
        return None
    turn: Any = partial(apply_rotary_emb, freqs_cis=tables, sequence_dim=1)  # diffusers types it as a pair
    return Rope(turn, RopeTables(tables[0], tables[1], interleaved=True), covers_text=False)


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


def joint_video_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks' attention; HunyuanVideo's token refiner attends among text tokens only."""
    for name, module in model.named_modules():
        inside = name.split(".")[0] in ("transformer_blocks", "single_transformer_blocks")
        if inside and "Attention" in class_names(module):
            yield name, module


def joint_video_site(name: str, attn: HostLayer) -> Site:
    head_dim = attn.inner_dim // attn.heads
    return Site(name, width=attn.query_dim, heads=attn.heads, head_dim=head_dim, axes=3, joint=True)


COGVIDEOX = Family(
    model="CogVideoXTransformer3DModel",
    about="CogVideoX 1.0, 1.5: joint attention",
    processor=CogVideoXProcessor,
    layers=joint_video_layers,
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
    layers=joint_video_layers,
    hosts=lambda model: iter([("", model)]),
    layout=hunyuan_video_layout,
    site=joint_video_site,
    stock=frozenset({"HunyuanVideoAttnProcessor2_0"}),
    joint=True,
)
