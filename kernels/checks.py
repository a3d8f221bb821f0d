"""Checks of arguments that several ops share: one text for each thing that cannot be done."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .features import named_feature_map
from .rotary import RopeTables, check_tables


def check_head_dim_of_values(q: Tensor, v: Tensor) -> None:
    """ValueError where values have another head dim than queries, for ops that take one."""
    if v.shape[-1] != q.shape[-1]:
        raise ValueError(f"v must have the head dim of q, {q.shape[-1]}, got {v.shape[-1]}.")


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


NORMALIZE = ("divide", "none", "inline", "mala")


def check_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str,
    normalize: str,
    rope: RopeTables | None,
    key_mask: Tensor | None,
    key_weight: Tensor | None,
) -> None:
    """ValueError unless the arguments of linear attention belong together."""
    check_qkv(q, k, v)
    named_feature_map(feature_map)
    if normalize not in NORMALIZE:
        raise ValueError(f"Unknown normalize={normalize!r}. Available: {', '.join(NORMALIZE)}.")
    if rope is not None:
        check_tables(q, rope)
        check_tables(k, rope)
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != k.shape[:2]):
        raise ValueError(
            f"key_mask must be bool [B, S_k] = {tuple(k.shape[:2])}, got {tuple(key_mask.shape)} {key_mask.dtype}."
        )
    if key_weight is not None:
        if key_weight.shape != k.shape[:3] or not key_weight.dtype.is_floating_point:
            raise ValueError(
                f"key_weight must be floating [B, S_k, H_k] = {tuple(k.shape[:3])}, "
                f"got {tuple(key_weight.shape)} {key_weight.dtype}."
            )
        if normalize in ("inline", "mala"):
            raise ValueError(f"key_weight has no meaning with normalize={normalize!r}, which subtracts a plain mean.")


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
            raise ValueError(f"radius must be positive and finite (tokens of the layer's grid), got {radius!r}.")
    if len(values) not in (2, 3) and isinstance(radius, (tuple, list)):
        raise ValueError(f"radius must be one number, or one per axis of the grid (2 or 3), got {radius!r}.")
    if axes is not None:
        if len(values) == 1:
            values = values * axes
        elif len(values) != axes:
            raise ValueError(f"radius {radius!r} has {len(values)} axes, the grid has {axes}.")
    return values


def check_kernel(
    v: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, text: Tensor | None = None
) -> None:
    """ValueError unless a depthwise convolution's arguments belong together.

    Raises:
        ValueError: a kernel without a centre, weights for another number of channels than `v` `[B, N, H, D]` has,
            another shape or dtype of `add`, or `text` of another batch or other heads.
    """
    if v.ndim != 4:
        raise ValueError(f"v must be [B, N, H, D], got shape {tuple(v.shape)}.")
    heads, dim = v.shape[2:]
    if weight.ndim != 3 or weight.shape[0] not in (dim, heads * dim):
        raise ValueError(f"weight must be [{dim} or {heads * dim}, k, k], got shape {tuple(weight.shape)}.")
    if weight.shape[1] != weight.shape[2] or weight.shape[1] % 2 == 0:
        raise ValueError(f"weight must be [C, k, k], k odd so that there is a centre, got shape {tuple(weight.shape)}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}] as the weight, got shape {tuple(bias.shape)}.")
    if add is not None and (add.shape != v.shape or add.dtype != v.dtype):
        raise ValueError(f"add must be {tuple(v.shape)} {v.dtype} as v, got {tuple(add.shape)} {add.dtype}.")
    if text is not None:
        batch = v.shape[0]
        if text.ndim != 4 or text.shape[0] != batch or text.shape[2:] != v.shape[2:] or text.dtype != v.dtype:
            raise ValueError(
                f"text must be [{batch}, T, {heads}, {dim}] {v.dtype} as v, got {tuple(text.shape)} {text.dtype}."
            )


def repeat_kernel(v: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The weight as `[H * D, 1, k, k]` and the bias as `[H * D]`, for each head the same where they share it."""
    copies = v.shape[2] * v.shape[3] // weight.shape[0]
    return weight.repeat(copies, 1, 1).unsqueeze(1), None if bias is None else bias.repeat(copies)


Bias = Tensor | tuple[Tensor, Tensor]
"""Dense, or a table `[H or 1, n, r]` and weights `[S, r]`."""


