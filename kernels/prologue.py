"""What stands between the projections and the attention: norm of queries and keys, rotation, joining text and image."""

from typing import Any

import torch
from torch import Tensor

from . import reference
from .prologue_launch import forward, forward_launch, forward_with_gradients, prologue_op, suits
from .rotary import RopeTables, alike


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    eps: float | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
    across_heads: bool = False,
    rope: RopeTables | None = None,
    text: tuple[Tensor, Tensor, Tensor | None] | None = None,
    text_weights: tuple[Tensor, Tensor] | None = None,
    text_first: bool = True,
    rope_from: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q and k after RMS norm (arXiv 1910.07467, eq. 4) and rotation (arXiv 2104.09864, eq. 34), joined with the text's.

    In Triton, one read and one write of every tensor. Sums and products are fp32, rounded once at the end.

    Args:
        q, k, v: `[B, N, H, D]` as projected, the image's where `text` is given; k and v may have fewer heads.
        eps: of the norm, added to the mean square; None for no norm.
        weights: of the norm of q and of k, `[D]`, or `[H * D]` and `[H_k * D]` with `across_heads`; None for ones.
        across_heads: one norm over the channels of all heads (Wan, LTX) instead of one for each head.
        rope: angles of the tokens from `rope_from` of the joint sequence on, for as many as it has; the others stay.
        text: the text's q, k and v, `[B, T, H, D]`, joined before or after (`text_first`) the image's.
        text_weights: of the text's norms; None for the image's.

    Returns:
        q, k and v, `[B, T + N, H, D]`; without `text`, v is handed through.

    Raises:
        ValueError: shapes that do not belong together.
    """
    cos, sin, interleaved = (None, None, True) if rope is None else rope.to(q.device)
    words: tuple[Any, ...] = text or (None, None, None)
    norms: tuple[Any, ...] = weights or (None, None)
    tables = alike(cos, sin)
    turning = 0 if rope is None else rope.cos.shape[0 if rope.cos.ndim == 2 else 1]
    settings = (interleaved, None if eps is None else float(eps), across_heads, text_first, rope_from, turning)
    compiling = torch.compiler.is_compiling()
    fits: Any = suits if compiling else forward_launch
    run = fits(q, k, v, *words, *norms, *(text_weights or (None, None)), *tables, *settings)
    if not run:
        return reference.qk_norm_rope(
            q, k, v, eps=eps, weights=weights, across_heads=across_heads, rope=rope, text=text,
            text_weights=text_weights, text_first=text_first, rope_from=rope_from,
        )  # fmt: skip
    tensors = (q, k, v if text else None, *words, *norms, *(text_weights or norms), *tables)
    if compiling:
        out_q, out_k, out_v = prologue_op(*tensors, *settings)
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        out_q, out_k, out_v = forward_with_gradients(*tensors, *settings, run)
    else:
        out_q, out_k, out_v = forward(*tensors, run)
    return out_q, out_k, v if tensors[2] is None else out_v
