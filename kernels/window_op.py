"""Window attention as one operator of torch, so that `torch.compile(fullgraph=True)` sees a single node, and a grid
that is only known on the device (FLUX carries it in `img_ids`) is read when the op runs, not when it is traced."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import window_launch, window_torch
from .checks import check_grid
from .eager import differentiable
from .window_torch import Window


def _window(
    q: Tensor, text_mask: Tensor | None, grid: Tensor | None, sizes: Sequence[int], radius: Sequence[float], box: bool,
    text: int, text_first: bool, text_sees_text: bool, scale: float,
) -> Window:  # fmt: skip
    shape = check_grid(sizes if grid is None else grid.tolist(), q.shape[1], text, text_mask, q.shape[0])
    return Window(shape, tuple(radius), box, text, text_first, text_sees_text, scale)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor | None, pooled_v: Tensor | None, text_mask: Tensor | None,
    grid: Tensor | None, sizes: Sequence[int], radius: Sequence[float], box: bool, text: int, text_first: bool,
    text_sees_text: bool, scale: float, return_lse: bool, triton: bool, keep: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output `[B, S, H, D]`, and log-sum-exps `[B, H, S]` where they are wanted or (`keep`) gradients need them."""
    window = _window(q, text_mask, grid, sizes, radius, box, text, text_first, text_sees_text, scale)
    if triton:
        return window_launch.forward(q, k, v, pooled_k, pooled_v, text_mask, window, return_lse or keep)
    return window_torch.forward(q, k, v, pooled_k, pooled_v, text_mask, window, return_lse)


def _gradients(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor | None, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    pooled_k: Tensor | None, pooled_v: Tensor | None, text_mask: Tensor | None, grid: Tensor | None,
    sizes: Sequence[int], radius: Sequence[float], box: bool, text: int, text_first: bool, text_sees_text: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and the pooled keys and values (empty without any)."""
    window = _window(q, text_mask, grid, sizes, radius, box, text, text_first, text_sees_text, scale)
    if out is not None and lse is not None:
        grads = window_launch.backward(grad, grad_lse, out, lse, q, k, v, pooled_k, pooled_v, text_mask, window)
    else:
        grads = window_torch.backward(grad, grad_lse, q, k, v, pooled_k, pooled_v, text_mask, window)
    groups = q.shape[2] // k.shape[2]
    dq, *others = grads
    if groups > 1:  # key heads get the sum of what their query heads say
        others = [x.unflatten(2, (-1, groups)).sum(3) for x in others]
    dq, *others = (x.to(q.dtype) for x in (dq, *others))
    if pooled_k is None:
        others = [*others[:2], q.new_empty(0), q.new_empty(0)]
    return dq, *others  # type: ignore[return-value]


@torch.library.custom_op("linfusion::window_attention", mutates_args=())
def window_op(
    q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor | None, pooled_v: Tensor | None, text_mask: Tensor | None,
    grid: Tensor | None, sizes: Sequence[int], radius: Sequence[float], box: bool, text: int, text_first: bool,
    text_sees_text: bool, scale: float, return_lse: bool, triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward(
        q, k, v, pooled_k, pooled_v, text_mask, grid, sizes, radius, box, text, text_first, text_sees_text, scale,
        return_lse, triton,
    )  # fmt: skip


@window_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor | None, pooled_v: Tensor | None, text_mask: Tensor | None,
    grid: Tensor | None, sizes: Sequence[int], radius: Sequence[float], box: bool, text: int, text_first: bool,
    text_sees_text: bool, scale: float, return_lse: bool, triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, tokens, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty((batch, heads, tokens) if return_lse or triton else (0,), dtype=wide)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("linfusion::window_attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor | None, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    pooled_k: Tensor | None, pooled_v: Tensor | None, text_mask: Tensor | None, grid: Tensor | None,
    sizes: Sequence[int], radius: Sequence[float], box: bool, text: int, text_first: bool, text_sees_text: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients(
        grad, grad_lse, out, lse, q, k, v, pooled_k, pooled_v, text_mask, grid, sizes, radius, box, text, text_first,
        text_sees_text, scale,
    )  # fmt: skip


@_backward_op.register_fake
def _(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor | None, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    pooled_k: Tensor | None, pooled_v: Tensor | None, text_mask: Tensor | None, grid: Tensor | None,
    sizes: Sequence[int], radius: Sequence[float], box: bool, text: int, text_first: bool, text_sees_text: bool,
    scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    more = [q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in (pooled_k, pooled_v)]  # fmt: skip
    return *like, *more


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, sizes, radius, box, text, text_first, text_sees_text, scale, return_lse, triton = inputs[:16]
    ctx.save_for_backward(*(output if triton else (None, None)), *tensors)
    ctx.settings = (sizes, radius, box, text, text_first, text_sees_text, scale)
    ctx.inputs = len(inputs)
    if not return_lse:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(run: Callable[..., tuple], ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple:
    out, lse, q, k, v, pooled_k, pooled_v, text_mask, grid = ctx.saved_tensors
    if grad is None and grad_lse is None:
        return (None,) * ctx.inputs
    grad = torch.zeros_like(q) if grad is None else grad
    grads = run(grad, grad_lse, out, lse, q, k, v, pooled_k, pooled_v, text_mask, grid, *ctx.settings)
    return *grads[:3], *((None, None) if pooled_k is None else grads[3:]), *(None,) * (ctx.inputs - 5)


window_op.register_autograd(functools.partial(_backward, _backward_op), setup_context=_setup)
_with_gradients = differentiable(_forward, _setup, functools.partial(_backward, _gradients))


def eager(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`window_op` without the operator."""
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:5])
    return _with_gradients(*arguments, True) if wanted else _forward(*arguments, False)  # type: ignore[call-arg]