def dense_bias(bias: Bias, transposed: bool = False) -> Tensor:
    """`[H or 1, n, S]`, or `[H or 1, S, n]` if transposed."""
    if isinstance(bias, Tensor):
        return bias
    wide = torch.promote_types(bias[0].dtype, bias[1].dtype)
    table, weights = (x.to(wide) for x in bias)
    return weights @ table.mT if transposed else table @ weights.mT


def check_agents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    scale: float | None,
    agent_scale: float | None,
    key_bias: Bias | None,
    query_bias: Bias | None,
    shortcut: float,
) -> tuple[float, float]:
    """Both scales of `agent_attention`; ValueError unless its tensors belong together."""
    check_qkv(q, k, v)
    if agents.ndim != 4 or agents.shape[0] != q.shape[0] or agents.shape[2:] != q.shape[2:] or agents.dtype != q.dtype:
        raise ValueError(f"agents must be [B, n, H, D] as q {tuple(q.shape)}, got {tuple(agents.shape)}.")
    if shortcut and k.shape[1] != q.shape[1]:
        raise ValueError(f"shortcut adds v to the output: {k.shape[1]} values do not fit {q.shape[1]} queries.")
    count, heads = agents.shape[1], q.shape[2]
    for name, b, tokens, shape in (
        ("key_bias", key_bias, k.shape[1], (count, k.shape[1])),
        ("query_bias", query_bias, q.shape[1], (q.shape[1], count)),
    ):
        if isinstance(b, Tensor):
            if b.ndim != 3 or b.shape[0] not in (1, heads) or tuple(b.shape[1:]) != shape:
                raise ValueError(f"{name} must be [{heads} or 1, {shape[0]}, {shape[1]}], got {tuple(b.shape)}.")
        elif b is not None:
            table, weights = b
            fits = table.ndim == 3 and table.shape[0] in (1, heads) and table.shape[1] == count
            if not fits or weights.shape != (tokens, table.shape[-1]):
                raise ValueError(
                    f"The factors of {name} must be [{heads} or 1, {count}, r] and [{tokens}, r], "
                    f"got {tuple(table.shape)} and {tuple(weights.shape)}."
                )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return scale, scale if agent_scale is None else float(agent_scale)


def check_prologue(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    weights: tuple[Tensor, Tensor] | None,
    across_heads: bool,
    rope: RopeTables | None,
    text: tuple[Tensor, Tensor, Tensor | None] | None,
    text_weights: tuple[Tensor, Tensor] | None,
    rope_from: int,
) -> None:
    """ValueError unless the arguments of `qk_norm_rope` belong together."""
    check_qkv(q, k, k if v is None else v)
    tokens = q.shape[1]
    if k.shape[1] != tokens:
        raise ValueError(f"q and k must be of one sequence, got {tokens} and {k.shape[1]} tokens.")
    if text is not None:
        if (text[2] is None) != (v is None):
            raise ValueError("The values of text and image go together: give both or neither.")
        tokens += text[0].shape[1]
        for name, x, image in zip(("q", "k", "v"), text, (q, k, v), strict=True):
            if (
                x is not None
                and image is not None
                and (x.shape != (q.shape[0], text[0].shape[1], *image.shape[2:]) or x.dtype != image.dtype)
            ):
                raise ValueError(
                    f"The text's {name} must be {image.dtype} [B, T, H, D] as the image's "
                    f"{tuple(image.shape)}, got {x.dtype} {tuple(x.shape)}."
                )
    if text_weights is not None and (weights is None or text is None):
        raise ValueError("text_weights go with text and with weights of the image's norms.")
    for pair in (weights, text_weights):
        for w, x in zip(pair or (), (q, k), strict=False):
            if w.shape != ((x.shape[2] * x.shape[3],) if across_heads else (x.shape[3],)):
                raise ValueError(
                    f"A norm's weight must be [{'H * D' if across_heads else 'D'}] of {tuple(x.shape)}, "
                    f"got {tuple(w.shape)}."
                )
    if rope is not None:
        turning = rope.cos.shape[0 if rope.cos.ndim == 2 else 1]
        if rope_from < 0 or rope_from + turning > tokens:
            raise ValueError(f"Angles of tokens {rope_from} to {rope_from + turning} do not fit {tokens} tokens.")
        for x in (q, k):
            check_tables(x[:, :1].expand(-1, turning, -1, -1), rope)


