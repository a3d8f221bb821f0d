"""FLUX.2: double blocks as FLUX has them; single blocks whose one projection makes q, k, v and the MLP's input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..call import AttnCall, Layout, Norms, reference_tokens_first, reference_tokens_last
from .base import DispatchProcessor, HostLayer, argument, class_names, run, to_heads
from .flux import FLUX, FluxProcessor, flux_layout, flux_rope


class Flux2SingleProcessor(DispatchProcessor):
    """`Flux2ParallelSelfAttention`: attention and MLP side by side; the host passes the mask second, not third."""

    def __call__(
        self,
        attn: HostLayer,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        mechanism = self.mechanism(attn, attention_mask)
        layout, moved = mechanism.layout, self.moved(mechanism)
        words = layout.text - layout.references
        hidden_states = reference_tokens_first(hidden_states, moved, words)
        q, k, v, mlp = projected(attn, hidden_states)
        if mechanism.changes_input:  # the projection is one module, so that each new input goes through all of it
            x_q, x_k = mechanism.features(hidden_states[:, layout.text :])
            q = torch.cat((q[:, : layout.text], projected(attn, x_q)[0]), dim=1)
            k = torch.cat((k[:, : layout.text], projected(attn, x_k)[1]), dim=1)
        call = AttnCall(
            q, k, v, grid=layout.grid, text=layout.text, norms=Norms(attn.norm_q, attn.norm_k),
            rope=flux_rope(image_rotary_emb, moved=moved, words=words), exact=self.exact, mask=attention_mask,
            prologue=self.prologue(mechanism, attn, q, apart=False),
        )  # fmt: skip
        out = run(mechanism, call, q)
        out = attn.to_out(torch.cat((out, attn.mlp_act_fn(mlp)), dim=-1))
        return reference_tokens_last(out, moved, words)


def projected(attn: HostLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v `[B, S, H, D]` and the MLP's input; by their global ratio, since tensor parallelism shards each."""
    out = attn.to_qkv_mlp_proj(x)
    whole = 3 * attn.inner_dim
    width = out.shape[-1] * whole // (whole + attn.mlp_hidden_dim * attn.mlp_mult_factor)
    qkv, mlp = out.split([width, out.shape[-1] - width], dim=-1)
    q, k, v = (to_heads(part, attn.head_dim) for part in qkv.chunk(3, dim=-1))
    return q, k, v, mlp


def flux2_layout(host: HostLayer, args: tuple, kwargs: dict, needs: frozenset[str]) -> Layout:
    mode = argument(args, kwargs, 9, "kv_cache_mode")
    if mode is not None:
        raise NotImplementedError(f"kv_cache_mode={mode!r}: a cache of reference images is not supported.")
    return flux_layout(host, args, kwargs, needs, ids=3)


def flux2_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if {"Flux2Attention", "Flux2ParallelSelfAttention"} & set(class_names(module)):
            yield name, module


FLUX2 = replace(
    FLUX,
    model="Flux2Transformer2DModel",
    about="FLUX.2: joint attention, double and single blocks",
    processor=FluxProcessor,
    processors={"Flux2ParallelSelfAttention": Flux2SingleProcessor},
    layers=flux2_layers,
    layout=flux2_layout,
    stock=frozenset({"Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor"}),
)
