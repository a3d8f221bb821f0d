"""Sparse-linear attention as an operator of torch: routing, linear and sparse part, and all their gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import block_counts
from .eager import differentiable
from .linear_launch import SCRATCH, partial_records, tokens_at_once
from .reference_sparse import LINEAR_EPS
from .rest_launch import Rest, rest_keys, rest_queries
from .routing_launch import Lists, by_keys, route, to_map
from .sparse_launch import Linear, Problem, attend, fold, key_gradients, query_gradients, sums_dtype

STATE_STAGES = 3
"""Depth of the pass over keys and values with softmax features, up to head dim 128: .115 to .091 ms on an H100."""


class Settings(NamedTuple):
    """What `sparse_linear_attention` takes besides tensors; `start` and `stop` of the kept tokens."""

    topk: float
    skip: float
    block_q: int
    block_k: int
    feature_map: str
    linear: str
    scale: float
    start: int
    stop: int
    parts: bool


class Saved(NamedTuple):
    """What the backward pass takes of the forward pass: small, but for the output, which others keep anyhow."""

    out: Tensor
    lse: Tensor
    entries: Tensor
    starts: Tensor
    other_entries: Tensor
    other_starts: Tensor
    sums: Tensor
    state: Tensor
    z: Tensor


def _problem(q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None, s: Settings) -> Problem:
    kept = s.stop - s.start
    real = None if text_mask is None or kept == 0 else text_mask.contiguous().view(torch.uint8)
    first = s.stop if s.start == 0 else 0
    return Problem(q, k, v, real, first, kept, s.start, s.block_q, s.block_k, s.scale)


def _records(p: Problem, phi: str, means: Tensor | None = None) -> Tensor:
    """Partial means of phi(k)^T v over all real keys, divided by the number of all; `means` as in `partial_records`."""
    batch, tokens, heads, _ = p.k.shape
    weight = count = None
    if p.real is not None:
        weight = p.real.new_ones((batch, tokens))
        weight[:, p.kept_at : p.kept_at + p.kept] = p.real
        weight = weight[..., None].expand(batch, tokens, heads)
        count = p.k.new_full((batch,), tokens, dtype=torch.float32)
    budget = SCRATCH * 2 * (p.q.numel() + p.k.numel()) * p.q.element_size()
    stages = STATE_STAGES if phi == "softmax" and 64 < p.k.shape[-1] <= 128 else None
    return partial_records(p.k, p.v, phi, budget=budget, weight=weight, count=count, means=means, stages=stages)


def _counts(s: Settings, blocks: int) -> tuple[int, int, bool]:
    """Chosen and dropped key blocks, and whether these are fewer than the rest."""
    chosen, dropped = block_counts(s.topk, s.skip, blocks)
    return chosen, dropped, 2 * (chosen + dropped) < blocks


def _projection(weight: Tensor | None, like: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(like.dtype).contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The output, the linear part if `parts` (else empty), and the rest of `Saved`."""
    s = Settings(*settings)
    p = _problem(q, k, v, text_mask, s)
    chosen, dropped, fewer = _counts(s, -(-p.keys // s.block_k))
    # of linear parts over the rest, lists of what is left out or of what is summed up; those chosen are at hand
    second = 0 if s.linear == "all" or (fewer and dropped == 0) else 1 if fewer else 2
    means = part = None
    if s.linear == "all":
        if p.kept == 0 and s.block_k == tokens_at_once(k):  # one pass over k for both
            shape = (k.shape[0] * k.shape[2], -(-p.keys // s.block_k), k.shape[3])
            means = torch.empty(shape, dtype=torch.float32, device=q.device)
        sums, state, z = fold(_records(p, s.feature_map, means), weight, q.dtype)
    rows, other = route(p.blocked(q), p.blocked(k), s.block_q, s.block_k, chosen, dropped, second, means)
    if s.linear == "all":
        if s.parts:
            part = torch.empty(p.blocked(q).shape, dtype=q.dtype, device=q.device)
        linear = Linear("all", s.feature_map, part, state, z, bias, LINEAR_EPS / k.shape[1], s.parts)
    else:
        sums, state, z = fold(_records(_without_kept(p), s.feature_map), None, q.dtype)
        projection = _projection(weight, q)
        part, _ = rest_queries(p, Rest(s.feature_map, fewer, projection), other or rows, sums, z)
        projection = None if projection is None else projection.mT.contiguous()
        linear = Linear("given", part=part, state=projection, bias=bias, apart=s.parts)
    out, lse = attend(p, rows, linear, chosen)
    left = part if s.parts else None
    empty = (torch.empty(0, dtype=torch.int32, device=q.device) for _ in range(2))
    return out, q.new_empty(0) if left is None else left, lse, *rows, *(other or empty), sums, state, z


def _without_kept(p: Problem) -> Problem:
    return p._replace(q=p.blocked(p.q), k=p.blocked(p.k), v=p.blocked(p.v), real=None, first=0, kept=0)


def backward(
    grad: Tensor, grad_part: Tensor, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, of the weight and of the bias (empty where there is none)."""
    saved, s = Saved(*rest[: len(Saved._fields)]), Settings(*rest[len(Saved._fields) :])
    p = _problem(q, k, v, text_mask, s)
    grad, grad_part = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad, grad_part))
    # torch's own products of small fp32 matrices are meant as such
    with torch.autocast(q.device.type, enabled=False):
        through = _all_backward if s.linear == "all" else _rest_backward
        dq, dk, dv, dweight, dbias = through(p, s, saved, weight, bias, grad, grad_part)
    nothing = q.new_empty(0)
    return (
        dq, dk, dv,
        nothing if weight is None else dweight.to(weight.dtype), nothing if bias is None else dbias.to(bias.dtype),
    )  # fmt: skip


def _budget(p: Problem) -> float:
    return SCRATCH * (3 * p.q.numel() + 4 * p.k.numel()) * p.q.element_size()


def _columns(p: Problem, lists: Lists) -> Lists:
    """Equally long lists of key blocks the other way round."""
    chosen = to_map(lists, -(-p.queries // p.block_q), -(-p.keys // p.block_k))
    return by_keys(chosen, p.group, lists.entries.shape[1])


def _all_backward(
    p: Problem, s: Settings, saved: Saved, weight: Tensor | None, bias: Tensor | None, grad: Tensor, grad_part: Tensor
) -> tuple[Tensor, ...]:
    groups, tokens, dim = saved.sums.shape[0], p.k.shape[1], p.k.shape[-1]
    linear = Linear("all", s.feature_map, None, saved.state, saved.z, bias, LINEAR_EPS / tokens, s.parts)
    rows = Lists(saved.entries, saved.starts)
    dq, stats, planes = query_gradients(p, rows, linear, grad, grad_part, saved.out, saved.lse)
    records = partial_records(
        p.blocked(p.q), grad_part if s.parts else p.blocked(grad), s.feature_map, affine=bias is not None,
        planes=planes.mT, budget=_budget(p),
    )  # fmt: skip
    # query heads that share a key head lie side by side, so their partial records are one list
    record = records.view(groups, -1, dim + 2, dim).sum(1)
    dsums, dz, dbias = record[:, :dim], record[:, dim] / tokens, record[:, dim + 1].sum(0)
    dweight = torch.einsum("nae,nad->ed", dsums, saved.sums)
    if weight is not None:
        dsums = dsums @ weight.float()
    factor = dsums.abs().amax((1, 2)).clamp(min=torch.finfo(torch.float32).tiny)
    dsums = (dsums / factor[:, None, None]).to(p.q.dtype)
    dk, dv = key_gradients(
        p, _columns(p, rows), "all", s.feature_map, grad, stats, dsums, dz.contiguous(), factor / tokens
    )
    return dq, dk, dv, dweight, dbias


def _rest_backward(
    p: Problem, s: Settings, saved: Saved, weight: Tensor | None, bias: Tensor | None, grad: Tensor, grad_part: Tensor
) -> tuple[Tensor, ...]:
    q, dim, groups = p.q, p.q.shape[-1], saved.sums.shape[0]
    rows = Lists(saved.entries, saved.starts)
    other = Lists(saved.other_entries, saved.other_starts) if saved.other_starts.numel() else rows
    rest = Rest(s.feature_map, _counts(s, -(-p.keys // s.block_k))[2], _projection(weight, q))
    outer = grad_part if s.parts else p.blocked(grad)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    part, planes = rest_queries(p, rest, other, saved.sums, saved.z, outer, dq)
    record = partial_records(part, outer, "identity", affine=True, budget=_budget(p)).sum((0, 1)) * p.queries
    dweight, dbias = record[:dim].mT, record[dim + 1]
    del part
    given = Linear("given", bias=bias, apart=s.parts)
    dq, stats, _ = query_gradients(p, rows, given, grad, grad_part, saved.out, saved.lse, planes, dq)
    dsums = dz = planes
    if rest.subtract:
        records = partial_records(p.blocked(q), outer, s.feature_map, planes=planes.mT, budget=_budget(p))
        record = records.view(groups, -1, dim + 2, dim).sum(1)
        dsums, dz = record[:, :dim].contiguous(), record[:, dim].contiguous()
    columns = _columns(p, rows)
    grads = rest_keys(p, rest, columns if other is rows else _columns(p, other), dsums, dz, outer, planes)
    dk, dv = key_gradients(p, columns, "given", s.feature_map, grad, stats, grads=grads)
    return dq, dk, dv, dweight, dbias


@torch.library.custom_op("linfusion::sla", mutates_args=())
def sla_op(
    q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, topk: float,
    skip: float, block_q: int, block_k: int, feature_map: str, linear: str, scale: float, start: int, stop: int,
    parts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    settings = (topk, skip, block_q, block_k, feature_map, linear, scale, start, stop, parts)
    return forward(q, k, v, text_mask, weight, bias, *settings)  # type: ignore[return-value]


@sla_op.register_fake
def _(q, k, v, text_mask, weight, bias, *settings):
    s = Settings(*settings)
    batch, tokens, heads, dim = q.shape
    kept, groups = s.stop - s.start, batch * k.shape[2]
    rows, columns = -(-(tokens - kept) // s.block_q), -(-(k.shape[1] - kept) // s.block_k)
    chosen, dropped, fewer = _counts(s, columns)
    second = s.linear != "all" and not (fewer and dropped == 0)
    width = chosen + dropped if fewer else columns - chosen - dropped
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty((batch, tokens - kept, heads, dim) if s.parts else 0),
        q.new_empty((batch, heads, tokens), dtype=sums_dtype(q)),
        q.new_empty((batch * heads, rows * chosen + columns), dtype=torch.int32),
        q.new_empty((batch * heads, rows + 2), dtype=torch.int32),
        q.new_empty((batch * heads, rows * width) if second else 0, dtype=torch.int32),
        q.new_empty((batch * heads, rows + 1) if second else 0, dtype=torch.int32),
        q.new_empty((groups, dim, dim), dtype=torch.float32),
        q.new_empty((groups, dim, dim)),
        q.new_empty((groups, dim), dtype=torch.float32),
    )


@torch.library.custom_op("linfusion::sla_backward", mutates_args=())
def sla_backward_op(
    grad: Tensor, grad_part: Tensor, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, out: Tensor, lse: Tensor, entries: Tensor, starts: Tensor,
    other_entries: Tensor, other_starts: Tensor, sums: Tensor, state: Tensor, z: Tensor, topk: float,
    skip: float, block_q: int, block_k: int, feature_map: str, linear: str, scale: float, start: int, stop: int,
    parts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    settings = (topk, skip, block_q, block_k, feature_map, linear, scale, start, stop, parts)
    saved = (out, lse, entries, starts, other_entries, other_starts, sums, state, z)
    return backward(grad, grad_part, q, k, v, text_mask, weight, bias, *saved, *settings)


@sla_backward_op.register_fake
def _(grad, grad_part, q, k, v, text_mask, weight, bias, *rest):
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dweight, dbias = (
        q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (weight, bias)
    )
    return dq, dk, dv, dweight, dbias


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    out, _, *small = output
    ctx.settings = inputs[6:]
    ctx.save_for_backward(*inputs[:6], out, *small)
    ctx.mark_non_differentiable(*small)
    ctx.set_materialize_grads(False)


def _backward(run: Callable[..., tuple], ctx: Any, grad: Tensor | None, grad_part: Tensor | None, *_: Any) -> tuple:
    q, k, v, text_mask, weight, bias, *saved = ctx.saved_tensors
    s = Settings(*ctx.settings)
    if grad is None:
        grad = torch.zeros_like(q)
    if grad_part is None:
        grad_part = torch.zeros_like(q[:, s.stop - s.start :]) if s.parts else q.new_empty((0, 1, 1, 1))
    *grads, dweight, dbias = run(grad, grad_part, q, k, v, text_mask, weight, bias, *saved, *s)
    return *grads, None, None if weight is None else dweight, None if bias is None else dbias, *(None,) * len(s)


sla_op.register_autograd(functools.partial(_backward, sla_backward_op), setup_context=_setup)
forward_with_gradients = differentiable(forward, _setup, functools.partial(_backward, backward))
