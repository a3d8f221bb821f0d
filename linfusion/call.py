"""The types that pass between families (how a host makes q, k, v) and mechanisms (what is done with them)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import RopeTables, qk_norm_rope
from .kernels.backend import why_not_triton
from .kernels.checks import repeat_heads

QKV = tuple[Tensor, Tensor, Tensor]
Parts = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Site:
    """One attention layer, as a mechanism needs to know it to make its parameters.

    Attributes:
        name: dotted name inside the model.
        width: channels of the hidden states.
        heads, head_dim: of the queries.
        axes: of the token grid, 2 for pictures, 3 for video.
        joint: whether text tokens stand in the same sequence.
        rotary: whether the host rotates queries and keys by their place on the grid.
        level: halvings between the model's finest attention grid and this layer's (UNets).
    """

    name: str
    width: int
    heads: int
    head_dim: int
    axes: int = 2
    joint: bool = False
    rotary: bool = False
    level: int = 0


@dataclass
class Layout:
    """What the latest forward of the host said about its sequence; shared by all layers below one hook.

    `grid` is a tuple of ints, or an int64 CPU tensor inside a whole-model `torch.compile` of a host that carries its
    grid in a tensor, or None while unknown. `text` counts all tokens outside the grid; `references` of them are those
    of reference pictures, which the host puts behind the picture and `reference_tokens_first` before it.
    """

    grid: tuple[int, ...] | Tensor | None = None
    tokens: int = 0
    text: int = 0
    text_first: bool = True
    text_mask: Tensor | None = None
    references: int = 0


@dataclass
class Clock:
    """Where on the noise schedule the model's latest forward was: 1 is pure noise, 0 the picture, None is unknown.

    `time` has no axes, float64, on the CPU: a tensor, so that compiled code serves all steps.
    """

    time: Tensor | None = None


@dataclass
class Stream:
    """A layer's hidden states `[B, N, C]` before the norm in front of it, from that norm's call to the layer's."""

    hidden: Tensor | None = None

    def take(self) -> Tensor | None:
        """Hand it over and let go of it."""
        hidden, self.hidden = self.hidden, None
        return hidden


class Merged(NamedTuple):
    """What a mechanism that merges tokens hands to the host's projections, and the way back.

    Attributes:
        tokens: `[B, M, C]`, to be projected instead of the hidden states `[B, N, C]`.
        agents: `[B, A, C]`, to be projected as queries too, or None.
        expand: takes the layer's output `[B, M, C]` to `[B, N, C]`.
    """

    tokens: Tensor
    agents: Tensor | None
    expand: Callable[[Tensor], Tensor]


def reference_tokens_first(x: Tensor, references: int, words: int = 0, dim: int = 1) -> Tensor:
    """`[words, picture, references]`, the host's order, to `[words, references, picture]`; views of nothing to move."""
    if references == 0:
        return x
    text, picture, others = x.split((words, x.shape[dim] - words - references, references), dim)
    return torch.cat((text, others, picture), dim)


def reference_tokens_last(x: Tensor, references: int, words: int = 0) -> Tensor:
    """The host's order again: the inverse of `reference_tokens_first`."""
    return reference_tokens_first(x, x.shape[1] - words - references, words) if references else x


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """PyTorch's attention on `[B, S, H, D]`, as diffusers' plain processors call it; k and v may have fewer heads."""
    k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=scale)
    return out.transpose(1, 2)


class Norms(NamedTuple):
    """The host's norms of queries and keys, not yet applied; joint models may have separate ones for text."""

    q: Callable[[Tensor], Tensor]
    k: Callable[[Tensor], Tensor]
    text_q: Callable[[Tensor], Tensor] | None = None
    text_k: Callable[[Tensor], Tensor] | None = None


