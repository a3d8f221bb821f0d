"""Attention to listed key blocks, with a linear part: launches the kernels of `sparse_triton`, forward and backward."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import HAS_TRITON, shared_memory
from .descriptors import readable, tiles
from .launch import launch
from .linear_launch import READ_TOGETHER
from .routing_launch import Lists, alignment, padded_dim

if HAS_TRITON:
    from . import sparse_triton as triton_kernels

LOG2_E = math.log2(math.e)


class Tile(NamedTuple):
    """Queries and keys of a tile (at most; a block may be smaller), warps, and depth of the software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


# by kernel and largest head dim, for 16-bit inputs; those of 64 and 128 measured on an H100 (bench/NOTES.md)
TILES = {
    "forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 4), 256: Tile(64, 32, 8, 2)},
    "query_backward": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(32, 32, 8, 1)},
    "key_backward": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(32, 32, 8, 1)},
    "rest_query": {64: Tile(128, 64, 4, 2), 128: Tile(128, 64, 8, 2)},
    "rest_key": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2)},
}
EARLY = 128
"""Queries of a tile from which on its features are made before the loop; smaller ones, two at a time, lack room."""
WIDE = Tile(16, 16, 4, 1)
"""For fp32, whose products need room."""
SMALL = Tile(64, 32, 8, 2)
"""At most this on devices with less shared memory than ROOM, which the tiles above may take up to head dim 256."""
ROOM = 200 << 10
# sums of exponentials that leave room for none of their terms to overflow
MOST = {torch.bfloat16: 2.0**60, torch.float32: 2.0**60, torch.float16: 2.0**15}


