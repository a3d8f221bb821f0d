"""Sparse-linear attention as an operator of torch: routing, linear and sparse part, and all their gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import block_counts
from .eager import differentiable
from .linear_launch import SCRATCH, partial_records
from .reference_sparse import LINEAR_EPS
from .routing_launch import Lists, by_keys, route, to_map
from .sparse_launch import Linear, Problem, attend, fold, key_gradients, query_gradients


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
    index: Tensor
    start: Tensor
    sums: Tensor
    state: Tensor
    z: Tensor


def _problem(q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None, s: Settings) -> Problem:
    kept = s.stop - s.start
    real = None if text_mask is None else text_mask.contiguous().view(torch.uint8)
    first = s.stop if s.start == 0 else 0
    return Problem(q, k, v, real, first, kept, s.start, s.block_q, s.block_k, s.scale)


def _records(p: Problem, phi: str) -> Tensor:
    """Partial means of phi(k)^T v over all real keys, divided by the number of all."""
    batch, tokens, heads, _ = p.k.shape
    weight = count = None
    if p.real is not None:
        weight = p.real.new_ones((batch, tokens))
        weight[:, p.kept_at : p.kept_at + p.kept] = p.real
        weight = weight[..., None].expand(batch, tokens, heads)
        count = p.k.new_full((batch,), tokens, dtype=torch.float32)
    budget = SCRATCH * 2 * (p.q.numel() + p.k.numel()) * p.q.element_size()
    return partial_records(p.k, p.v, phi, budget=budget, weight=weight, count=count)


def forward(
    q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None, weight: Tensor | None, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, ...]:  # fmt: skip
    """The output, the linear part if `parts` (else empty), and `Saved` from the second entry on."""
    s = Settings(*settings)
    p = _problem(q, k, v, text_mask, s)
    chosen, dropped = block_counts(s.topk, s.skip, -(-p.keys // s.block_k))
    rows, _ = route(p.blocked(q), p.blocked(k), s.block_q, s.block_k, chosen)
    sums, state, z = fold(_records(p, s.feature_map), weight, q.dtype)
    part = torch.empty(p.blocked(q).shape, dtype=q.dtype, device=q.device) if s.parts else q.new_empty(0)
    eps = LINEAR_EPS / k.shape[1]
    linear = Linear("all", s.feature_map, part if s.parts else None, state, z, bias, eps, s.parts)
    out, lse = attend(p, rows, linear)
    return out, part, lse, *rows, sums, state, z


def backward(
    grad: Tensor, grad_part: Tensor, q: Tensor, k: Tensor, v: Tensor, text_mask: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, of the weight and of the bias (empty where there is none)."""
    saved, s = Saved(*rest[:7]), Settings(*rest[7:])
    p = _problem(q, k, v, text_mask, s)
    batch, tokens, kv_heads, dim = k.shape
    chosen = block_counts(s.topk, s.skip, -(-p.keys // s.block_k))[0]
    blocks_q, blocks_k = -(-p.queries // s.block_q), -(-p.keys // s.block_k)
    grad, grad_part = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad, grad_part))
    linear = Linear("all", s.feature_map, None, saved.state, saved.z, bias, LINEAR_EPS / tokens, s.parts)
    rows = Lists(saved.index, saved.start)
    dq, delta, planes = query_gradients(p, rows, linear, grad, grad_part, saved.out, saved.lse)

    records = partial_records(
        p.blocked(q), grad_part if s.parts else p.blocked(grad), s.feature_map, affine=bias is not None,
        planes=planes.permute(0, 1, 3, 2), budget=SCRATCH * (3 * q.numel() + 4 * k.numel()) * q.element_size(),
    )  # fmt: skip
    # query heads that share a key head lie side by side, so their partial records are one list
    record = records.view(batch * kv_heads, -1, dim + 2, dim).sum(1)
    dstate, dz, dbias = record[:, :dim], record[:, dim] / tokens, record[:, dim + 1].sum(0)
    dweight = q.new_empty(0)
    if weight is not None:
        dweight = torch.einsum("nae,nad->ed", dstate, saved.sums).to(weight.dtype)
        dstate = dstate @ weight.float()
    factor = dstate.abs().amax((1, 2)).clamp(min=torch.finfo(torch.float32).tiny)
    dstate = (dstate / factor[:, None, None]).to(q.dtype)

    columns = by_keys(to_map(rows, blocks_q, blocks_k), p.group, blocks_q * chosen)
    dk, dv = key_gradients(
        p, columns, "all", s.feature_map, grad, saved.lse, delta, dstate, dz.contiguous(), factor / tokens
    )
    return dq, dk, dv, dweight, q.new_empty(0) if bias is None else dbias.to(bias.dtype)
