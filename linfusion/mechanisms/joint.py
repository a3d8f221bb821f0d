"""Text in the sequence of a linear mechanism: kept exact (EDiT's rule, arXiv 2503.16726), or linear as all else."""

from typing import Any

import torch
from torch import Tensor

from ..call import AttnCall
from ..kernels import linear_attention

TEXT = ("exact", "linear")


def check_text(text: str) -> None:
    """ValueError unless `text` is a setting that `attend` knows."""
    if text not in TEXT:
        raise ValueError(f"text must be one of {', '.join(TEXT)}, got {text!r}.")


def attend(call: AttnCall, text: str, **settings: Any) -> Tensor:
    """Linear attention over the whole sequence, `[B, S, H, D]`: the host's norms, its rotation in the numerator.

    Args:
        text: "exact" is linear among image tokens alone, see `mix_text`; "linear" treats text tokens as all others.
            The same where a host has no text in its sequence.
        settings: of `linear_attention`.
    """
    q, k = call.normalised()
    q, k = q.to(call.v.dtype), k.to(call.v.dtype)  # under autocast norms may answer in fp32
    if text == "linear" or call.text == 0:
        return linear_attention(q, k, call.v, rope=call.tables(), key_mask=call.real_tokens(), **settings)
    (_, q), (_, k), (_, v) = call.split(q), call.split(k), call.split(call.v)
    return mix_text(call, linear_attention(q, k, v, rope=call.image_tables(), **settings))


def mix_text(call: AttnCall, image: Tensor) -> Tensor:
    """The whole sequence `[B, S, H, D]` from the linear attention `image` `[B, N, H, D]` among image tokens.

    Text queries attend to everything by softmax. Image queries mix `image` and softmax attention over the text keys,
    weighted by how many tokens each stands for: N / (N + T) and T / (N + T), T counting real text tokens only.
    """
    if call.text == 0:
        return image
    q, k = call.rotated()
    (tq, iq), (tk, _), (tv, _) = call.split(q), call.split(k), call.split(call.v)
    text_keys = all_keys = None
    share: float | Tensor = image.shape[1] / (image.shape[1] + call.text)
    if call.text_mask is not None and (real := call.real_tokens()) is not None:
        # a sample without any text weighs it by zero, but softmax over no key at all would be 0 / 0
        text_keys = (call.text_mask | ~call.text_mask.any(dim=1, keepdim=True))[:, None, None]
        all_keys = real[:, None, None]
        # half precision cannot count tokens: bf16 has no 257
        counts = real.sum(dim=1).to(torch.promote_types(image.dtype, torch.float32))
        share = (image.shape[1] / counts)[:, None, None, None]
    text = call.exact(tq, k, call.v, mask=all_keys)
    from_text = call.exact(iq, tk, tv, mask=text_keys)
    return call.join(text, (share * image + (1 - share) * from_text).to(image.dtype))


def text_pairs(tokens: int, text: int) -> float:
    """What `mix_text` adds for `tokens` of the image, in query-key pairs of one head."""
    return float(text * (tokens + text) + tokens * text)


def linear_pairs(tokens: int, text: int, rule: str, head_dim: int) -> float:
    """What `attend` does, in query-key pairs of one head: building and reading a state of `head_dim` squared."""
    if rule == "linear":
        return float((tokens + text) * head_dim)
    return tokens * head_dim + text_pairs(tokens, text)
