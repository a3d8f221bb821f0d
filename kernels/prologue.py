"""What stands between the projections and the attention: norm of queries and keys, rotation, joining text and image."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .backend import why_not_triton
from .checks import check_prologue
from .prologue_launch import _rows, forward, forward_with_gradients, prologue_op
from .rotary import RopeTables


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
    check_prologue(q, k, v, weights, across_heads, rope, text, text_weights, rope_from)
    parts = [x for x in (q, k, v, *(text or ())) if x is not None]
    paired = rope is None or rope.interleaved or q.shape[-1] % 2 == 0
    used = parts if text else [q, k]
    if not paired or why_not_triton("qk_norm_rope", q.shape[-1], *used) or not all(map(_rows, used)):
        return reference.qk_norm_rope(
            q, k, v, eps=eps, weights=weights, across_heads=across_heads, rope=rope, text=text,
            text_weights=text_weights, text_first=text_first, rope_from=rope_from,
        )  # fmt: skip
    if text is not None and v is not None and (v.stride() != k.stride() or text[2].stride() != text[1].stride()):  # type: ignore[union-attr]
        v, text = v.contiguous(), (text[0], text[1].contiguous(), text[2].contiguous())  # type: ignore[union-attr]
        k = k.contiguous()
    cos, sin, interleaved = (None, None, True) if rope is None else rope.to(q.device)
    weights, words = weights or (None, None), text or (None, None, None)  # type: ignore[assignment]
    tensors = (q, k, v if text else None, *words, *weights, *(text_weights or weights), cos, sin)  # type: ignore[misc]
    turning = 0 if rope is None else rope.cos.shape[0 if rope.cos.ndim == 2 else 1]
    if torch.compiler.is_compiling():
        run: Callable = prologue_op
    else:
        wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        run = forward_with_gradients if wanted else forward
    out_q, out_k, out_v = run(*tensors, interleaved, eps, across_heads, text_first, rope_from, turning)
    return out_q, out_k, v if tensors[2] is None else out_v
