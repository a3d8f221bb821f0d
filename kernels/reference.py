"""The specification: every op in plain PyTorch, same signature as the public one, in fp32 or wider.

Tests measure against these functions in float64. They favour clearness; `window_attention` and
`sparse_linear_attention` here build the whole score matrix and are no path for real sizes.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    Bias,
    check_agents,
    check_grid,
    check_kernel,
    check_linear,
    check_prologue,
    check_qkv,
    check_radius,
    dense_bias,
    repeat_heads,
    repeat_kernel,
    split_heads,
)
from .features import named_feature_map, wide
from .reference_sparse import block_classes as block_classes
from .reference_sparse import block_map as block_map
from .reference_sparse import block_sparse_attention as block_sparse_attention
from .reference_sparse import sparse_linear_attention as sparse_linear_attention
from .rotary import RopeTables, rotate


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
    """See `linfusion.kernels.linear_attention`."""
    check_linear(q, k, v, feature_map, normalize, rope, key_mask, key_weight)
    phi = named_feature_map(feature_map)
    dtype, shape = q.dtype, (*q.shape[:3], v.shape[-1])
    q, k, v = wide(q, k, v)
    q, k = phi(q), phi(k)
    count = k.new_full((), k.shape[1])
    there = k.new_ones(())
    if key_mask is not None:
        there = key_mask[..., None, None].to(k.dtype)
        count = key_mask.sum(dim=1).clamp(min=1)[:, None, None].to(k.dtype)
    k = k * there if key_weight is None else k * there * key_weight[..., None]
    values = v * there
    rq, rk = (q, k) if rope is None else (rotate(q, rope), rotate(k, rope))
    rk, k, v, values = (repeat_heads(x, shape[2]) for x in (rk, k, v, values))
    q, k, rq, rk, v, values = (x if heads is None else split_heads(x, heads) for x in (q, k, rq, rk, v, values))
    state = torch.einsum("bshd,bshe->bhde", rk, v) / count[..., None]
    out = torch.einsum("bshd,bhde->bshe", rq, state) * scale
    if normalize != "none":
        total = (torch.einsum("bshd,bhd->bsh", q, k.sum(dim=1) / count) * scale).unsqueeze(-1)
    if normalize == "divide":
        out = out / (total + eps)
    elif normalize == "inline":
        out = out + (1 - total) * (values.sum(dim=1) / count)[:, None]
    elif normalize == "mala":
        out = (1 + 1 / (total + eps)) * out - total * (values.sum(dim=1) / count)[:, None]
    return out.reshape(shape).to(dtype)


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
    """See `linfusion.kernels.qk_norm_rope`."""
    check_prologue(q, k, v, weights, across_heads, rope, text, text_weights, rope_from)

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        (x,) = wide(x)
        axes = (-2, -1) if across_heads else (-1,)
        if eps is not None:
            x = x * torch.rsqrt((x * x).mean(axes, keepdim=True) + eps)
        return x if weight is None or eps is None else x * weight.to(x.dtype).reshape(x.shape[-len(axes) :])

    def join(x: Tensor, words: Tensor | None) -> Tensor:
        return x if words is None else torch.cat((words, x) if text_first else (x, words), dim=1)

    def turn(x: Tensor) -> Tensor:
        if rope is None:
            return x
        stop = rope_from + rope.cos.shape[0 if rope.cos.ndim == 2 else 1]
        return torch.cat((x[:, :rope_from], rotate(x[:, rope_from:stop], rope), x[:, stop:]), dim=1)

    first, second = weights or (None, None)
    text_q, text_k, text_v = text or (None, None, None)
    if text_q is not None and text_k is not None:
        text_q, text_k = (norm(x, w) for x, w in zip((text_q, text_k), text_weights or (first, second), strict=True))
    out_q, out_k = turn(join(norm(q, first), text_q)), turn(join(norm(k, second), text_k))
    return out_q.to(q.dtype), out_k.to(k.dtype), None if v is None else join(v, text_v)


def depthwise_conv(
    v: Tensor,
    *,
    grid: Sequence[int],
    weight: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    text: Tensor | None = None,
    text_first: bool = True,
) -> Tensor:
    """See `linfusion.kernels.depthwise_conv`."""
    h, w = check_grid(grid, v.shape[1], 0, None, v.shape[0])[-2:]
    check_kernel(v, weight, bias, add, text)
    kernel, shift = repeat_kernel(v, weight, bias)
    image, kernel = wide(v.reshape(-1, h, w, v.shape[2] * v.shape[3]), kernel[:, 0])
    size, reach = kernel.shape[-1], kernel.shape[-1] // 2
    image = F.pad(image, (0, 0, reach, reach, reach, reach))
    out = image.new_zeros(()) if shift is None else shift
    for y in range(size):
        for x in range(size):
            out = out + image[:, y : y + h, x : x + w] * kernel[:, y, x]
    out = out.reshape(v.shape)
    out = (out if add is None else add + out).to(v.dtype)
    if text is None:
        return out
    return torch.cat((text, out) if text_first else (out, text), dim=1)


def agent_grid(agents: int | tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...]:
    """Cells along each axis of the grid.

    One number is factorised so that the cells' sides, in tokens, are as equal as can be; of equally good ones, that
    with fewer cells on the earlier axes.

    Raises:
        ValueError: cells for another number of axes.
    """
    if not isinstance(agents, int):
        if len(agents) != len(grid):
            raise ValueError(f"agents={agents} has {len(agents)} axes, the grid has {len(grid)}.")
        return tuple(agents)

    def spread(cells: tuple[int, ...]) -> float:
        sides = [math.log(n / c) for n, c in zip(grid, cells, strict=True)]
        return round(sum((side - sum(sides) / len(sides)) ** 2 for side in sides), 9)

    return min(_factorisations(agents, len(grid)), key=spread)


def _factorisations(number: int, factors: int) -> list[tuple[int, ...]]:
    """All of them, those with small first factors first."""
    if factors == 1:
        return [(number,)]
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return [(d, *rest) for d in divisors for rest in _factorisations(number // d, factors - 1)]


def pool_agents(x: Tensor, *, grid: Sequence[int], agents: int | Sequence[int]) -> Tensor:
    """See `linfusion.kernels.pool_agents`."""
    grid = check_grid(grid, x.shape[1], 0, None, x.shape[0])
    cells = agent_grid(agents if isinstance(agents, int) else tuple(agents), grid)
    pool: Callable[..., Tensor] = F.adaptive_avg_pool2d if len(grid) == 2 else F.adaptive_avg_pool3d
    image = wide(x)[0].flatten(2).transpose(1, 2).unflatten(2, grid)
    return pool(image, cells).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:]).to(x.dtype)


def resize_bias(table: Tensor, *, grid: Sequence[int], tokens: int) -> Tensor:
    """See `linfusion.kernels.resize_bias`."""
    grid = check_grid(grid, tokens, 0, None, 0)
    resized = F.interpolate(wide(table)[0], size=grid[-2:], mode="bilinear")
    return resized.flatten(-2).repeat(1, 1, math.prod(grid[:-2])).to(table.dtype)


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    scale: float | None = None,
    agent_scale: float | None = None,
    key_bias: Bias | None = None,
    query_bias: Bias | None = None,
    shortcut: float = 0.0,
) -> Tensor:
    """See `linfusion.kernels.agent_attention`."""
    scale, agent_scale = check_agents(q, k, v, agents, scale, agent_scale, key_bias, query_bias, shortcut)
    dtype = q.dtype
    q, k, v, agents = wide(q, repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2]), agents)
    from_keys = torch.einsum("bnhd,bkhd->bhnk", agents, k) * scale
    to_queries = torch.einsum("bqhd,bnhd->bhqn", q, agents) * agent_scale
    if key_bias is not None:
        from_keys = from_keys + dense_bias(key_bias)
    if query_bias is not None:
        to_queries = to_queries + dense_bias(query_bias, transposed=True)
    gathered = torch.einsum("bhnk,bkhd->bhnd", from_keys.softmax(dim=-1), v)
    out = torch.einsum("bhqn,bhnd->bqhd", to_queries.softmax(dim=-1), gathered)
    return (out + shortcut * v if shortcut else out).to(dtype)


def window_mask(
    grid: tuple[int, ...], radius: tuple[float, ...], device: torch.device | None = None, shape: str = "ellipsoid"
) -> Tensor:
    """`[N, N]` bool: which grid tokens see which. Strict: sum over axes of (distance / radius)^2 < 1; for a box, each.

    Multiplied out, so that whole-number radii compare whole numbers: `dy^2 + dx^2 < r^2` for one radius.
    """
    axes = [torch.arange(n, device=device, dtype=torch.float64) for n in grid]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
    weights, bound = window_weights(radius)
    distance = (position[:, None] - position[None]) ** 2
    if shape == "box":
        return (distance.sqrt() < torch.tensor(radius, dtype=torch.float64, device=device)).all(-1)
    return distance @ torch.tensor(weights, dtype=torch.float64, device=device) < bound


def window_weights(radius: tuple[float, ...]) -> tuple[list[float], float]:
    """Weights w and bound b such that the window is `sum_i w_i d_i^2 < b`, exact for whole-number radii."""
    if len(set(radius)) == 1:
        return [1.0] * len(radius), float(radius[0]) ** 2
    product = 1.0
    for r in radius:
        product *= float(r) ** 2
    return [product / float(r) ** 2 for r in radius], product


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    radius: float | Sequence[float],
    text: int = 0,
    text_first: bool = True,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    pooled_k: Tensor | None = None,
    pooled_v: Tensor | None = None,
    return_lse: bool = False,
    shape: str = "ellipsoid",
    text_sees: str = "all",
) -> Tensor | tuple[Tensor, Tensor]:
    """See `linfusion.kernels.window_attention`."""
    check_qkv(q, k, v)
    batch, tokens, heads, _ = q.shape
    grid = check_grid(grid, tokens, text, text_mask, batch)
    reach = check_radius(radius, len(grid))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = q.dtype
    if pooled_k is not None and pooled_v is not None:
        k, v = torch.cat((k, pooled_k), dim=1), torch.cat((v, pooled_v), dim=1)
    image = slice(text, tokens) if text_first else slice(0, tokens - text)
    words = slice(0, text) if text_first else slice(tokens - text, tokens)
    allowed = torch.zeros(batch, tokens, k.shape[1], dtype=torch.bool, device=q.device)
    # text sees all but the pooled copies of what it sees anyway
    allowed[:, words, image if text_sees == "image" else slice(0, tokens)] = True
    allowed[:, image, image] = window_mask(grid, reach, q.device, shape)
    allowed[:, image, words] = True
    allowed[:, image, tokens:] = True
    if text_mask is not None:
        allowed[:, :, words] &= text_mask[:, None]
    q, k, v = wide(q, repeat_heads(k, heads), repeat_heads(v, heads))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v).to(dtype)
    return (out, scores.logsumexp(dim=-1).transpose(1, 2)) if return_lse else out
