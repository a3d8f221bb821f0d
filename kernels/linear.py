"""Non-causal linear attention (Katharopoulos et al., arXiv 2006.16236, eq. 5, without the causal sum)."""

from torch import Tensor

from . import reference
from .rotary import RopeTables


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "elu1",
    normalize: str = "divide",
    eps: float = 1e-6,
    rope: RopeTables | None = None,
    heads: int | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """`out_i = phi(q_i) (mean_j phi(k_j)^T v_j) / (phi(q_i) . mean_j phi(k_j) + eps)`: linear in the length.

    Means rather than sums: the numbers stay within fp16's range at any length, and eps means the same at all of them.

    Args:
        q, k, v: `[B, S, H, D]`, not rotated; k and v may have another length and fewer heads than q.
        feature_map: phi, one of "elu1" (elu + 1), "relu", "softmax" (over D), "identity",
            "relu_eps" (relu + 1e-6, LiT, arXiv 2501.12976).
        normalize: "divide", or "none" for the numerator alone.
        eps: added to the denominator.
        rope: rotates the features in the numerator only; a rotated feature can be negative, so the denominator
            keeps the unrotated ones (as in SANA-Video, arXiv 2509.24695).
        heads: split the `H * D` channels into so many heads of their own, after feature map and rotation: fewer heads
            have larger states, `H * D / heads` squared (LiT's few heads). None keeps q's.
        key_mask: `[B, S_k]` bool, which keys there are; the means leave the others out. None for all.

    Returns:
        `[B, S, H, D]`.

    Raises:
        ValueError: shapes that do not belong together, an unknown feature map or normalisation, heads that do not
            divide the channels.
    """
    # the state is D x D per head: the specification itself is linear in memory, so it serves as the PyTorch path
    return reference.linear_attention(
        q, k, v, feature_map=feature_map, normalize=normalize, eps=eps, rope=rope, heads=heads, key_mask=key_mask
    )
