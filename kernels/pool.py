"""Weighted pooling over cells of a token grid: the coarse keys and values of CLEAR's down-sampling variant."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pool_grid(x: Tensor, *, grid: Sequence[int] | Tensor, weight: Tensor) -> Tensor:
    """Weighted sums over `p x p` cells (per frame on video); a cell that the border cuts is scaled up to full size.

    Args:
        x: `[B, N, H, D]`, the grid row by row.
        grid: `(h, w)` or `(frames, h, w)`, or an int64 tensor of these on the CPU.
        weight: `[p, p]`, one per place in a cell, shared by heads and channels.

    Returns:
        `[B, P, H, D]` with `P = frames * ceil(h / p) * ceil(w / p)`.
    """
    if isinstance(grid, Tensor):
        return _pool_op(x, weight, grid)
    return _pool(x, weight, tuple(grid))


def _cells(x: Tensor, grid: tuple[int, ...], p: int) -> Tensor:
    """`[B, N, H, D]` to `[B * frames, rows, p, columns, p, H, D]`, zeros past the border."""
    h, w = grid[-2:]
    x = x.reshape(-1, h, w, *x.shape[2:])
    x = F.pad(x, (0, 0, 0, 0, 0, -w % p, 0, -h % p))
    return x.unflatten(2, (-1, p)).unflatten(1, (-1, p))


def _upscale(grid: tuple[int, ...], p: int, x: Tensor) -> Tensor:
    """`[rows, columns, 1, 1]`: a full cell's tokens over those that a cell really has."""
    rows, columns = (
        (n - p * torch.arange(math.ceil(n / p), device=x.device)).clamp(max=p).to(x.dtype) for n in grid[-2:]
    )
    return (p * p / (rows[:, None] * columns[None]))[..., None, None]


def _pool(x: Tensor, weight: Tensor, grid: tuple[int, ...]) -> Tensor:
    p = weight.shape[0]
    summed = torch.einsum("brpcqhd,pq->brchd", _cells(x, grid, p), weight.to(x.dtype))
    return (summed * _upscale(grid, p, x)).reshape(x.shape[0], -1, *x.shape[2:])


# the op exists for whole-model torch.compile of hosts whose grid is a tensor: the number of cells is only known at run
@torch.library.custom_op("linfusion::pool_grid", mutates_args=())
def _pool_op(x: Tensor, weight: Tensor, grid: Tensor) -> Tensor:
    return _pool(x, weight, tuple(grid.tolist())).clone()


@_pool_op.register_fake
def _(x, weight, grid):
    cells = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty((x.shape[0], cells, *x.shape[2:]))


@torch.library.custom_op("linfusion::pool_grid_backward", mutates_args=())
def _pool_backward_op(grad: Tensor, x: Tensor, weight: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    sizes, p = tuple(grid.tolist()), weight.shape[0]
    h, w = sizes[-2:]
    grad = grad.reshape(-1, math.ceil(h / p), math.ceil(w / p), *grad.shape[2:]) * _upscale(sizes, p, x)
    grad_cells = torch.einsum("brchd,pq->brpcqhd", grad, weight.to(x.dtype))
    grad_x = grad_cells.flatten(3, 4).flatten(1, 2)[:, :h, :w].reshape(x.shape)
    grad_weight = torch.einsum("brpcqhd,brchd->pq", _cells(x, sizes, p), grad)
    return grad_x.contiguous(), grad_weight.to(weight.dtype)


@_pool_backward_op.register_fake
def _(grad, x, weight, grid):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return *_pool_backward_op(grad, *ctx.saved_tensors), None


_pool_op.register_autograd(_backward, setup_context=_setup)
