"""Checks of arguments that several ops share: one text for each thing that cannot be done."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k and v are `[B, S, H, D]` tensors that belong together.

    k and v may have another length than q, and fewer heads when they divide q's (grouped heads).
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, S, H, D], got shape {tuple(x.shape)}.")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must agree in batch, length and heads, got {tuple(k.shape)} and {tuple(v.shape)}.")
    if q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch and head dim, "
            "and the heads of k must divide those of q."
        )
    if not (q.dtype == k.dtype == v.dtype) or not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}.")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}.")


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, S, H_kv, D]` to `[B, S, heads, D]`: query heads in a row share one key head."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, S, H, D]` with its `H * D` channels in `heads` heads; ValueError where these do not divide them."""
    channels = x.shape[2] * x.shape[3]
    if heads < 1 or channels % heads:
        raise ValueError(f"heads={heads} does not divide the {channels} channels of {x.shape[2]} heads.")
    return x.flatten(2).unflatten(-1, (heads, -1))


def check_grid(grid: Sequence[int], tokens: int, text: int, text_mask: Tensor | None, batch: int) -> tuple[int, ...]:
    """The grid as a tuple of 2 or 3 lengths; ValueError unless it and `text` make up `tokens`."""
    grid = tuple(int(n) for n in grid)
    if len(grid) not in (2, 3) or min(grid) < 1:
        raise ValueError(f"grid must be (h, w) or (frames, h, w) with positive lengths, got {grid}.")
    if text < 0 or math.prod(grid) + text != tokens:
        raise ValueError(
            f"The sequence has {tokens} tokens, but grid {' x '.join(map(str, grid))} = {math.prod(grid)} "
            f"and {text} text tokens make {math.prod(grid) + text}."
        )
    if text_mask is not None and (text_mask.dtype != torch.bool or tuple(text_mask.shape) != (batch, text)):
        raise ValueError(
            f"text_mask must be bool [B, text] = [{batch}, {text}], got {text_mask.dtype} {tuple(text_mask.shape)}."
        )
    return grid


def check_radius(radius: float | Sequence[float], axes: int | None = None) -> tuple[float, ...]:
    """One radius, or one per axis, as a tuple; with `axes`, one number is repeated for each axis.

    Raises:
        ValueError: a radius that is not a positive finite number, or a wrong number of them.
    """
    values = tuple(radius) if isinstance(radius, (tuple, list)) else (radius,)
    for r in values:
        if isinstance(r, bool) or not isinstance(r, (int, float)) or not math.isfinite(r) or r <= 0:
            raise ValueError(f"radius must be positive (tokens of the layer's grid), got {radius!r}.")
    if len(values) not in (1, 2, 3):
        raise ValueError(f"radius must be one number, or one per axis of the grid (2 or 3), got {radius!r}.")
    if axes is not None:
        if len(values) == 1:
            values = values * axes
        elif len(values) != axes:
            raise ValueError(f"radius {radius!r} has {len(values)} axes, the grid has {axes}.")
    return values


def check_kernel(v: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A depthwise convolution's weight as `[H * D, 1, k, k]` and bias as `[H * D]`, both in the dtype of v.

    Raises:
        ValueError: an even kernel, or weights for another number of channels than `v` `[B, N, H, D]` has.
    """
    if v.ndim != 4:
        raise ValueError(f"v must be [B, N, H, D], got shape {tuple(v.shape)}.")
    heads, dim = v.shape[2:]
    if weight.ndim != 3 or weight.shape[0] not in (dim, heads * dim):
        raise ValueError(f"weight must be [{dim} or {heads * dim}, k, k], got shape {tuple(weight.shape)}.")
    if weight.shape[1] % 2 == 0 or weight.shape[2] % 2 == 0:
        raise ValueError(f"An even kernel has no centre: weight must be [C, k, k], k odd, got {tuple(weight.shape)}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}] as the weight, got shape {tuple(bias.shape)}.")
    copies = heads * dim // weight.shape[0]
    weight = weight.to(v.dtype).repeat(copies, 1, 1).unsqueeze(1)
    return weight, None if bias is None else bias.to(v.dtype).repeat(copies)


def check_agents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    scale: float | None,
    agent_scale: float | None,
    key_bias: Tensor | None,
    query_bias: Tensor | None,
) -> tuple[float, float]:
    """Both scales of `agent_attention`; ValueError unless its tensors belong together."""
    check_qkv(q, k, v)
    if agents.ndim != 4 or agents.shape[0] != q.shape[0] or agents.shape[2:] != q.shape[2:] or agents.dtype != q.dtype:
        raise ValueError(f"agents must be [B, n, H, D] as q {tuple(q.shape)}, got {tuple(agents.shape)}.")
    count = agents.shape[1]
    for name, b, shape in (
        ("key_bias", key_bias, (count, k.shape[1])),
        ("query_bias", query_bias, (q.shape[1], count)),
    ):
        if b is not None and (b.ndim != 3 or b.shape[0] not in (1, q.shape[2]) or tuple(b.shape[1:]) != shape):
            raise ValueError(f"{name} must be [{q.shape[2]} or 1, {shape[0]}, {shape[1]}], got {tuple(b.shape)}.")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return scale, scale if agent_scale is None else float(agent_scale)