class Prologue(NamedTuple):
    """The norms as data, where one kernel can do them together with the rotation and the joining of text and image.

    Attributes:
        eps: of all norms; None where the host has none.
        weights: of the norms of q and k; None for ones.
        text_weights: of the norms of the text's q and k, where it has its own.
        across_heads: whether a norm is over the channels of all heads.
    """

    eps: float | None
    weights: tuple[Tensor, Tensor] | None = None
    text_weights: tuple[Tensor, Tensor] | None = None
    across_heads: bool = False


@dataclass(frozen=True)
class Rope:
    """The host's rotation: calling it is the host's own function, `tables` is the same for kernels.

    Attributes:
        apply: rotates `[B, S, H, D]`, S the whole sequence when `covers_text`, else the image part.
        tables: the angles, for as many tokens.
        covers_text: whether text tokens are rotated too.
    """

    apply: Callable[[Tensor], Tensor]
    tables: RopeTables
    covers_text: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        return self.apply(x)


@dataclass
class AttnCall:
    """One self-attention call, free of any model family.

    Attributes:
        q, k, v: `[B, S, H, D]` as projected; joint models: text and image in the host's order.
        grid: tokens of the image part, `(h, w)` or `(frames, h, w)`; None where the family cannot tell.
        text: tokens outside the grid; `text_first` says where they stand.
        text_mask: `[B, text]` bool, which of them are real; None for all.
        norms, rope: the host's, not yet applied.
        scale: the host's softmax scale, None for `D ** -0.5`.
        exact: the host's own attention, `exact(q, k, v, mask=None)` on `[B, S, H, D]`; k and v with the heads that
            they have here.
        mask: whatever mask the host brought for the whole sequence; only `Softmax` can honour it.
        agents: `[B, A, H, D]`, queries of the agents of a mechanism that merges tokens.
        prologue: the same norms for one kernel; None leaves them and the rotation to the host's own functions.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grid: tuple[int, ...] | Tensor | None = None
    text: int = 0
    text_first: bool = True
    text_mask: Tensor | None = None
    norms: Norms | None = None
    rope: Rope | None = None
    scale: float | None = None
    exact: Callable[..., Tensor] = sdpa
    mask: Tensor | None = None
    agents: Tensor | None = None
    prologue: Prologue | None = None
    _normalised: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    _rotated: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def normalised(self) -> tuple[Tensor, Tensor]:
        """q and k after the host's norms; computed once."""
        if self._normalised is None:
            self._normalised = self._fused(rotate=False) or self._norm()
        return self._normalised

    def rotated(self, as_values: bool = True) -> tuple[Tensor, Tensor]:
        """q and k after the host's norms and rotation; computed once.

        `as_values` hands them over in the dtype of v: under autocast norms may answer in fp32, which the host's own
        attention takes as it is.
        """
        if self._rotated is None:
            self._rotated = self._fused(rotate=True)
        if self._rotated is None:
            q, k = self.normalised()
            self._rotated = (self._rotate(q), self._rotate(k))
        q, k = self._rotated
        return (q.to(self.v.dtype), k.to(self.v.dtype)) if as_values else (q, k)

    def output_dtype(self) -> torch.dtype:
        """What the host's norms answer in, which is fp32 under autocast in some hosts."""
        return self.v.dtype if self.prologue is not None else self.normalised()[0].dtype

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Text part and image part of `x` `[B, S, ...]`, as views."""
        if self.text == 0:
            return x[:, :0], x
        if self.text_first:
            return x[:, : self.text], x[:, self.text :]
        image = x.shape[1] - self.text
        return x[:, image:], x[:, :image]

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """The host's order again; the inverse of `split`."""
        if text.shape[1] == 0:
            return image
        return torch.cat((text, image) if self.text_first else (image, text), dim=1)

    def tables(self) -> RopeTables | None:
        """The rotation of the whole sequence as tables: text that the host does not rotate has the angle zero."""
        if self.rope is None:
            return None
        if self.rope.covers_text or self.text == 0:
            return self.rope.tables
        return self.rope.tables.still(self.text, first=self.text_first)

    def real_tokens(self) -> Tensor | None:
        """`[B, S]` bool, False where text is padding; None where there is no padding."""
        if self.text_mask is None or self.text == 0:
            return None
        image = self.text_mask.new_ones((self.text_mask.shape[0], self.q.shape[1] - self.text))
        return self.join(self.text_mask, image)

    def image_tables(self) -> RopeTables | None:
        """The rotation of the image part as tables; None where the host does not rotate."""
        if self.rope is None:
            return None
        tables, tokens = self.rope.tables, self.q.shape[1]
        if not self.rope.covers_text:
            return tables
        return tables.slice(self.text, tokens) if self.text_first else tables.slice(0, tokens - self.text)

    def _parts(self) -> tuple[Parts, Parts | None]:
        """q, k and v of the image, or of the whole sequence; and those of text that is not joined yet."""
        return (self.q, self.k, self.v), None

    def _fused(self, rotate: bool) -> tuple[Tensor, Tensor] | None:
        """Norms, rotation and joining in one kernel; None where that cannot run."""
        if self.prologue is None:
            return None
        image, words = self._parts()
        used = [x for x in (*image, *(words or ())) if x is not None]
        if why_not_triton("qk_norm_rope", used[0].shape[-1], *used) is not None:
            self.prologue = None
            return None
        rope = self.rope if rotate else None
        aside = rope is not None and not rope.covers_text and self.text_first
        eps, weights, text_weights, across_heads = self.prologue
        q, k, v = qk_norm_rope(
            *image, eps=eps, weights=weights, across_heads=across_heads, rope=None if rope is None else rope.tables,
            text=words, text_weights=text_weights, text_first=self.text_first, rope_from=self.text if aside else 0,
        )  # fmt: skip
        if words is not None and v is not None:
            self.v = v
        return q, k

    def _norm(self) -> tuple[Tensor, Tensor]:
        norms = self.norms
        if norms is None:
            return self.q, self.k
        if norms.text_q is None or norms.text_k is None:
            return norms.q(self.q), norms.k(self.k)
        (tq, iq), (tk, ik) = self.split(self.q), self.split(self.k)
        return self.join(norms.text_q(tq), norms.q(iq)), self.join(norms.text_k(tk), norms.k(ik))

    def _rotate(self, x: Tensor) -> Tensor:
        if self.rope is None:
            return x
        if self.rope.covers_text or self.text == 0:
            return self.rope(x)
        text, image = self.split(x)
        return self.join(text, self.rope(image))


