"""Depthwise convolution of values on their token grid: the local branch of LiT and Agent Attention."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_grid, check_kernel


def depthwise_conv(v: Tensor, *, grid: Sequence[int] | Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`out[y, x] = sum_{i, j} weight[i, j] v[y + i - r, x + j - r] + bias`, channel by channel, zeros past the border.

    Args:
        v: `[B, N, H, D]`, the grid row by row.
        grid: `(h, w)` or `(frames, h, w)` (each frame by itself), or an int64 tensor of these on the CPU.
        weight: `[H * D, k, k]`, or `[D, k, k]` shared by the heads; k = 2 r + 1.
        bias: `[H * D]` or `[D]`, as the weight.

    Returns:
        `[B, N, H, D]`.

    Raises:
        ValueError: a grid that does not match N, an even k, weights for another number of channels.
    """
    weight, bias = check_kernel(v, weight, bias)
    if isinstance(grid, Tensor):
        return _conv_op(v, weight, bias, grid)
    return _tokens(F.conv2d(_image(v, grid), weight, bias, **_settings(weight)), v)


def _image(x: Tensor, grid: Sequence[int]) -> Tensor:
    """`[B, N, H, D]` to `[B * frames, H * D, h, w]`, a view where memory allows."""
    grid = check_grid(grid, x.shape[1], 0, None, x.shape[0])
    return x.reshape(-1, *grid[-2:], x.shape[2] * x.shape[3]).permute(0, 3, 1, 2)


def _tokens(image: Tensor, like: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).reshape(like.shape)


def _settings(weight: Tensor) -> dict[str, Any]:
    return {"padding": (weight.shape[2] // 2, weight.shape[3] // 2), "groups": weight.shape[0]}


# the op exists for whole-model torch.compile of hosts whose grid is a tensor: rows and columns are only known at run
@torch.library.custom_op("linfusion::depthwise_conv", mutates_args=())
def _conv_op(v: Tensor, weight: Tensor, bias: Tensor | None, grid: Tensor) -> Tensor:
    return _tokens(F.conv2d(_image(v, grid.tolist()), weight, bias, **_settings(weight)), v).contiguous()


@_conv_op.register_fake
def _(v: Tensor, weight: Tensor, bias: Tensor | None, grid: Tensor) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@torch.library.custom_op("linfusion::depthwise_conv_backward", mutates_args=())
def _conv_backward_op(grad: Tensor, v: Tensor, weight: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    settings, sizes = _settings(weight), grid.tolist()
    grad_v, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        _image(grad, sizes), _image(v, sizes), weight, [len(weight)], [1, 1], settings["padding"], [1, 1], False,
        [0, 0], settings["groups"], [True, True, True],
    )  # fmt: skip
    return _tokens(grad_v, v).contiguous(), grad_weight.contiguous(), grad_bias


@_conv_backward_op.register_fake
def _(grad: Tensor, v: Tensor, weight: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_v, grad_weight = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, weight))
    return grad_v, grad_weight, weight.new_empty(len(weight))


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    v, weight, bias, grid = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(v, weight, grid)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_v, grad_weight, grad_bias = _conv_backward_op(grad, *ctx.saved_tensors)
    return grad_v, grad_weight, grad_bias if ctx.has_bias else None, None


_conv_op.register_autograd(_backward, setup_context=_setup)
