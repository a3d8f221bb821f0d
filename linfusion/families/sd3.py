"""SD3, SD3.5 and their ControlNets: joint attention over image then text; SD3.5 adds self-attention of the image."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from ..call import Layout, Site
from .base import Family, HostLayer, Processor, argument
from .joint import block_attention, joint_site
from .spatial import patch_layout, thousandths


class SD3Processor(Processor):
    """`attn` with text apart; `attn2` and the blocks of SD3.5's ControlNets without any. No rotation."""

    text_first = False

    def __call__(
        self,
        attn: HostLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        mechanism = self.mechanism(attn, attention_mask)  # which the stock processor does not look at
        image, text = self.attend(mechanism, attn, hidden_states, encoder_hidden_states)
        image = attn.to_out[1](attn.to_out[0](image))
        if text is None:
            return image
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def sd3_site(name: str, attn: HostLayer) -> Site:
    return replace(joint_site(name, attn), joint=attn.added_kv_proj_dim is not None)


def sd3_layout(host: HostLayer, args: tuple, kwargs: dict, needs: frozenset[str]) -> Layout:
    text = argument(args, kwargs, 1, "encoder_hidden_states").shape[1]
    return replace(patch_layout(host, args, kwargs, needs), text=text, text_first=False)


def control_layout(host: HostLayer, args: tuple, kwargs: dict, needs: frozenset[str]) -> Layout:
    """From the condition: SD3.5's ControlNets get their hidden states embedded already, and no text."""
    layout = patch_layout(host, (argument(args, kwargs, 1, "controlnet_cond"),), {}, needs)
    text = argument(args, kwargs, 3, "encoder_hidden_states")
    return replace(layout, text=0 if text is None else text.shape[1], text_first=False)


SD3 = Family(
    model="SD3Transformer2DModel",
    about="SD3, SD3.5: joint attention; in SD3.5 self-attention of the picture too",
    processor=SD3Processor,
    layers=block_attention,
    hosts=lambda model: iter([("", model)]),
    layout=sd3_layout,
    site=sd3_site,
    stock=frozenset({"JointAttnProcessor2_0", "XFormersJointAttnProcessor"}),
    joint=True,
    time=partial(thousandths, position=3),
)

SD3_CONTROL = replace(
    SD3,
    model="SD3ControlNetModel",
    about="ControlNets of SD3, SD3.5 (apply to `pipe.controlnet`): joint attention; in SD3.5 large self-attention",
    layout=control_layout,
    time=partial(thousandths, position=5),
)
