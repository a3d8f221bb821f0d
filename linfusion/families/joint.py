"""What joint attention has in common: text and image in one sequence, their projections apart or joined before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..call import AttnCall, Norms, Rope, Site, sdpa
from ..mechanisms import Mechanism
from .base import HostLayer, Processor, class_names, to_heads


class JointProcessor(Processor):
    """`text_first` says on which side of the image the host puts its text."""

    text_first: ClassVar[bool] = True

    def attend(
        self,
        mechanism: Mechanism,
        attn: HostLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        *,
        rope: Rope | None = None,
        mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        scale: float | None = None,
        exact: Callable[..., Tensor] = sdpa,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention before the output projections: image and text `[B, S, C]`.

        Without `encoder_hidden_states`, text (if the layer has any) stands in `hidden_states` already; the whole
        sequence then comes back first, and None.
        """
        site, apart = mechanism.site, encoder_hidden_states is not None
        text = mechanism.layout.text if site.joint else 0
        merged = mechanism.merge(hidden_states) if mechanism.merges_tokens else None  # only in layers without text
        if merged is not None:
            hidden_states = merged.tokens
        x_q, x_k = self.inputs(mechanism, hidden_states, 0 if apart else text)
        q = to_heads(attn.to_q(x_q), site.head_dim)
        k = to_heads(attn.to_k(x_k), site.head_dim)
        v = to_heads(attn.to_v(hidden_states), site.head_dim)
        norms = None
        if attn.norm_q is not None or attn.norm_k is not None:
            norms = Norms(attn.norm_q or nn.Identity(), attn.norm_k or nn.Identity())
        if apart:
            q, k, v = (
                self.join(to_heads(project(encoder_hidden_states), site.head_dim), x)
                for project, x in ((attn.add_q_proj, q), (attn.add_k_proj, k), (attn.add_v_proj, v))
            )
            if norms is not None:
                norms = Norms(*norms[:2], attn.norm_added_q or nn.Identity(), attn.norm_added_k or nn.Identity())
        call = AttnCall(
            q, k, v, grid=mechanism.layout.grid, text=text, text_first=self.text_first, text_mask=text_mask,
            norms=norms, rope=rope, scale=scale, exact=exact, mask=mask,
        )  # fmt: skip
        if merged is not None and merged.agents is not None:
            call.agents = to_heads(attn.to_q(merged.agents), site.head_dim)
        out = mechanism(call).flatten(2).to(q.dtype)
        if merged is not None:
            out = merged.expand(out)
        if not apart:
            return out, None
        words, image = call.split(out)
        return image, words

    def inputs(self, mechanism: Mechanism, x: Tensor, text: int) -> tuple[Tensor, Tensor]:
        """Inputs of the query and key projections; of `text` tokens in `x`, the mechanism's features see nothing."""
        if not mechanism.changes_input or text == 0:
            return mechanism.features(x)
        rest = x.shape[1] - text
        words, image = (x[:, :text], x[:, text:]) if self.text_first else (x[:, rest:], x[:, :rest])
        x_q, x_k = mechanism.features(image)
        return self.join(words, x_q), self.join(words, x_k)

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """The host's order."""
        return torch.cat((text, image) if self.text_first else (image, text), dim=1)


def block_attention(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every `Attention` of the transformer blocks; IP-Adapters bring others of their own."""
    for name, module in model.named_modules():
        if name.partition(".")[0].endswith("transformer_blocks") and "Attention" in class_names(module):
            yield name, module


def joint_site(name: str, attn: HostLayer) -> Site:
    """An `Attention` whose sequence holds text; it has no `head_dim` of its own."""
    return Site(name, width=attn.query_dim, heads=attn.heads, head_dim=attn.inner_dim // attn.heads, joint=True)
