"""Depthwise convolution of values on their token grid: the local branch of LiT and Agent Attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import why_not_triton
from .checks import check_grid, check_kernel, repeat_kernel
from .depthwise_launch import TILES, convolve, weight_gradient
from .eager import differentiable


def depthwise_conv(
    v: Tensor,
    *,
    grid: Sequence[int] | Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    text: Tensor | None = None,
    text_first: bool = True,
    inplace: bool = False,
) -> Tensor:
    """`out[y, x] = sum_{i, j} weight[i, j] v[y + i - r, x + j - r] + bias`, channel by channel, zeros past the border.

    On a GPU one pass in Triton for kernels of 1, 3, 5 and 7, whatever the head dim: v and `add` are read and the
    result is written once. Backward is one pass for v and one for the weight, whose sums are deterministic.

    Args:
        v: `[B, N, H, D]`, the grid row by row.
        grid: `(h, w)` or `(frames, h, w)` (each frame by itself), or an int64 tensor of these on the CPU.
        weight: `[H * D, k, k]`, or `[D, k, k]` shared by the heads; k = 2 r + 1.
        bias: `[H * D]` or `[D]`, as the weight.
        add: `[B, N, H, D]`, added to the result before it is rounded.
        text: `[B, T, H, D]`, tokens outside of the grid that the result carries along as they are: the whole joint
            sequence is written once, not joined afterwards.
        text_first: whether they stand in front.
        inplace: the result may take the place of `add`, which saves a tensor's memory; done where nothing is
            differentiated or compiled, `add` is contiguous and there is no text.

    Returns:
        `[B, N, H, D]`, with `text` `[B, T + N, H, D]`.

    Raises:
        ValueError: a grid that does not match N, a kernel without a centre, weights for another number of channels,
            `add` or `text` that do not fit v.
    """
    check_kernel(v, weight, bias, add, text)
    late, sizes = (grid, []) if isinstance(grid, Tensor) else (None, list(_grid(v, grid)))
    if late is None and _why_not(v, weight, bias, add) is not None:
        return _in_torch(v, weight, bias, add, text, text_first, sizes)
    if late is not None or torch.compiler.is_compiling():  # a grid in a tensor is known only when the operator runs
        return _conv_op(v, weight, bias, add, text, text_first, sizes, late)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (v, weight, bias, add, text)):
        return _with_gradients(v, weight, bias, add, text, text_first, sizes, None)
    if inplace and add is not None and text is None and add.is_contiguous():
        convolve(v, weight, bias, add, add, sizes)
        return add
    return _in_triton(v, weight, bias, add, text, text_first, sizes)


def _grid(v: Tensor, grid: Sequence[int]) -> tuple[int, ...]:
    return check_grid(grid, v.shape[1], 0, None, v.shape[0])


def _why_not(v: Tensor, weight: Tensor, *others: Tensor | None) -> str | None:
    size = weight.shape[-1]
    lacking = None if size in TILES["forward"] else f"its kernels are for sizes {list(TILES['forward'])}, not {size}"
    tensors = (x for x in others if x is not None)
    return why_not_triton("depthwise_conv", None, v, weight, *tensors, lacking=lacking)


def _in_torch(
    v: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, text: Tensor | None, text_first: bool,
    grid: Sequence[int],
) -> Tensor:  # fmt: skip
    kernel, shift = repeat_kernel(v, weight.to(v.dtype), None if bias is None else bias.to(v.dtype))
    out = _tokens(F.conv2d(_image(v, grid), kernel, shift, **_settings(kernel)), v)
    out = out if add is None else add + out
    return out if text is None else torch.cat((text, out) if text_first else (out, text), dim=1)


def _in_triton(
    v: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, text: Tensor | None, text_first: bool,
    grid: Sequence[int], late: None = None,
) -> Tensor:  # fmt: skip
    batch, tokens, heads, dim = v.shape
    outside = 0 if text is None else text.shape[1]
    whole = torch.empty((batch, tokens + outside, heads, dim), dtype=v.dtype, device=v.device)
    image = whole
    if text is not None:
        words, image = _parts(whole, outside, text_first)
        words.copy_(text)
    convolve(v, weight, bias, add, image, grid)
    return whole


def _parts(x: Tensor, text: int, text_first: bool) -> tuple[Tensor, Tensor]:
    if text_first:
        return x[:, :text], x[:, text:]
    return x[:, x.shape[1] - text :], x[:, : x.shape[1] - text]


def _image(x: Tensor, grid: Sequence[int]) -> Tensor:
    """`[B, N, H, D]` to `[B * frames, H * D, h, w]`, a view where memory allows."""
    return x.reshape(-1, *grid[-2:], x.shape[2] * x.shape[3]).permute(0, 3, 1, 2)


def _tokens(image: Tensor, like: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).reshape(like.shape)


def _settings(weight: Tensor) -> dict[str, Any]:
    return {"padding": (weight.shape[-1] // 2,) * 2, "groups": weight.shape[0]}


@torch.library.custom_op("linfusion::depthwise_conv", mutates_args=())
def _conv_op(
    v: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, text: Tensor | None, text_first: bool,
    grid: Sequence[int], late: Tensor | None,
) -> Tensor:  # fmt: skip
    grid = _grid(v, grid if late is None else late.tolist())
    if _why_not(v, weight, bias, add) is None:
        return _in_triton(v, weight, bias, add, text, text_first, grid)
    return _in_torch(v, weight, bias, add, text, text_first, grid).contiguous()


@_conv_op.register_fake
def _(
    v: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, text: Tensor | None, text_first: bool,
    grid: Sequence[int], late: Tensor | None,
) -> Tensor:  # fmt: skip
    batch, tokens, heads, dim = v.shape
    return v.new_empty((batch, tokens + (0 if text is None else text.shape[1]), heads, dim))


def _gradients_in_triton(
    grad: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, grid: Sequence[int], late: None, of_v: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dv = v.new_empty(v.shape if of_v else 0)
    dweight, dbias = weight.new_empty(0), weight.new_empty(0)
    grad = grad if grad.stride(-1) == 1 or grad.shape[-1] == 1 else grad.contiguous()
    if of_v:
        convolve(grad, weight, None, None, dv, grid, flip=True)
    if of_weight:
        dweight, maybe = weight_gradient(v, grad, weight, bias, grid)
        dbias = dbias if maybe is None else maybe
    return dv, dweight, dbias


@torch.library.custom_op("linfusion::depthwise_conv_backward", mutates_args=())
def _conv_backward_op(
    grad: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, grid: Sequence[int], late: Tensor | None,
    of_v: bool, of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of v, weight and bias, empty where not asked for; `grad` is the image part."""
    grid = _grid(v, grid if late is None else late.tolist())
    if _why_not(v, weight, bias) is None:
        return _gradients_in_triton(grad, v, weight, bias, grid, None, of_v, of_weight)
    dv = v.new_empty(v.shape if of_v else 0)
    dweight, dbias = weight.new_empty(0), weight.new_empty(0)
    kernel, _ = repeat_kernel(v, weight.to(v.dtype), None)
    settings = _settings(kernel)
    image, kernels, shift = torch.ops.aten.convolution_backward(
        _image(grad, grid), _image(v, grid), kernel, [len(kernel)], [1, 1], settings["padding"], [1, 1], False,
        [0, 0], settings["groups"], [of_v, of_weight, of_weight and bias is not None],
    )  # fmt: skip
    if of_v:
        dv = _tokens(image, v).contiguous()
    if of_weight:
        dweight = kernels.reshape(-1, *weight.shape).sum(0).to(weight.dtype)
        dbias = dbias if bias is None else shift.reshape(-1, *bias.shape).sum(0).to(bias.dtype)
    return dv, dweight, dbias


