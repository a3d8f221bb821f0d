"""Hosts that pack each sample's caption and picture into one sequence: Lumina 2 and Z-Image.

Captions of one batch differ in length. Lumina 2 packs `[caption, picture, padding]`, so that every sample's picture
starts at another place; Z-Image packs `[picture, filling, caption, filling, padding]`, where the picture and each
caption are filled up to a multiple of 32 with learned tokens, which are attended to like any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from ..call import Layout, Rope, Site
from ..kernels import RopeTables
from .base import DispatchProcessor, Family, HostLayer, Processor, argument, class_names, skipped_as

FILL = 32  # Z-Image's SEQ_MULTI_OF


class Order(NamedTuple):
    """Where `[caption, picture, padding]` of each sample stands in `[caption, padding, picture]`, and back.

    Attributes:
        there, back: `[B, S]`, the place in the other order of each token in this one.
        text_mask: `[B, text]` bool, which of the tokens before the picture are the caption's.
    """

    there: Tensor
    back: Tensor
    text_mask: Tensor

    @classmethod
    def of(cls, mask: Tensor, tokens: int) -> Order:
        """From the host's mask `[B, S]` of real tokens, `tokens` of them the picture's; does not wait for a device."""
        place = torch.arange(mask.shape[1], device=mask.device)[None]
        caption = mask.sum(dim=1, keepdim=True) - tokens
        text = mask.shape[1] - tokens
        there = torch.where(place < caption, place, torch.where(place < text, place + tokens, place - text + caption))
        in_picture = place < caption + tokens
        back = torch.where(place < caption, place, torch.where(in_picture, place - caption + text, place - tokens))
        return cls(there, back, place[:, :text] < caption)


def reorder(x: Tensor, places: Tensor) -> Tensor:
    """`[B, S, C]` with the token from `places[b, s]` at `s`."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


