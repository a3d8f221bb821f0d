"""AuraFlow: joint attention over register tokens, text, then image, in double and in single blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from ..call import Layout, sdpa
from .base import Family, HostLayer, Processor, argument
from .joint import block_attention, joint_site
from .spatial import patch_layout


class AuraFlowProcessor(Processor):
    """Text comes apart in double blocks, joined to the image in single blocks. Positions are learned: no rotation."""

    def __call__(
        self,
        attn: HostLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        mechanism = self.mechanism(attn, attention_mask)  # which the stock processor does not look at
        image, text = self.attend(
            mechanism, attn, hidden_states, encoder_hidden_states,
            scale=attn.scale, exact=partial(sdpa, scale=attn.scale),
        )  # fmt: skip
        image = attn.to_out[1](attn.to_out[0](image))
        return image if text is None else (image, attn.to_add_out(text))


def auraflow_layout(host: HostLayer, args: tuple, kwargs: dict, needs: frozenset[str]) -> Layout:
    """The host puts its register tokens before the text: neither has a place on the grid."""
    text = argument(args, kwargs, 1, "encoder_hidden_states").shape[1]
    return replace(patch_layout(host, args, kwargs, needs), text=text + host.register_tokens.shape[1])


AURAFLOW = Family(
    model="AuraFlowTransformer2DModel",
    about="AuraFlow: joint attention, double and single blocks; register tokens count as text",
    processor=AuraFlowProcessor,
    layers=block_attention,
    hosts=lambda model: iter([("", model)]),
    layout=auraflow_layout,
    site=joint_site,
    stock=frozenset({"AuraFlowAttnProcessor2_0"}),
    joint=True,
)
