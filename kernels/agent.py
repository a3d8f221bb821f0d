"""Agent attention (arXiv 2312.08874): a few agents gather from all keys, every query reads the agents.

Pooling agents from the grid and resizing position biases to it are both linear in the grid's tokens. So each is one
matrix that depends on the grid alone, made by an op that reads a grid in a tensor when it runs, not when it is traced
(whole-model `torch.compile` of FLUX), and a product that autograd knows.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_agents, check_grid, repeat_heads
from .reference import agent_grid


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    scale: float | None = None,
    agent_scale: float | None = None,
    key_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
) -> Tensor:
    """`softmax(agent_scale q A^T + query_bias) softmax(scale A k^T + key_bias) v`: the cost is tokens x agents.

    Args:
        q, k, v: `[B, S, H, D]`, rotated already; k and v may have another length and fewer heads than q.
        agents: A, `[B, n, H, D]`, such as `pool_agents` makes.
        scale: of the agents' scores with the keys, default `D ** -0.5`.
        agent_scale: of the queries' scores with the agents, default `scale`.
        key_bias: `[H or 1, n, S_k]`, added to the agents' scores with the keys; see `resize_bias`.
        query_bias: `[H or 1, S_q, n]`, added to the queries' scores with the agents.

    Returns:
        `[B, S, H, D]`.

    Raises:
        ValueError: shapes that do not belong together.
    """
    scale, agent_scale = check_agents(q, k, v, agents, scale, agent_scale, key_bias, query_bias)
    k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
    q, k, v, agents = (x.transpose(1, 2) for x in (q, k, v, agents))
    key_bias, query_bias = (None if b is None else b.to(q.dtype)[None] for b in (key_bias, query_bias))
    gathered = F.scaled_dot_product_attention(agents, k, v, attn_mask=key_bias, scale=scale)
    out = F.scaled_dot_product_attention(q, agents, gathered, attn_mask=query_bias, scale=agent_scale)
    return out.transpose(1, 2)


def pool_agents(x: Tensor, *, grid: Sequence[int] | Tensor, agents: int | Sequence[int]) -> Tensor:
    """Means over the cells of an even division of the grid (adaptive average pooling), row by row.

    Args:
        x: `[B, N, H, D]`, the grid row by row.
        grid: `(h, w)` or `(frames, h, w)`, or an int64 tensor of these on the CPU.
        agents: cells along each axis; one number is their total, divided as `agent_grid` does. An axis with more
            cells than tokens repeats tokens.

    Returns:
        `[B, n, H, D]`, n the product of the cells.

    Raises:
        ValueError: a grid that does not match N, cells for another number of axes, more cells than tokens.
    """
    cells = [agents] if isinstance(agents, int) else list(agents)
    if min(cells) < 1 or math.prod(cells) > x.shape[1]:
        raise ValueError(f"agents={agents!r} must be positive and no more than the {x.shape[1]} tokens.")
    device_grid, sizes = (grid, []) if isinstance(grid, Tensor) else (None, list(grid))
    wide = torch.promote_types(x.dtype, torch.float32)
    weights = _pool_op(device_grid, sizes, cells, x.shape[1], wide, x.device)
    return torch.einsum("pn,bnhd->bphd", weights, x.to(wide)).to(x.dtype)


def resize_bias(table: Tensor, *, grid: Sequence[int] | Tensor, tokens: int) -> Tensor:
    """Small tables, bilinearly resized to the grid; on video every frame has the same.

    Args:
        table: `[H, n, rows, columns]`.
        grid: `(h, w)` or `(frames, h, w)`, or an int64 tensor of these on the CPU.
        tokens: of the grid.

    Returns:
        `[H, n, tokens]`.

    Raises:
        ValueError: a grid that does not match `tokens`.
    """
    device_grid, sizes = (grid, []) if isinstance(grid, Tensor) else (None, list(grid))
    weights = _resize_op(device_grid, sizes, list(table.shape[-2:]), tokens, table.dtype, table.device)
    return table.flatten(-2) @ weights


@lru_cache(maxsize=8)
def _pool_weights(grid: tuple[int, ...], agents: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[n, N]`: cell c of an axis covers tokens floor(c N / n) to ceil((c + 1) N / n), as PyTorch's pooling does."""
    cells = agent_grid(agents[0] if len(agents) == 1 else agents, grid)
    with torch.inference_mode(False):  # the cache outlives an inference-mode caller
        weights = torch.ones(1, 1, dtype=dtype)
        for length, count in zip(grid, cells, strict=True):
            cell, token = torch.arange(count)[:, None], torch.arange(length)
            inside = (token >= cell * length // count) & (token < -(-(cell + 1) * length // count))
            weights = torch.kron(weights, inside / inside.sum(dim=1, keepdim=True).to(dtype))
        return weights.to(device)


@lru_cache(maxsize=8)
def _resize_weights(grid: tuple[int, ...], table: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[rows * columns, N]`: every entry of a table resized by itself."""
    with torch.inference_mode(False):
        wide = torch.promote_types(dtype, torch.float32)
        entries = torch.eye(math.prod(table), dtype=wide).unflatten(1, table)[:, None]
        frame = F.interpolate(entries, size=grid[-2:], mode="bilinear").flatten(1)
        return frame.repeat(1, math.prod(grid[:-2])).to(device, dtype)


def _sizes(device_grid: Tensor | None, sizes: Sequence[int], tokens: int) -> tuple[int, ...]:
    return check_grid(sizes if device_grid is None else device_grid.tolist(), tokens, 0, None, 0)


# Clones, since whoever compiles the graph may reuse the memory of what an op returned.


@torch.library.custom_op("linfusion::agent_weights", mutates_args=())
def _pool_op(
    device_grid: Tensor | None,
    sizes: Sequence[int],
    agents: Sequence[int],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    grid = _sizes(device_grid, sizes, tokens)
    return _pool_weights(grid, tuple(agents), dtype, device).clone()


@_pool_op.register_fake
def _(
    device_grid: Tensor | None,
    sizes: Sequence[int],
    agents: Sequence[int],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return torch.empty((math.prod(agents), tokens), dtype=dtype, device=device)


@torch.library.custom_op("linfusion::resize_weights", mutates_args=())
def _resize_op(
    device_grid: Tensor | None,
    sizes: Sequence[int],
    table: Sequence[int],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return _resize_weights(_sizes(device_grid, sizes, tokens), tuple(table), dtype, device).clone()


@_resize_op.register_fake
def _(
    device_grid: Tensor | None,
    sizes: Sequence[int],
    table: Sequence[int],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return torch.empty((math.prod(table), tokens), dtype=dtype, device=device)