class Lumina2Processor(Processor):
    def __call__(
        self,
        attn: HostLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,  # the same tensor again
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> Tensor:
        mechanism = self.mechanism(attn, None)  # the host's mask is one of padding only
        x, layout, joint = hidden_states, mechanism.layout, mechanism.site.joint
        text = x.shape[1] - layout.tokens if joint else 0
        if joint:
            layout.text = text  # the longest caption without its padding; the model's arguments only bound it
        order = mask = None
        if attention_mask is not None and mechanism.honours_mask:
            mask = attention_mask.bool().view(len(x), 1, 1, -1)
        elif attention_mask is not None:
            order = Order.of(attention_mask.bool(), layout.tokens)
            x = reorder(x, order.there)
            if image_rotary_emb is not None:
                image_rotary_emb = reorder(image_rotary_emb, order.there)
        out, _ = self.attend(
            mechanism, attn, x, rope=complex_rope(image_rotary_emb), mask=mask, text=text,
            text_mask=None if order is None else order.text_mask,
            scale=attn.scale, exact=partial(grouped_sdpa, scale=attn.scale),
        )  # fmt: skip
        if order is not None:
            out = reorder(out, order.back)
        return attn.to_out[1](attn.to_out[0](out))


def grouped_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float) -> Tensor:
    """PyTorch's attention on `[B, S, H, D]`; k and v may have fewer heads, which are repeated as the host does."""
    times = q.shape[2] // k.shape[2]
    k, v = (x.unsqueeze(3).repeat(1, 1, 1, times, 1).flatten(2, 3) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


class ZImageProcessor(DispatchProcessor):
    text_first = False

    def __call__(
        self,
        attn: HostLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,  # stock ignores it too
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        mechanism = self.mechanism(attn, None)  # the host's mask is one of padding only
        layout, mask, text_mask = mechanism.layout, None, None
        if attention_mask is not None and mechanism.honours_mask:
            mask = attention_mask[:, None, None]
        elif layout.grid is None and not mechanism.honours_mask:
            raise NotImplementedError(f"{mechanism.site.name}: {NO_SINGLE_GRID}")
        elif attention_mask is not None:
            text_mask = attention_mask[:, layout.tokens :]
        out, _ = self.attend(
            mechanism, attn, hidden_states, rope=complex_rope(freqs_cis), mask=mask,
            text=hidden_states.shape[1] - layout.tokens, text_mask=text_mask,
        )  # fmt: skip
        out = attn.to_out[0](out)
        return attn.to_out[1](out) if len(attn.to_out) > 1 else out


skipped_as(ZImageProcessor, "transformers.transformer_z_image", "ZSingleStreamAttnProcessor")


def complex_rope(freqs: Tensor | None) -> Rope | None:
    """The rotation by unit complex numbers `[B, S, D / 2]`, one a pair of channels; padding may have zeros."""
    if freqs is None:
        return None
    cos, sin = (part.repeat_interleave(2, dim=-1)[:, :, None] for part in (freqs.real, freqs.imag))
    turn: Any = partial(apply_rotary_emb, freqs_cis=freqs, use_real=False)  # diffusers types it as a pair
    return Rope(turn, RopeTables(cos, sin, interleaved=True))


def lumina2_layout(host: HostLayer, args: tuple, kwargs: dict, needs: frozenset[str]) -> Layout:
    """How many text tokens are real stands in a tensor, so each layer takes it from the length of its sequence."""
    height, width = (n // host.config.patch_size for n in argument(args, kwargs, 0, "hidden_states").shape[-2:])
    text = argument(args, kwargs, 2, "encoder_hidden_states").shape[1]
    return Layout((height, width), tokens=height * width, text=text)


NO_SINGLE_GRID = (
    "Z-Image with reference pictures, several frames, or pictures of different sizes in one batch has no single token "
    "grid. Use one picture size a batch, or exact attention."
)


def z_image_layout(host: HostLayer, args: tuple, kwargs: dict, needs: frozenset[str]) -> Layout:
    pictures, captions = argument(args, kwargs, 0, "x"), argument(args, kwargs, 2, "cap_feats")
    patch = z_image_patch(host.all_patch_size, kwargs.get("patch_size", 2))
    frames = z_image_patch(host.all_f_patch_size, kwargs.get("f_patch_size", 1))
    sizes = {tuple(x.shape[1:]) if isinstance(x, Tensor) else None for x in pictures}
    size = sizes.pop()
    if sizes or size is None or size[0] != frames:
        if "grid" in needs:
            raise NotImplementedError(NO_SINGLE_GRID)
        return Layout(tokens=1)  # for Softmax, which asks for nothing; the others are refused by their layer
    grid = size[1] // patch, size[2] // patch
    tokens, caption = math.prod(grid), max(len(c) for c in captions)
    return Layout(grid, tokens, text=-tokens % FILL + caption + -caption % FILL, text_first=False)


def z_image_patch(offered: tuple[int, ...], asked: int) -> int:
    """The host takes none but those it offers; the place of this argument differs between versions."""
    return offered[0] if len(offered) == 1 else asked


def z_image_text(site: Site, layout: Layout) -> int:
    """The refiner sees the picture before the caption joins it, with the tokens that fill it up."""
    return -layout.tokens % FILL if site.name.startswith("noise_refiner.") else layout.text


def packed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers that see the picture; refiners of text or of reference pictures alone do not."""
    for name, module in model.named_modules():
        if name.split(".")[0] in ("layers", "noise_refiner") and "Attention" in class_names(module):
            yield name, module


def lumina2_site(name: str, attn: HostLayer) -> Site:
    head_dim = attn.inner_dim // attn.heads
    return Site(name, attn.query_dim, attn.heads, head_dim, joint=name.startswith("layers."), rotary=True)


def z_image_site(name: str, attn: HostLayer) -> Site:
    return Site(name, attn.query_dim, attn.heads, attn.inner_dim // attn.heads, joint=True, rotary=True)


LUMINA2 = Family(
    model="Lumina2Transformer2DModel",
    about="Lumina 2: joint attention, picture refiner",
    processor=Lumina2Processor,
    layers=packed_layers,
    hosts=lambda model: iter([("", model)]),
    layout=lumina2_layout,
    site=lumina2_site,
    stock=frozenset({"Lumina2AttnProcessor2_0"}),
    joint=True,
)

Z_IMAGE = Family(
    model="ZImageTransformer2DModel",
    about="Z-Image: joint attention, picture refiner",
    processor=ZImageProcessor,
    layers=packed_layers,
    hosts=lambda model: iter([("", model)]),
    layout=z_image_layout,
    site=z_image_site,
    stock=frozenset({"ZSingleStreamAttnProcessor"}),
    joint=True,
    text=z_image_text,
)