class Problem(NamedTuple):
    """Inputs of attention in blocks, and how they are cut.

    Attributes:
        q, k, v: `[B, S, H, D]`, kept tokens included; k and v may have fewer heads, and without kept tokens another
            length.
        real: `[B, kept]` of bytes, which kept keys are there; None for all.
        first, kept, kept_at: where the blocked tokens begin, how many are kept and where those begin.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    real: Tensor | None
    first: int
    kept: int
    kept_at: int
    block_q: int
    block_k: int
    scale: float

    @property
    def queries(self) -> int:
        return self.q.shape[1] - self.kept

    @property
    def keys(self) -> int:
        return self.k.shape[1] - self.kept

    @property
    def group(self) -> int:
        return self.q.shape[2] // self.k.shape[2]

    def blocked(self, x: Tensor) -> Tensor:
        """The blocked tokens of q, k, v or alike."""
        return x[:, self.first : x.shape[1] - self.kept + self.first]

    def tile(self, kernel: str) -> Tile:
        small = shared_memory(self.q.device) < ROOM
        return tile(kernel, self.q.shape[-1], self.q.element_size() == 4, small, self.block_q, self.block_k)


class Linear(NamedTuple):
    """The linear part as the kernels of `sparse_triton` take it.

    Attributes:
        kind: "none", "all" or "given".
        phi: the feature map.
        part: `[B, queries, H, D]` of the blocked queries: given, or written where `apart`.
        state: `[B * H_kv, D, D]` with `z` `[B * H_kv, D]`; the projection `[D, D]` where the part is given; or None.
        apart: whether the part is kept from the sum.
    """

    kind: str = "none"
    phi: str = "identity"
    part: Tensor | None = None
    state: Tensor | None = None
    z: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    apart: bool = False


@functools.lru_cache(256)
def tile(kernel: str, dim: int, wide: bool, small: bool, block_q: int, block_k: int) -> Tile:
    """The table's tile, cut to the powers of two that hold a block."""
    best = WIDE if wide else next(t for most, t in TILES[kernel].items() if dim <= most)
    if small:
        best = Tile(*map(min, best, SMALL))
    queries, keys = min(best.queries, padded_dim(block_q)), min(best.keys, padded_dim(block_k))
    # rows of the products are the queries, but in these
    shrunk = {"key_backward": best.keys // keys, "rest_query": 1, "rest_key": 1}.get(kernel, best.queries // queries)
    # smaller ones leave registers for two programs at a time; so must their buffers
    return Tile(queries, keys, max(4, best.warps // shrunk), best.stages if shrunk == 1 else min(best.stages, 3))


def constants(p: Problem, kernel: str, *read: Tensor) -> dict[str, Any]:
    """Sizes that a kernel is compiled for; `read` are tensors with strides of their own besides q, k and v."""
    t, dim = p.tile(kernel), p.q.shape[-1]
    settings = {"D": dim, "BD": padded_dim(dim), "BQ": t.queries, "BK": t.keys, "BLOCK_Q": p.block_q}
    return settings | {"BLOCK_K": p.block_k, "STAGES": t.stages, "ALIGN": alignment(p.q, p.k, p.v, *read)}


def _engine(settings: dict[str, Any], rows: int, *tensors: Tensor, aligned: bool = True) -> tuple[Any, ...]:
    """Tiles of `rows` tokens of `[B, S, H, D]`, or tensors that stand in for them. Sets `TMA`."""
    settings["TMA"] = aligned and readable(*tensors)
    if not settings["TMA"]:
        return tensors
    return tuple(tiles(x, [1, rows, 1, settings["BD"]]) for x in tensors)


def _programs(count: int, block: int, kept: int, size: int, pairs: int) -> tuple[int, int, int]:
    return ((-(-count // block) * -(-block // size) + -(-kept // size)) * pairs, 1, 1)


def _numbers(p: Problem, heads: int, count: int, block: int) -> tuple[int, ...]:
    return p.queries, p.keys, p.first, p.kept, p.kept_at, -(-count // block), p.q.shape[0] * heads


def _kept(p: Problem, size: int) -> tuple[int, Tensor]:
    """How kept keys are masked, and by what."""
    if p.kept == 0:
        return 0, p.q
    if p.real is None and p.kept % size == 0:
        return 1, p.q
    return 2, p.q.new_ones((p.q.shape[0], p.kept), dtype=torch.uint8) if p.real is None else p.real


def sums_dtype(q: Tensor) -> torch.dtype:
    """Of the logarithms of softmax's sums: their rounding is an error of every weight."""
    return torch.float64 if q.dtype == torch.float32 else torch.float32


def attend(p: Problem, rows: Lists, linear: Linear, width: int = 0) -> tuple[Tensor, Tensor]:
    """The output `[B, S, H, D]`, and log2 of the sums of softmax `[B, H, S]`.

    `width`: entries of each list but the last, of all, if they are equally many.
    """
    q, k, v = p.q, p.k, p.v
    batch, tokens, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens), dtype=sums_dtype(q), device=q.device)
    t = p.tile("forward")
    kept, real = _kept(p, t.keys)
    settings = constants(p, "forward", out) | {
        "KEPT": kept, "RAGGED": p.keys % p.block_k != 0 or p.block_k % t.keys != 0, "PHI": linear.phi,
        "LINEAR": linear.kind, "PROJECT": linear.state is not None, "BIASED": linear.bias is not None,
        "PARTS": linear.apart, "MOST": MOST[q.dtype], "EQUAL": width > 0, "EARLY": t.queries >= EARLY,
        "num_warps": t.warps,
    }  # fmt: skip
    engine = _engine(settings, t.keys, k, v)
    part, state, z, bias = (q if x is None else x for x in (linear.part, linear.state, linear.z, linear.bias))
    launch(
        triton_kernels.forward_kernel, _programs(p.queries, p.block_q, p.kept, t.queries, batch * heads),
        (q, k, v, out, lse, rows.entries, rows.start, real, part, state, z, bias,
         *_numbers(p, heads, p.queries, p.block_q), heads, p.group, rows.entries.shape[1], width or rows.start.shape[1],
         p.scale * LOG2_E, linear.eps, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
        settings, engine,
    )  # fmt: skip
    return out, lse


def query_gradients(
    p: Problem, rows: Lists, linear: Linear, grad: Tensor, grad_part: Tensor, out: Tensor, lse: Tensor,
    planes: Tensor | None = None, dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`dq`, stats `[B * H, S, 2]` (S made even) and planes `[3, B, H, queries]` of `query_backward_kernel`.

    dq and planes may be there."""
    q, k, v = p.q, p.k, p.v
    batch, _, heads, dim = q.shape
    if dq is None:
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tokens = q.shape[1]
    stats = torch.empty((batch * heads, tokens + tokens % 2, 2), dtype=lse.dtype, device=q.device)
    if tokens % 2:  # read as a query that there is not
        stats[:, -1] = 0
    if planes is None:
        biased = linear.bias is not None
        shape = (2 + biased, batch, heads, p.queries) if linear.kind == "all" else (1, 1, 1, 1)
        planes = torch.empty(shape, dtype=torch.float32, device=q.device)
    t = p.tile("query_backward")
    kept, real = _kept(p, t.keys)
    settings = constants(p, "query_backward", grad, grad_part, out) | {
        "KEPT": kept, "RAGGED": p.keys % p.block_k != 0 or p.block_k % t.keys != 0, "PHI": linear.phi,
        "LINEAR": linear.kind, "BIASED": linear.bias is not None, "PARTS": linear.apart, "num_warps": t.warps,
    }  # fmt: skip
    state, z, bias = (q if x is None else x for x in (linear.state, linear.z, linear.bias))
    engine = _engine(settings, t.keys, k, v)
    launch(
        triton_kernels.query_backward_kernel, _programs(p.queries, p.block_q, p.kept, t.queries, batch * heads),
        (q, k, v, grad, grad_part, out, lse, rows.entries, rows.start, real, state, z, bias, dq, stats, planes,
         *_numbers(p, heads, p.queries, p.block_q), heads, p.group, rows.entries.shape[1], rows.start.shape[1],
         p.scale * LOG2_E, linear.eps, planes.stride(0), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
         *grad.stride()[:3], *grad_part.stride()[:3], *out.stride()[:3]),
        settings, engine,
    )  # fmt: skip
    return dq, stats, planes


def key_gradients(
    p: Problem, columns: Lists, linear: str, phi: str, grad: Tensor, stats: Tensor,
    state: Tensor | None = None, dz: Tensor | None = None, factor: Tensor | None = None,
    grads: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dk` and `dv`.

    Args:
        state, dz, factor: for `linear` "all": gradients of a record's sums, `[B * H_kv, D, D]` to be multiplied by
            `[B * H_kv]`, and `[B * H_kv, D]`.
        grads: for "given": both gradients through the linear part, to which the others are added in place.
    """
    q, k, v = p.q, p.k, p.v
    batch, _, heads, dim = q.shape
    dk, dv = grads or tuple(torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    t = p.tile("key_backward")
    settings = constants(p, "key_backward", grad) | {
        "KEPT": 0 if p.kept == 0 else 1 if p.real is None else 2, "PHI": phi, "LINEAR": linear, "GROUPED": p.group > 1,
        "num_warps": t.warps,
    }  # fmt: skip
    state, dz, factor, real = (q if x is None else x for x in (state, dz, factor, p.real))
    kv_heads = k.shape[2]
    queries, keys, first, kept, kept_at, blocks, pairs = _numbers(p, kv_heads, p.keys, p.block_k)
    # pairs of log-sum-exp and delta lie side by side, and two of them at a multiple of 16 bytes
    engine = *_engine(settings, t.queries, q, grad, aligned=first % 2 == kept_at % 2 == 0), stats
    if settings["TMA"]:
        engine = *engine[:2], tiles(stats.flatten(1), [1, 2 * t.queries])
    launch(
        triton_kernels.key_backward_kernel, _programs(keys, p.block_k, kept, t.keys, pairs),
        (q, k, v, grad, stats, columns.entries, columns.start, real, state, dz, factor, dk, dv,
         queries, keys, first, kept, kept_at, blocks, -(-queries // p.block_q), pairs, heads, p.group,
         columns.entries.shape[1], columns.start.shape[1], p.scale * LOG2_E, *q.stride()[:3], *k.stride()[:3],
         *v.stride()[:3], *grad.stride()[:3]),
        settings, engine,
    )  # fmt: skip
    return dk, dv


def fold(records: Tensor, weight: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of partial records `[B * H, parts, D + 2, D]`: the sum `[B * H, D, D]`, and state and z of `Linear`."""
    if records.shape[1] > READ_TOGETHER:
        records = records.sum(1, keepdim=True)
    groups, parts, _, dim = records.shape
    sums, state, z = (
        torch.empty((groups, *shape), dtype=kind, device=records.device)
        for shape, kind in (((dim, dim), torch.float32), ((dim, dim), dtype), ((dim,), torch.float32))
    )
    w = records if weight is None else weight
    launch(
        triton_kernels.fold_kernel, (groups, -(-dim // 16), 1),
        (records, w, sums, state, z, parts, *w.stride()[:2]),
        {"D": dim, "BD": padded_dim(dim), "BA": 16, "BC": 32, "PROJECT": weight is not None, "num_warps": 4},
    )  # fmt: skip
    return sums, state, z
