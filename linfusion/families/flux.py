"""FLUX, its ControlNet and Chroma: joint attention over text then image, in double- and in single-stream blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from ..call import Layout, Rope, Site, reference_tokens_first, reference_tokens_last
from ..kernels import RopeTables
from ..mechanisms import Mechanism
from .base import DispatchProcessor, Family, HostLayer, argument, class_names


class FluxProcessor(DispatchProcessor):
    """Both kinds of block: text comes apart in double blocks, already joined to the image in single blocks."""

    def __call__(
        self,
        attn: HostLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        mechanism = self.mechanism(attn, attention_mask)
        layout, moved = mechanism.layout, self.moved(mechanism)
        words = layout.text - layout.references
        joined = words if encoder_hidden_states is None else 0
        image, text = self.attend(
            mechanism, attn, reference_tokens_first(hidden_states, moved, joined), encoder_hidden_states,
            rope=flux_rope(image_rotary_emb, moved=moved, words=words), mask=attention_mask, text_mask=layout.text_mask,
        )  # fmt: skip
        image = reference_tokens_last(image, moved, joined)
        if text is None:
            return image
        image = attn.to_out[1](attn.to_out[0](image.contiguous()))
        return image, attn.to_add_out(text.contiguous())


class ChromaProcessor(FluxProcessor):
    """As FLUX; the mask is made of the padding that `chroma_layout` has read, so `text_mask` says it all."""

    def mechanism(self, attn: HostLayer, mask: Tensor | None) -> Mechanism:
        return super().mechanism(attn, None)


def flux_rope(tables: Any, covers_text: bool = True, *, moved: int = 0, words: int = 0) -> Rope | None:
    """Of `moved` reference tokens, as `reference_tokens_first`."""
    if tables is None:
        return None
    tables = tuple(reference_tokens_first(table, moved, words, dim=0) for table in tables)
    turn: Any = partial(apply_rotary_emb, freqs_cis=tables, sequence_dim=1)  # diffusers types it as a pair
    return Rope(turn, RopeTables(tables[0], tables[1], interleaved=True), covers_text)


def flux_layout(
    host: HostLayer, args: tuple, kwargs: dict, needs: frozenset[str], *, words: int = 1, ids: int = 4
) -> Layout:
    """The grid stands in `img_ids`, a tensor: reading it waits for the device, so only who needs it pays, and once.

    `words` and `ids` are the places of the text and of `img_ids` among the arguments of the host's forward.
    """
    tokens = argument(args, kwargs, 0, "hidden_states").shape[1]
    text = argument(args, kwargs, words, "encoder_hidden_states").shape[1]
    if not needs:
        return Layout(tokens=tokens, text=text)
    places = argument(args, kwargs, ids, "img_ids")
    if torch.compiler.is_compiling():  # what is read when the graph runs tells no lengths while it is traced
        sizes = ids_grid(places[0] if places.ndim == 3 else places)
        torch._assert_async((sizes.prod() == tokens) | (sizes[0] == 0), ONE_PICTURE)
        return Layout(sizes, tokens, text)
    grid = known_grid(places) if places.shape[-2] == tokens else (0, 0)
    picture = math.prod(grid)
    if picture == 0 and "grid" in needs:
        raise ValueError(
            f"img_ids {tuple(places.shape)} do not describe a grid, row by row, that the {tokens} image tokens begin "
            "with. Reference pictures stand behind it, with another number on the first axis or the fourth."
        )
    if picture == 0:
        return Layout(tokens=tokens, text=text)
    return Layout(grid, picture, text + tokens - picture, references=tokens - picture)


ONE_PICTURE = (
    "Reference pictures in the sequence (FLUX Kontext, FLUX.2 with input images) tell no lengths to a model that is "
    "compiled as a whole. Use compile_repeated_blocks()."
)


def known_grid(places: Tensor) -> tuple[int, ...]:
    """`ids_grid`, noted on the tensor: samplers and trainers hand the same one over at every step.

    Its version tells whether it was written to since; tensors made in inference mode have none and are read each time.
    """
    version = None if places.is_inference() else places._version
    known = getattr(places, "_linfusion_grid", None)
    if version is not None and known is not None and known[0] == version:
        return known[1]
    grid = tuple(ids_grid(places[0] if places.ndim == 3 else places).tolist())
    if version is not None:
        places._linfusion_grid = version, grid  # type: ignore[attr-defined]
    return grid


def ids_grid(ids: Tensor) -> Tensor:
    """Rows and columns of the first picture of `img_ids` `[N, 3]` (frame, row, column) or `[N, 4]` (and a layer).

    As int64 `[2]` on the CPU; zeros when its tokens are not one grid's. Counts the places where the column falls back,
    since ids come in the model's dtype: above 256 bf16 repeats and skips whole numbers, but keeps their order.
    """
    row, column = ids[:, 1], ids[:, 2]
    others = ids[:, 0::3]  # frame and layer: the same in one picture
    first = (others == others[0]).all(dim=1).cumprod(0).bool()
    tokens, after = first.sum(), ~first[1:]
    falls = ((column[1:] < column[:-1]) & ~after).sum()
    rows = torch.where(((column == column[0]) | ~first).all(), tokens, falls + 1)
    one = ((row[1:] >= row[:-1]) | after).all() & (tokens % rows == 0)
    return torch.stack((rows, tokens // rows)).mul(one).to("cpu", torch.int64)


def control_layout(host: HostLayer, args: tuple, kwargs: dict, needs: frozenset[str]) -> Layout:
    """A union ControlNet tells its mode by one more token before the text."""
    layout = flux_layout(host, args, kwargs, needs, words=4, ids=7)
    layout.text += int(host.union)
    return layout


def chroma_layout(host: HostLayer, args: tuple, kwargs: dict, needs: frozenset[str]) -> Layout:
    """Its pipelines bring a mask `[B, text + image]` of ones and zeros: which tokens are real.

    It is a padding mask whatever its dtype. The stock attention hides padding only where the mask is bool; its
    pipelines bring floats, which it adds to the scores. `Softmax` does as the stock model does, every other mechanism
    hides the padding.
    """
    layout = flux_layout(host, args, kwargs, needs, ids=3)
    mask = argument(args, kwargs, 5, "attention_mask")
    if mask is None:
        return layout
    text, image = layout.text - layout.references, layout.tokens + layout.references
    if mask.ndim != 2 or mask.shape[1] != text + image:
        raise ValueError(f"attention_mask must be [B, text + image] = [B, {text} + {image}], got {tuple(mask.shape)}.")
    if "grid" in needs and not torch.compiler.is_compiling() and not mask[:, text:].all():
        raise ValueError("attention_mask hides image tokens, which no mechanism that needs the grid can honour.")
    layout.text_mask = mask[:, :text].to(torch.bool)
    return layout


def flux_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if "FluxAttention" in class_names(module):
            yield name, module


def flux_site(name: str, attn: HostLayer) -> Site:
    return Site(name, width=attn.query_dim, heads=attn.heads, head_dim=attn.head_dim, joint=True, rotary=True)


STOCK = frozenset({"FluxAttnProcessor", "FluxAttnProcessor2_0"})

FLUX = Family(
    model="FluxTransformer2DModel",
    about="FLUX.1: joint attention, double and single blocks",
    processor=FluxProcessor,
    layers=flux_layers,
    hosts=lambda model: iter([("", model)]),
    layout=flux_layout,
    site=flux_site,
    stock=STOCK,
    joint=True,
)

FLUX_CONTROL = replace(
    FLUX,
    model="FluxControlNetModel",
    about="ControlNets of FLUX.1 (apply to `pipe.controlnet`): joint attention, double and single blocks",
    layout=control_layout,
)

CHROMA = replace(
    FLUX,
    model="ChromaTransformer2DModel",
    about="Chroma: joint attention, double and single blocks; padded prompts are masked",
    processor=ChromaProcessor,
    layout=chroma_layout,
)
