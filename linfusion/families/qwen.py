"""Qwen-Image and its ControlNet: joint attention over text then image, each with a rotation of its own."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor

from ..call import Layout, Rope, Site, reference_tokens_first, reference_tokens_last
from ..kernels import RopeTables
from .base import DispatchProcessor, Family, HostLayer, argument
from .joint import block_attention, joint_site

# the oldest supported diffusers hands the text's mask down to the layers but attends to padding all the same
HONOURS_PADDING = hasattr(transformer_qwenimage, "compute_text_seq_len_from_mask")


class QwenProcessor(DispatchProcessor):
    """Text always comes apart. The host masks padded text; bool by the time it gets here."""

    def __call__(
        self,
        attn: HostLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if encoder_hidden_states is None or (attention_mask is not None and HONOURS_PADDING):
            raise ValueError("Qwen-Image's attention takes encoder_hidden_states and no attention_mask of its own.")
        mechanism = self.mechanism(attn, attention_mask)
        text_mask = encoder_hidden_states_mask if HONOURS_PADDING else None
        if text_mask is not None:
            real = text_mask.new_ones(hidden_states.shape[:2])
            attention_mask = torch.cat((text_mask, real), dim=1)[:, None, None, :]
        moved = self.moved(mechanism)
        image, text = self.attend(
            mechanism, attn, reference_tokens_first(hidden_states, moved), encoder_hidden_states, mask=attention_mask,
            text_mask=text_mask, rope=qwen_rope(image_rotary_emb, moved),
        )  # fmt: skip
        image = reference_tokens_last(image, moved)
        assert text is not None  # it came apart
        image = attn.to_out[1](attn.to_out[0](image.contiguous()))
        return image, attn.to_add_out(text.contiguous())


def qwen_rope(tables: tuple[Tensor, Tensor] | None, moved: int) -> Rope | None:
    """The host's complex tables, of the image and of the text `[N, D / 2]`, over the whole sequence."""
    if tables is None:
        return None
    image, text = reference_tokens_first(tables[0], moved, dim=0), tables[1]
    whole = torch.cat((text, image))
    cos, sin = (part.repeat_interleave(2, dim=-1) for part in (whole.real, whole.imag))
    return Rope(partial(turned, image=image, text=text), RopeTables(cos, sin, interleaved=True))


def turned(x: Tensor, image: Tensor, text: Tensor) -> Tensor:
    """The host's own rotation of `[B, S, H, D]`, text and image one by one as the host does it."""
    parts = ((x[:, : len(text)], text), (x[:, len(text) :], image))
    turn: Any = transformer_qwenimage.apply_rotary_emb_qwen  # diffusers types it as a pair
    return torch.cat([turn(part, freqs, use_real=False) for part, freqs in parts], dim=1)


def qwen_layout(
    host: HostLayer, args: tuple, kwargs: dict, needs: frozenset[str], *, words: int = 1, shapes: int = 4
) -> Layout:
    """`img_shapes` holds `(frames, h, w)` for each picture of each sample; the host takes the first's for all.

    The first is the one to be drawn, reference pictures (Qwen-Image-Edit) stand behind it.
    `words` and `shapes` are the places of the text and of `img_shapes` among the arguments of the host's forward.
    """
    tokens = argument(args, kwargs, 0, "hidden_states").shape[1]
    text = argument(args, kwargs, words, "encoder_hidden_states").shape[1]
    samples = argument(args, kwargs, shapes, "img_shapes")
    samples = samples if isinstance(samples, list) else [samples]
    pictures, *others = [list(sample) if isinstance(sample, list) else [sample] for sample in samples]
    there = sum(math.prod(picture) for picture in pictures)
    if there != tokens:
        raise ValueError(f"img_shapes={pictures} describes {there} image tokens, but there are {tokens}.")
    frames, *grid = pictures[0]
    together = frames != 1 or getattr(host.config, "use_layer3d_rope", False)
    if not needs or (together and "grid" not in needs):
        return Layout(tokens=tokens, text=text)
    if together:
        raise ValueError(
            f"img_shapes={pictures}: several pictures that are drawn together (Qwen-Image-Layered) have no single "
            "token grid, which this mechanism needs."
        )
    if any(sample != pictures for sample in others):
        raise ValueError(f"img_shapes differ between samples ({samples}); mechanisms take one token grid.")
    picture = math.prod(grid)
    return Layout(tuple(grid), picture, text + tokens - picture, references=tokens - picture)


def qwen_site(name: str, attn: HostLayer) -> Site:
    return replace(joint_site(name, attn), rotary=True)


QWEN = Family(
    model="QwenImageTransformer2DModel",
    about="Qwen-Image: joint attention; padded prompts are masked",
    processor=QwenProcessor,
    layers=block_attention,
    hosts=lambda model: iter([("", model)]),
    layout=qwen_layout,
    site=qwen_site,
    stock=frozenset({"QwenDoubleStreamAttnProcessor2_0"}),
    joint=True,
)

QWEN_CONTROL = replace(
    QWEN,
    model="QwenImageControlNetModel",
    about="ControlNets of Qwen-Image (apply to `pipe.controlnet`): joint attention",
    layout=partial(qwen_layout, words=3, shapes=6),
)