LINEAR_PARTS = ("all", "complement", "marginal")
POSITIVE_MAPS = ("softmax", "elu1", "relu")


def check_routing(topk: float, block_q: int, block_k: int, feature_map: str, linear: str, skip: float) -> None:
    """ValueError unless the settings of sparse-linear attention make sense, each and together."""
    if isinstance(topk, bool) or not isinstance(topk, (int, float)) or not 0 < topk <= 1:
        raise ValueError(f"topk must be the share of key blocks in (0, 1], got {topk!r}.")
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive whole number of tokens, got {size!r}.")
    if feature_map not in POSITIVE_MAPS:
        raise ValueError(f"Unknown feature_map={feature_map!r}. Available: {', '.join(POSITIVE_MAPS)}.")
    if linear not in LINEAR_PARTS:
        raise ValueError(f"Unknown linear={linear!r}. Available: {', '.join(LINEAR_PARTS)}.")
    if isinstance(skip, bool) or not isinstance(skip, (int, float)) or not 0 <= skip < 1:
        raise ValueError(f"skip must be the share of key blocks to drop, in [0, 1), got {skip!r}.")
    if skip and linear != "marginal":
        raise ValueError(f"skip={skip!r} drops blocks from linear='marginal' only, got linear={linear!r}.")
    if topk + skip > 1 + 1e-9:
        raise ValueError(f"topk + skip must not exceed 1, got {topk!r} + {skip!r}.")


def check_keep(
    keep: tuple[int, int] | None, queries: int, keys: int, text_mask: Tensor | None, batch: int
) -> tuple[int, int]:
    """The kept run of tokens as `(start, stop)`; ValueError unless it lies at one end and the mask fits it."""
    start, stop = (0, 0) if keep is None else keep
    if keep is not None and queries != keys:
        raise ValueError(f"keep needs queries and keys of one sequence, got {queries} queries and {keys} keys.")
    if not 0 <= start <= stop <= keys or (start != 0 and stop != keys):
        raise ValueError(f"keep must be (start, stop) at one end of the {keys} tokens, got {keep!r}.")
    if text_mask is not None and (text_mask.dtype != torch.bool or tuple(text_mask.shape) != (batch, stop - start)):
        raise ValueError(
            f"text_mask must be bool [B, kept] = [{batch}, {stop - start}], "
            f"got {text_mask.dtype} {tuple(text_mask.shape)}."
        )
    return start, stop


def check_projection(weight: Tensor | None, bias: Tensor | None, dim: int) -> None:
    """ValueError unless the projection is `[D, D]` with a bias `[D]`, or absent."""
    if weight is None and bias is not None:
        raise ValueError("proj_bias goes with proj_weight, which is missing.")
    for name, x, shape in (("proj_weight", weight, (dim, dim)), ("proj_bias", bias, (dim,))):
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} as the head dim is {dim}, got {list(x.shape)}.")


def check_block_map(block_map: Tensor, q: Tensor, k: Tensor, block_q: int, block_k: int) -> Tensor:
    """The map as contiguous `[B, H, query blocks, key blocks]`; ValueError unless it fits q and k in such blocks."""
    check_routing(1, block_q, block_k, "softmax", "all", 0.0)
    shape = (q.shape[0], q.shape[2], -(-q.shape[1] // block_q), -(-k.shape[1] // block_k))
    fits = block_map.ndim == 4 and all(n in (m, 1) for n, m in zip(block_map.shape[:2], shape[:2], strict=True))
    if block_map.dtype != torch.bool or not fits or block_map.shape[2:] != shape[2:]:
        raise ValueError(
            f"block_map must be bool [B, H, query blocks, key blocks] = {list(shape)} (or B, H of 1), "
            f"got {block_map.dtype} {list(block_map.shape)}."
        )
    return block_map.expand(shape).contiguous()


def block_counts(topk: float, skip: float, blocks: int) -> tuple[int, int]:
    """How many of `blocks` key blocks are chosen and how many dropped: shares rounded down, one chosen at least.

    A share that is a whole number of blocks on paper stays one: 0.29 of 100 is 29, though the product is 28.999...
    """
    chosen = max(1, int(topk * blocks + 1e-6))
    return chosen, min(int(skip * blocks + 1e-6), blocks - chosen)
