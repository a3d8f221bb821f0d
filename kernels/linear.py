"""Non-causal linear attention (Katharopoulos et al., arXiv 2006.16236, eq. 5, without the causal sum)."""

from typing import Any

import torch
from torch import Tensor

from . import reference
from .backend import why_not_triton
from .checks import check_linear, split_heads
from .linear_launch import forward, forward_recipe, forward_with_gradients, linear_attention_op, suits
from .rotary import RopeTables, alike


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "elu1",
    normalize: str = "divide",
    eps: float = 1e-6,
    scale: float = 1.0,
    rope: RopeTables | None = None,
    heads: int | None = None,
    key_mask: Tensor | None = None,
    key_weight: Tensor | None = None,
) -> Tensor:
    """`out_i = phi(q_i) (mean_j phi(k_j)^T v_j) / (phi(q_i) . mean_j phi(k_j) + eps)`: linear in the length.

    Means rather than sums: the numbers stay within fp16's range at any length, and eps means the same at all of them.
    In Triton on a GPU: four passes over `[B, S, H, D]` forward and seven backward, nine above head dim 64. Computed by
    PyTorch, and said so in the log: head dims above 256 (so `heads` of many channels each), gradients of `key_weight`,
    values of another head dim than the keys', pairs that are half a head apart where D is no power of two, and `heads`
    together with what depends on the order of channels ("softmax", `key_weight`, angles of each head, grouped heads).

    Args:
        q, k, v: `[B, S, H, D]`, not rotated; k and v may have another length and fewer heads than q.
        feature_map: phi, one of "elu1" (elu + 1), "relu", "softmax" (over D), "identity",
            "relu_eps" (relu + 1e-6, LiT, arXiv 2501.12976).
        normalize: with `t_i = scale phi(q_i) . mean_j phi(k_j)` and `n_i` the numerator above times scale,
            "divide": `n_i / (t_i + eps)`; "none": `n_i`; "inline": `n_i + (1 - t_i) mean(v)` (InLine, arXiv
            2412.06590); "mala": `(1 + 1 / (t_i + eps)) n_i - t_i mean(v)` (MALA, arXiv 2507.00698).
        eps: added to the denominator.
        scale: factor of `phi(q) . phi(k)`; without effect on "divide" but for eps.
        rope: rotates the features in the numerator only; a rotated feature can be negative, so the denominator
            keeps the unrotated ones (as in SANA-Video, arXiv 2509.24695).
        heads: split the `H * D` channels into so many heads of their own, after feature map and rotation: fewer heads
            have larger states, `H * D / heads` squared (LiT's few heads). None keeps q's.
        key_mask: `[B, S_k]` bool, which keys there are; the means leave the others out. None for all.
        key_weight: `[B, S_k, H_k]`, factors of phi(k) (RALA's alpha, arXiv 2411.07635); the means are still over the
            number of keys.

    Returns:
        `[B, S, H, D]`.

    Raises:
        ValueError: shapes that do not belong together, an unknown feature map or normalisation, heads that do not
            divide the channels, `key_weight` where mean(v) is needed too.
    """
    settings: dict[str, Any] = {
        "feature_map": feature_map, "normalize": normalize, "eps": float(eps), "scale": float(scale),
    }  # fmt: skip
    if heads is not None or key_mask is not None or key_weight is not None:
        check_linear(q, k, v, feature_map, normalize, rope, key_mask, key_weight)
    if heads is not None and heads != q.shape[2]:
        groups = _regrouped(q, k, v, feature_map, rope, heads, key_weight)
        if groups is not None:
            return linear_attention(*groups[:3], rope=groups[3], key_mask=key_mask, **settings).reshape(q.shape)
    weight, count = _weights(key_mask, key_weight, k)
    cos, sin, interleaved = (None, None, True) if rope is None else rope.to(q.device)
    tensors = (q, k, v, weight, count, *alike(cos, sin))
    arguments = (*tensors, interleaved, *settings.values())
    differentiable = torch.is_grad_enabled()
    compiling = torch.compiler.is_compiling()
    recipe = (suits if compiling else forward_recipe)(*arguments)
    lacking = None
    if heads not in (None, q.shape[2]):
        lacking = f"channels of {q.shape[2]} heads cannot be put in {heads} beforehand here"
    elif differentiable and key_weight is not None and key_weight.requires_grad:
        lacking = "gradients of key_weight are computed by PyTorch"
    if not recipe or (lacking and why_not_triton("linear_attention", None, q, k, v, lacking=lacking)):
        # the state is D x D per head: the specification itself is linear in memory, so it serves as the PyTorch path
        return reference.linear_attention(
            q, k, v, rope=rope, heads=heads, key_mask=key_mask, key_weight=key_weight, **settings
        )
    if compiling:
        return linear_attention_op(*arguments)[0]
    if differentiable and (q.requires_grad or k.requires_grad or v.requires_grad):
        return forward_with_gradients(*arguments, recipe)[0]
    return forward(*tensors, recipe)[0]


def _regrouped(
    q: Tensor, k: Tensor, v: Tensor, feature_map: str, rope: RopeTables | None, heads: int, key_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, RopeTables | None] | None:
    """The same call with channels and angles in `heads` heads from the start; None where the order matters."""
    if feature_map == "softmax" or key_weight is not None or k.shape[2] != q.shape[2] or q.shape[2] % max(heads, 1):
        return None
    if rope is not None:
        if not rope.interleaved or (rope.cos.ndim == 4 and rope.cos.shape[2] != 1):
            return None
        copies = (1,) * (rope.cos.ndim - 1) + (q.shape[2] // heads,)
        rope = RopeTables(rope.cos.repeat(copies), rope.sin.repeat(copies), interleaved=True)
    return *(split_heads(x, heads) for x in (q, k, v)), rope  # type: ignore[return-value]


def _weights(
    key_mask: Tensor | None, key_weight: Tensor | None, k: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Factors of phi(k) `[B, S_k, H_k]` and how many keys each mean is over `[B]`; None where all count alike."""
    if key_mask is None:
        if key_weight is None:
            return None, None
        return key_weight, k.new_full(k.shape[:1], k.shape[1], dtype=torch.float32)
    count = key_mask.sum(dim=1).clamp(min=1).to(torch.float32)
    weight = key_mask[..., None] if key_weight is None else key_mask[..., None] * key_weight
    return weight.expand(k.shape[:3]), count
