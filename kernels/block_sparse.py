"""Softmax attention to chosen blocks of keys: SLA's choice by block means alone, and attention for any choice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import shared_memory, why_not_triton
from .checks import block_counts, check_block_map, check_head_dim_of_values, check_qkv, check_routing, repeat_heads
from .eager import differentiable
from .routing_launch import MOST_BLOCKS, by_keys, from_map, route, to_map
from .sparse_launch import ROOM, Linear, Problem, attend, key_gradients, query_gradients, sums_dtype
from .sparse_linear_torch import block_means, to_blocks
from .window_torch import attention_backward


def block_map(q: Tensor, k: Tensor, *, topk: float, block_q: int = 128, block_k: int = 64) -> Tensor:
    """The key blocks with the highest product of block means for each query block (arXiv 2509.24006, eq. 2 and 3).

    Means are in fp32, those of k less its mean over all tokens; of equal scores the first block is chosen. Always see a
    block by setting its column: `block_map(...)[..., :2] = True` keeps a prefix of two.

    Args:
        q, k: `[B, S, H, D]`; k may have fewer heads and another length.
        topk: share of the key blocks in (0, 1], rounded down to blocks, at least one.
        block_q, block_k: tokens per block of queries and of keys; the last block may be shorter.

    Returns:
        `[B, H, query blocks, key blocks]` bool, without gradient.

    Raises:
        ValueError: shapes that do not belong together, or a setting that is out of its range.
    """
    check_qkv(q, k, k)
    check_routing(topk, block_q, block_k, "softmax", "all", 0.0)
    return _map_op(q, k, float(topk), block_q, block_k)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, *, block_q: int = 128, block_k: int = 64,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention of each query block to the key blocks that a map chooses for it; 0 where it chooses none.

    Args:
        q, k, v: `[B, S, H, D]`; k and v may have fewer heads and another length.
        block_map: `[B, H, query blocks, key blocks]` bool, a batch or heads of 1 for all; as `block_map` makes it, or
            any other.
        block_q, block_k: tokens per block of queries and of keys; the last block may be shorter.
        scale: of the scores, default `D ** -0.5`.

    Returns:
        `[B, S, H, D]`, differentiable in q, k and v.

    Raises:
        ValueError: shapes that do not belong together, or block sizes that are out of their range.
    """
    check_qkv(q, k, v)
    check_head_dim_of_values(q, v)
    chosen = check_block_map(block_map, q, k, block_q, block_k)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (q, k, v, chosen, block_q, block_k, scale)
    if why_not_triton("block_sparse_attention", q.shape[-1], q, k, v, lacking=lacking(q, k, block_q, block_k, scale)):
        return _torch_op(*arguments)
    if torch.compiler.is_compiling():
        return _triton_op(*arguments)[0]
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return (_with_gradients if wanted else _forward)(*arguments)[0]


