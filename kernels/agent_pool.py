"""Pooling agents from the token grid (Agent Attention, arXiv 2312.08874): means over the cells of an even division.

In PyTorch a product with a matrix that depends on the grid alone; on a GPU one pass over x in Triton.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .backend import HAS_TRITON, why_not_triton
from .checks import check_grid
from .eager import differentiable
from .launch import Launch, Remembered
from .reference import agent_grid

if HAS_TRITON:
    from . import agent_pool_triton as triton_kernels

TOKENS = 32  # in a block of a kernel


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
    if why_not_triton("pool_agents", x.shape[-1], x) is None:
        if device_grid is not None or torch.compiler.is_compiling():
            return _cells_op(x, device_grid, sizes, cells)
        wanted = torch.is_grad_enabled() and x.requires_grad
        return (_with_gradients if wanted else _in_triton)(x, None, sizes, cells)
    wide = torch.promote_types(x.dtype, torch.float32)
    weights = _pool_op(device_grid, sizes, cells, x.shape[1], wide, x.device)
    return torch.einsum("pn,bnhd->bphd", weights, x.to(wide)).to(x.dtype)


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


def grid_sizes(device_grid: Tensor | None, sizes: Sequence[int], tokens: int) -> tuple[int, ...]:
    """The grid, known or in a tensor, checked."""
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
    grid = grid_sizes(device_grid, sizes, tokens)
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


@torch.library.custom_op("linfusion::pool_agents", mutates_args=())
def _cells_op(x: Tensor, device_grid: Tensor | None, sizes: Sequence[int], agents: Sequence[int]) -> Tensor:
    return _in_triton(x, device_grid, sizes, agents)


@_cells_op.register_fake
def _(x: Tensor, device_grid: Tensor | None, sizes: Sequence[int], agents: Sequence[int]) -> Tensor:
    return x.new_empty((x.shape[0], math.prod(agents), *x.shape[2:]))


@torch.library.custom_op("linfusion::pool_agents_backward", mutates_args=())
def _cells_backward_op(
    grad: Tensor, device_grid: Tensor | None, tokens: int, sizes: Sequence[int], agents: Sequence[int]
) -> Tensor:
    return _gradient_in_triton(grad, device_grid, tokens, sizes, agents)


@_cells_backward_op.register_fake
def _(grad: Tensor, device_grid: Tensor | None, tokens: int, sizes: Sequence[int], agents: Sequence[int]) -> Tensor:
    return grad.new_empty((grad.shape[0], tokens, *grad.shape[2:]))


@Remembered
def _means(x: Tensor, grid: tuple[int, ...], agents: tuple[int, ...]) -> tuple[Launch, tuple[int, ...]]:
    """The launch, and the shape of what it makes."""
    (batch, _, heads, dim), (lengths, cells) = x.shape, _axes(grid, agents)
    count = math.prod(cells)
    run = Launch(
        triton_kernels.pool_kernel, (count, heads, batch),
        (*lengths, *cells, heads, *x.stride()[:3]), _blocks(dim),
    )  # fmt: skip
    return run, (batch, count, heads, dim)


@Remembered
def _gradient(grad: Tensor, grid: tuple[int, ...], agents: tuple[int, ...]) -> tuple[Launch, tuple[int, ...]]:
    (batch, _, heads, dim), (lengths, cells) = grad.shape, _axes(grid, agents)
    cover = [1 if n % c == 0 else 1 - (-c // n) for n, c in zip(lengths, cells, strict=True)]
    tokens = math.prod(lengths)
    run = Launch(
        triton_kernels.pool_backward_kernel, (-(-tokens // TOKENS), heads, batch),
        (*lengths, *cells, *cover, heads, *grad.stride()[:3]), _blocks(dim),
    )  # fmt: skip
    return run, (batch, tokens, heads, dim)


def _axes(grid: tuple[int, ...], agents: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths and cells of three axes, one frame where there are two."""
    cells = agent_grid(agents[0] if len(agents) == 1 else agents, grid)
    return ((1,) * (3 - len(grid)) + grid, (1,) * (3 - len(cells)) + cells)


def _blocks(dim: int) -> dict[str, int]:
    return {"D": dim, "BD": 1 << (dim - 1).bit_length(), "BS": TOKENS, "num_warps": 4}


def _in_triton(x: Tensor, device_grid: Tensor | None, sizes: Sequence[int], agents: Sequence[int]) -> Tensor:
    run, shape = _means(x, grid_sizes(device_grid, sizes, x.shape[1]), tuple(agents))
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    run(x, out)
    return out


def _gradient_in_triton(
    grad: Tensor, device_grid: Tensor | None, tokens: int, sizes: Sequence[int], agents: Sequence[int]
) -> Tensor:
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    run, shape = _gradient(grad, grid_sizes(device_grid, sizes, tokens), tuple(agents))
    dx = torch.empty(shape, dtype=grad.dtype, device=grad.device)
    run(grad, dx)
    return dx


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, device_grid, ctx.sizes, ctx.agents = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(device_grid)


def _backward(run: Callable[..., Tensor], ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return run(grad, *ctx.saved_tensors, ctx.tokens, ctx.sizes, ctx.agents), None, None, None


_cells_op.register_autograd(functools.partial(_backward, _cells_backward_op), setup_context=_setup)
_with_gradients = differentiable(_in_triton, _setup, functools.partial(_backward, _gradient_in_triton))
