"""FLUX: joint attention over text then image, in double-stream blocks and in single-stream blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from ..call import AttnCall, Layout, Norms, Rope, Site
from ..kernels import RopeTables
from .base import Family, HostLayer, Processor, argument, class_names, to_heads


class FluxProcessor(Processor):
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
        layout, double = mechanism.layout, encoder_hidden_states is not None
        x_q = x_k = hidden_states
        if mechanism.changes_input and double:
            x_q, x_k = mechanism.features(hidden_states)
        elif mechanism.changes_input:
            text, image = hidden_states[:, : layout.text], hidden_states[:, layout.text :]
            x_q, x_k = (torch.cat((text, x), dim=1) for x in mechanism.features(image))
        q = to_heads(attn.to_q(x_q), attn.head_dim)
        k = to_heads(attn.to_k(x_k), attn.head_dim)
        v = to_heads(attn.to_v(hidden_states), attn.head_dim)
        norms = Norms(attn.norm_q, attn.norm_k)
        if double:
            q, k, v = (
                torch.cat((to_heads(project(encoder_hidden_states), attn.head_dim), x), dim=1)
                for project, x in ((attn.add_q_proj, q), (attn.add_k_proj, k), (attn.add_v_proj, v))
            )
            norms = Norms(attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k)
        call = AttnCall(
            q, k, v, grid=layout.grid, text=layout.text, text_first=True, norms=norms,
            rope=flux_rope(image_rotary_emb), exact=self.exact, mask=attention_mask,
        )  # fmt: skip
        out = mechanism(call).flatten(2).to(q.dtype)
        if not double:
            return out
        text, image = call.split(out)
        image = attn.to_out[1](attn.to_out[0](image.contiguous()))
        return image, attn.to_add_out(text.contiguous())

    def exact(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=self._attention_backend)


def flux_rope(tables: Any) -> Rope | None:
    if tables is None:
        return None
    turn: Any = partial(apply_rotary_emb, freqs_cis=tables, sequence_dim=1)  # diffusers types it as a pair
    return Rope(turn, RopeTables(tables[0], tables[1], interleaved=True))


def flux_layout(host: HostLayer, args: tuple, kwargs: dict, needs: frozenset[str]) -> Layout:
    """The grid stands in `img_ids`, a tensor: reading it waits for the device, so only who needs it pays."""
    tokens = argument(args, kwargs, 0, "hidden_states").shape[1]
    text = argument(args, kwargs, 1, "encoder_hidden_states").shape[1]
    if "grid" not in needs:
        return Layout(tokens=tokens, text=text)
    ids = argument(args, kwargs, 4, "img_ids")
    sizes = ids_grid(ids[0] if ids.ndim == 3 else ids)
    if torch.compiler.is_compiling():
        return Layout(sizes, tokens, text)  # the op that uses it reads it, and checks it against the tokens
    grid = tuple(sizes.tolist())
    if math.prod(grid) != tokens:
        raise ValueError(
            f"img_ids do not describe one grid of {tokens} image tokens, row by row. Reference images in the "
            "sequence (FLUX Kontext) are not supported by mechanisms that need the grid."
        )
    return Layout(grid, tokens, text)


def ids_grid(ids: Tensor) -> Tensor:
    """Rows and columns of `img_ids` `[N, 3]` as int64 `[2]` on the CPU; zeros when they are not one picture's.

    Counts the places where the column falls back, since ids come in the model's dtype: above 256 bf16 repeats and
    skips whole numbers, but keeps their order.
    """
    frame, row, column = ids.unbind(dim=-1)
    falls = (column[1:] < column[:-1]).sum()
    rows = torch.where((column == column[0]).all(), len(ids), falls + 1)
    one = (frame == frame[0]).all() & (row[1:] >= row[:-1]).all()
    return torch.stack((rows, len(ids) // rows)).mul(one).to("cpu", torch.int64)


def flux_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if "FluxAttention" in class_names(module):
            yield name, module


def flux_site(name: str, attn: HostLayer) -> Site:
    return Site(name, width=attn.query_dim, heads=attn.heads, head_dim=attn.head_dim, joint=True, rotary=True)


FLUX = Family(
    model="FluxTransformer2DModel",
    about="FLUX.1: joint attention, double and single blocks",
    processor=FluxProcessor,
    layers=flux_layers,
    hosts=lambda model: iter([("", model)]),
    layout=flux_layout,
    site=flux_site,
    stock=frozenset({"FluxAttnProcessor", "FluxAttnProcessor2_0"}),
    joint=True,
)
