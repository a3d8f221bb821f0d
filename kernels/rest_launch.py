"""The linear part over what was not chosen, "complement" and "marginal": launches the kernels of `rest_triton`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import HAS_TRITON
from .launch import launch
from .reference_sparse import LINEAR_EPS
from .routing_launch import Lists
from .sparse_launch import Problem, constants

if HAS_TRITON:
    from . import rest_triton as triton_kernels

MOST_DIM = 128
"""Head dim up to which a program holds a state."""


class Rest(NamedTuple):
    """A linear part over other blocks for every query block.

    Attributes:
        phi: the feature map.
        subtract: whether the lists name what is left out.
        weight: the projection `[D, D]` in the inputs' dtype, contiguous, or None.
    """

    phi: str
    subtract: bool
    weight: Tensor | None


def _arguments(p: Problem, rest: Rest, kernel: str, *read: Tensor) -> tuple[Tensor, dict[str, Any]]:
    settings = constants(p, kernel, *read)
    settings |= {"PHI": rest.phi, "SUBTRACT": rest.subtract}
    return p.q if rest.weight is None else rest.weight, settings


def rest_queries(
    p: Problem, rest: Rest, rows: Lists, sums: Tensor, z: Tensor, grad: Tensor | None = None, dq: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The part `[B, queries, H, D]`, not yet projected, and of `rest_query_kernel` the planes `[2, B, H, queries]`.

    Args:
        rows: which key blocks each query block sums up, or leaves out.
        sums, z: `[B * H_kv, D, D]` and `[B * H_kv, D]`, the means over all blocked keys.
        grad: of the projected part, `[B, queries, H, D]`: `dq` `[B, S, H, D]` takes the gradient of the queries.
    """
    q, k, v = p.q, p.k, p.v
    batch, _, heads, dim = q.shape
    part = torch.empty((batch, p.queries, heads, dim), dtype=q.dtype, device=q.device)
    shape = (1, 1, 1, 1) if grad is None else (2, batch, heads, p.queries)
    planes = torch.empty(shape, dtype=torch.float32, device=q.device)
    g, dq = q if grad is None else grad, part if dq is None else dq
    w, settings = _arguments(p, rest, "rest_query", g)
    t, blocks = p.tile("rest_query"), -(-p.queries // p.block_q)
    launch(
        triton_kernels.rest_query_kernel, (blocks * -(-p.block_q // t.queries), batch * heads, 1),
        (q, k, v, g, w, sums, z, *rows, part, dq, planes,
         p.queries, p.keys, p.first, blocks, heads, p.group, rows.entries.shape[1], rows.start.shape[1],
         LINEAR_EPS / p.keys, 1 / p.keys, planes.stride(0), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
         *g.stride()[:3], *dq.stride()[:3]),
        settings | {"BACKWARD": grad is not None, "PROJECT": rest.weight is not None, "num_warps": t.warps},
    )  # fmt: skip
    return part, planes


def rest_keys(
    p: Problem, rest: Rest, columns: Lists, dsums: Tensor, dz: Tensor, grad: Tensor, planes: Tensor
) -> tuple[Tensor, Tensor]:
    """`dk` and `dv` through the linear part, written for blocked keys only.

    Args:
        columns: by key blocks, the query blocks of `rest_queries`' lists.
        dsums, dz: the gradients of all queries' states together, where `rest.subtract`.
    """
    q, k, v = p.q, p.k, p.v
    batch, _, heads, _ = q.shape
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    w, settings = _arguments(p, rest, "rest_key", grad)
    t, blocks = p.tile("rest_key"), -(-p.keys // p.block_k)
    launch(
        triton_kernels.rest_key_kernel, (blocks * -(-p.block_k // t.keys), batch * k.shape[2], 1),
        (q, k, v, grad, w, dsums, dz, *columns, planes, dk, dv,
         p.queries, p.keys, p.first, blocks, -(-p.queries // p.block_q), heads, p.group, columns.entries.shape[1],
         columns.start.shape[1], 1 / p.keys, planes.stride(0), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
         *grad.stride()[:3], *dk.stride()[:3]),
        settings | {"PROJECT": rest.weight is not None, "num_warps": t.warps},
    )  # fmt: skip
    return dk, dv