@_conv_backward_op.register_fake
def _(
    grad: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, grid: Sequence[int], late: Tensor | None,
    of_v: bool, of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dbias = weight.new_empty(0) if bias is None or not of_weight else bias.new_empty(bias.shape)
    return v.new_empty(v.shape if of_v else 0), weight.new_empty(weight.shape if of_weight else 0), dbias


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    v, weight, bias, _, text, ctx.text_first, ctx.grid, late = inputs
    ctx.text = None if text is None else text.shape[1]
    ctx.save_for_backward(v, weight, bias, late)


def _backward(run: Callable[..., tuple], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    v, weight, bias, late = ctx.saved_tensors
    of_v, of_weight, of_bias, of_add, of_text = ctx.needs_input_grad[:5]
    words, image = (None, grad) if ctx.text is None else _parts(grad, ctx.text, ctx.text_first)
    dv = dweight = dbias = None
    if of_v or of_weight or of_bias:
        dv, dweight, dbias = run(image, v, weight, bias, ctx.grid, late, of_v, of_weight or of_bias)
    return (
        dv if of_v else None,
        dweight if of_weight else None,
        dbias if of_bias else None,
        image if of_add else None,
        words if of_text else None,
        None,
        None,
        None,
    )


_conv_op.register_autograd(functools.partial(_backward, _conv_backward_op), setup_context=_setup)
_with_gradients = differentiable(_in_triton, _setup, functools.partial(_backward, _gradients_in_triton))