def _joined(place: int) -> Any:
    """q, k or v of an `ApartCall`: joined on first use."""

    def get(call: ApartCall) -> Tensor:
        if place not in call.whole:
            call.whole[place] = call.join(call.words[place], call.image[place])
        return call.whole[place]

    return property(get, lambda call, value: call.whole.update({place: value}))


class ApartCall(AttnCall):
    """An `AttnCall` whose text was projected apart: q, k and v are given for the image and joined when first asked for.

    The kernel that norms and rotates joins on its way, so that most mechanisms never ask.
    """

    q, k, v = _joined(0), _joined(1), _joined(2)

    def __init__(self, image: QKV, words: QKV, references: int = 0, **settings: Any) -> None:
        self.image, self.words = image, words  # reference tokens, which count as text, are the first of the image's
        self.whole: dict[int, Tensor] = {}
        super().__init__(*image, text=words[0].shape[1] + references, **settings)
        self.whole.clear()

    def _norm(self) -> tuple[Tensor, Tensor]:
        norms = self.norms
        if norms is None or norms.text_q is None or norms.text_k is None:
            return super()._norm()
        (q, k, _), (words_q, words_k, _) = self.image, self.words
        return self.join(norms.text_q(words_q), norms.q(q)), self.join(norms.text_k(words_k), norms.k(k))

    def _parts(self) -> tuple[Parts, Parts | None]:
        if 2 in self.whole:  # v is joined already
            return (*self.image[:2], None), (*self.words[:2], None)
        return self.image, self.words