def lacking(q: Tensor, k: Tensor, block_q: int, block_k: int, scale: float) -> str | None:
    """What the kernels do not know of this call."""
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size % 16:
            return f"{name}={size} is no multiple of 16"
    if -(-k.shape[1] // block_k) > MOST_BLOCKS:
        return f"{k.shape[1]} keys make more than {MOST_BLOCKS} blocks of {block_k}"
    if q.shape[-1] > 128 and (q.dtype is torch.float32 or shared_memory(q.device) < ROOM):
        return f"{q.dtype} at head dim {q.shape[-1]} needs more memory on the chip than there is"
    if 0 in (q.numel(), k.numel()):
        return "there is nothing to compute"
    return None if scale > 0 else f"scale={scale} is not positive"


@torch.library.custom_op("linfusion::block_map", mutates_args=())
def _map_op(q: Tensor, k: Tensor, topk: float, block_q: int, block_k: int) -> Tensor:
    queries, keys, heads = -(-q.shape[1] // block_q), -(-k.shape[1] // block_k), q.shape[2]
    chosen, _ = block_counts(topk, 0.0, keys)
    if why_not_triton("block_map", q.shape[-1], q, k, lacking=lacking(q, k, block_q, block_k, 1.0)) is None:
        lists, _ = route(q, k, block_q, block_k, chosen)
        return to_map(lists, queries, keys).bool().unflatten(0, (-1, heads))
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        centred = repeat_heads(k - k.mean(dim=1, keepdim=True, dtype=wide), heads)
        pooled_q, pooled_k = (
            block_means(to_blocks(x, size), x.shape[1], wide) for x, size in ((q, block_q), (centred, block_k))
        )
        order = (pooled_q @ pooled_k.mT).argsort(dim=-1, descending=True, stable=True)[..., :chosen]
    found = torch.zeros((len(order), queries, keys), dtype=torch.bool, device=q.device)
    return found.scatter_(2, order, True).unflatten(0, (-1, heads))


@_map_op.register_fake
def _(q, k, topk, block_q, block_k):
    shape = (q.shape[0], q.shape[2], -(-q.shape[1] // block_q), -(-k.shape[1] // block_k))
    return q.new_empty(shape, dtype=torch.bool)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block_q: int, block_k: int, scale: float
) -> tuple[Tensor, Tensor]:
    p = Problem(q, k, v, None, 0, 0, 0, block_q, block_k, scale)
    pairs = chosen.flatten(0, 1).view(torch.uint8)
    return attend(p, from_map(pairs, 2, pairs[0].numel()), Linear())


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, out: Tensor, lse: Tensor, block_q: int,
    block_k: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    p = Problem(q, k, v, None, 0, 0, 0, block_q, block_k, scale)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    pairs = chosen.flatten(0, 1).view(torch.uint8)
    rows = from_map(pairs, 2, pairs[0].numel())
    dq, stats, _ = query_gradients(p, rows, Linear(), grad, grad, out, lse)
    del rows
    dk, dv = key_gradients(p, by_keys(pairs, p.group, pairs[0].numel()), "none", "identity", grad, stats)
    return dq, dk, dv


@torch.library.custom_op("linfusion::block_sparse_attention", mutates_args=())
def _triton_op(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block_q: int, block_k: int, scale: float
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, chosen, block_q, block_k, scale)


@_triton_op.register_fake
def _(q, k, v, chosen, block_q, block_k, scale):
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=sums_dtype(q))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("linfusion::block_sparse_attention_backward", mutates_args=())
def _triton_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, out: Tensor, lse: Tensor, block_q: int,
    block_k: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward(grad, q, k, v, chosen, out, lse, block_q, block_k, scale)


@_triton_backward_op.register_fake
def _(grad, q, k, v, *rest):
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block_q, ctx.block_k, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _through(run: Callable[..., tuple], ctx: Any, grad: Tensor | None, _: Any) -> tuple:
    if grad is None:
        return (None,) * 7
    return *run(grad, *ctx.saved_tensors, ctx.block_q, ctx.block_k, ctx.scale), *(None,) * 4


_triton_op.register_autograd(functools.partial(_through, _triton_backward_op), setup_context=_setup)
_with_gradients = differentiable(_forward, _setup, functools.partial(_through, _backward))


# PyTorch: one query block after the other, against all keys with a mask


@torch.library.custom_op("linfusion::block_sparse_attention_torch", mutates_args=())
def _torch_op(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block_q: int, block_k: int, scale: float) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k, v = (repeat_heads(x, q.shape[2]).transpose(1, 2) for x in (k, v))
    for rows, mask, some in _masks(chosen, block_q, block_k, k.shape[2]):
        part = F.scaled_dot_product_attention(q[:, rows].transpose(1, 2), k, v, attn_mask=mask, scale=scale)
        out[:, rows] = (part * some).transpose(1, 2)
    return out


def _masks(chosen: Tensor, block_q: int, block_k: int, keys: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """By query block: its rows, the mask `[B, H, 1, keys]`, and `[B, H, 1, 1]` whether anything is chosen at all."""
    for m in range(chosen.shape[2]):
        some = chosen[:, :, m : m + 1].any(-1, keepdim=True)
        mask = (chosen[:, :, m : m + 1] | ~some).repeat_interleave(block_k, dim=-1)[..., :keys]
        yield slice(m * block_q, (m + 1) * block_q), mask, some


@_torch_op.register_fake
def _(q, k, v, chosen, block_q, block_k, scale):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("linfusion::block_sparse_attention_torch_backward", mutates_args=())
def _torch_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block_q: int, block_k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads, shared = q.shape[2], k.shape[2]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k, v = (repeat_heads(x, heads).transpose(1, 2) for x in (k, v))
    dk, dv = (torch.zeros(k.shape, dtype=torch.promote_types(k.dtype, torch.float32), device=k.device) for _ in "kv")
    for rows, mask, some in _masks(chosen, block_q, block_k, k.shape[2]):
        g = grad[:, rows].transpose(1, 2) * some
        part, more_k, more_v = attention_backward(q[:, rows].transpose(1, 2), k, v, mask, scale, g, None)
        dq[:, rows] = part.transpose(1, 2).to(q.dtype)
        dk += more_k
        dv += more_v
    dk, dv = (x.unflatten(1, (shared, -1)).sum(2).transpose(1, 2).to(q.dtype).contiguous() for x in (dk, dv))
    return dq, dk, dv


@_torch_backward_op.register_fake
def _(grad, q, k, v, *rest):
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _torch_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.block_q, ctx.block_k, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _torch_backward(ctx: Any, grad: Tensor) -> tuple:
    grads = _torch_backward_op(grad, *ctx.saved_tensors, ctx.block_q, ctx.block_k, ctx.scale)
    return *grads, *(None,) * 4


_torch_op.register_autograd(_torch_backward, setup_context=_torch_setup)
