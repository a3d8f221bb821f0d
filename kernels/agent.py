"""Agent attention (arXiv 2312.08874): a few agents gather from all keys, every query reads the agents.

Resizing position biases to the grid is linear in small tables. So it is one matrix that depends on the grid alone, made
by an op that reads a grid in a tensor when it runs, not when it is traced (whole-model `torch.compile` of FLUX), and a
product, which the kernels take as two factors.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .agent_launch import agent_attention_op, forward, forward_recipe, forward_with_gradients, suits
from .agent_pool import grid_sizes
from .checks import Bias, dense_bias, repeat_heads


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
    """`softmax(agent_scale q A^T + query_bias) softmax(scale A k^T + key_bias) v + shortcut v`.

    The cost is tokens x agents. On a GPU, four passes over `[B, S, H, D]` forward and, up to 128 agents of head dim 64
    or 64 of 128, seven backward, in Triton; dense biases, scales that are not positive and gradients of a bias's
    weights are computed by PyTorch.

    Args:
        q, k, v: `[B, S, H, D]`, rotated already; k and v may have another length and fewer heads than q.
        agents: A, `[B, n, H, D]`, such as `pool_agents` makes.
        scale: of the agents' scores with the keys, default `D ** -0.5`.
        agent_scale: of the queries' scores with the agents, default `scale`.
        key_bias: added to the agents' scores with the keys: `[H or 1, n, S_k]`, or in two factors a table
            `[H or 1, n, r]` and weights of the tokens `[S_k, r]`, see `bias_factors`. The factors' product is never
            in memory, which would be more than q itself.
        query_bias: added to the queries' scores with the agents: `[H or 1, S_q, n]`, or a table `[H or 1, n, r]` and
            weights `[S_q, r]`.
        shortcut: how much of v is added (AgentSD); q and k must then be equally long.

    Returns:
        `[B, S, H, D]`.

    Raises:
        ValueError: shapes that do not belong together.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    agent_scale = scale if agent_scale is None else float(agent_scale)
    # a dense bias has no weights
    (key_table, key_weights), (query_table, query_weights) = (
        bias if isinstance(bias, tuple) else (bias, None) for bias in (key_bias, query_bias)
    )
    tensors = q, k, v, agents, key_table, key_weights, query_table, query_weights
    numbers = scale, agent_scale, float(shortcut)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    trained = wanted and any(x is not None and x.requires_grad for x in (key_weights, query_weights))
    compiling = torch.compiler.is_compiling()
    recipe = (suits if compiling else forward_recipe)(*tensors, *numbers, trained, wanted)
    if not recipe:
        return _in_torch(q, k, v, agents, scale, agent_scale, key_bias, query_bias, shortcut)
    if compiling:
        return agent_attention_op(*tensors, *numbers)[0]
    return (forward_with_gradients if wanted else forward)(*tensors, *numbers, recipe)[0]


def _in_torch(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, scale: float, agent_scale: float, key_bias: Bias | None,
    query_bias: Bias | None, shortcut: float,
) -> Tensor:  # fmt: skip
    k, values = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
    key_bias = None if key_bias is None else dense_bias(key_bias).to(q.dtype)[None]
    query_bias = None if query_bias is None else dense_bias(query_bias, transposed=True).to(q.dtype)[None]
    q, k, v, agents = (x.transpose(1, 2) for x in (q, k, values, agents))
    gathered = F.scaled_dot_product_attention(agents, k, v, attn_mask=key_bias, scale=scale)
    out = F.scaled_dot_product_attention(q, agents, gathered, attn_mask=query_bias, scale=agent_scale).transpose(1, 2)
    return torch.add(out, values, alpha=shortcut) if shortcut else out


def bias_factors(
    table: Tensor, *, grid: Sequence[int] | Tensor, tokens: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """A bias of `agent_attention` in two factors: small tables, and how each token of the grid interpolates them.

    Bilinear, entries beyond the outermost held; on video every frame has the same.

    Args:
        table: `[H, n, rows, columns]`.
        grid: `(h, w)` or `(frames, h, w)`, or an int64 tensor of these on the CPU.
        tokens: of the grid.
        dtype: of the weights, default the table's; that of q spares the kernels a copy.

    Returns:
        `[H, n, r]` and `[tokens, r]`, r = rows * columns and zeros up to a power of two, at least 16.

    Raises:
        ValueError: a grid that does not match `tokens`.
    """
    device_grid, sizes = (grid, []) if isinstance(grid, Tensor) else (None, list(grid))
    weights = _resize_op(device_grid, sizes, list(table.shape[-2:]), tokens, dtype or table.dtype, table.device)
    return F.pad(table.flatten(-2), (0, weights.shape[1] - table[0, 0].numel())), weights


def resize_bias(table: Tensor, *, grid: Sequence[int] | Tensor, tokens: int) -> Tensor:
    """Small tables, resized to the grid: the product of `bias_factors`, `[H, n, tokens]`.

    Raises:
        ValueError: a grid that does not match `tokens`.
    """
    return dense_bias(bias_factors(table, grid=grid, tokens=tokens))


@lru_cache(maxsize=8)
def _resize_weights(grid: tuple[int, ...], table: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[N, rows * columns and zeros]`: every entry of a table resized by itself."""
    with torch.inference_mode(False):
        wide = torch.promote_types(dtype, torch.float32)
        entries = torch.eye(_rank(table), math.prod(table), dtype=wide).unflatten(1, table)[:, None]
        frame = F.interpolate(entries, size=grid[-2:], mode="bilinear").flatten(1)
        return frame.repeat(1, math.prod(grid[:-2])).T.contiguous().to(device, dtype)


def _rank(table: Sequence[int]) -> int:
    return max(16, 1 << (math.prod(table) - 1).bit_length())


@torch.library.custom_op("linfusion::resize_weights", mutates_args=())
def _resize_op(
    device_grid: Tensor | None,
    sizes: Sequence[int],
    table: Sequence[int],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return _resize_weights(grid_sizes(device_grid, sizes, tokens), tuple(table), dtype, device).clone()


@_resize_op.register_fake
def _(
    device_grid: Tensor | None,
    sizes: Sequence[int],
    table: Sequence[int],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return torch.empty((tokens, _rank(table)), dtype=dtype, device=device)
