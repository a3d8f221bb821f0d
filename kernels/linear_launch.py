"""Linear attention as an operator of torch: launches the kernels of `linear_triton`, for compile and autograd."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import HAS_TRITON, multiprocessors
from .eager import differentiable
from .launch import launch

if HAS_TRITON:
    from . import linear_triton as triton_kernels

# partial records may take this share of inputs and outputs together
SCRATCH = 0.04
# readers add up so many partial records themselves; of more, one sum is made first
READ_TOGETHER = 4
# up to this head dim the query's backward pass has registers for the record's gradient, too
WHOLE_BACKWARD = 64
# epilogues that need the mean of v, too
AFFINE = ("inline", "mala")


class Blocks(NamedTuple):
    """Tokens in a block, warps, depth of the software pipeline, and programs for each multiprocessor."""

    tokens: int
    warps: int
    stages: int
    programs: int


# by kernel and largest head dim, for 16-bit inputs; measured on an H100 (bench/NOTES.md)
BLOCKS = {
    "state": {
        48: Blocks(64, 4, 2, 4), 64: Blocks(128, 8, 2, 2), 128: Blocks(64, 4, 2, 2), 256: Blocks(32, 8, 1, 2),
    },
    "output": {
        48: Blocks(64, 4, 3, 4), 64: Blocks(64, 4, 4, 4), 128: Blocks(64, 4, 4, 2), 256: Blocks(64, 4, 1, 2),
    },
    "query_backward": {
        48: Blocks(64, 4, 2, 2), 64: Blocks(64, 4, 3, 2), 128: Blocks(128, 8, 3, 1), 256: Blocks(16, 4, 1, 2),
    },
    "key_backward": {
        48: Blocks(64, 4, 3, 3), 64: Blocks(64, 4, 3, 6), 128: Blocks(32, 4, 3, 2), 256: Blocks(16, 4, 1, 2),
    },
}  # fmt: skip


class Plan(NamedTuple):
    """How a kernel is run on tensors of one shape: its grid, tokens of a piece, and constants common to all kernels."""

    grid: tuple[int, int, int]
    chunk: int
    settings: dict[str, Any]


@functools.lru_cache(4096)
def plan(
    kernel: str, shape: tuple[int, ...], wide: bool, layouts: tuple[tuple[tuple[int, ...], int], ...],
    device: torch.device, budget: float,
) -> Plan:  # fmt: skip
    """Cut `B * H` sequences of `shape` `[B, S, H, D]` in pieces: `budget` bytes may go to one record for each.

    Args:
        wide: fp32 takes small blocks, its products need room.
        layouts: strides and offset of each tensor that is read: where rows and heads begin at multiples of 8 channels
            (with D 40 and 72, too), 8 are read at once.
        budget: infinite for kernels that leave no records.
    """
    batch, tokens, heads, dim = shape
    aligned = dim % 8 == 0 and all(n % 8 == 0 for strides, offset in layouts for n in (*strides[:-1], offset))
    block = next(sizes for most, sizes in BLOCKS[kernel].items() if dim <= most)
    if wide:
        block = block._replace(tokens=16, stages=1, warps=4 if dim <= 64 else 8)
    padded = max(16, 1 << (dim - 1).bit_length())
    tile = padded if padded <= 64 else min(padded, (128 if padded == 128 else 64) // (2 if wide else 1))
    most = budget / (4 * (dim + 2) * dim * batch * heads)
    wanted = max(1, int(min(block.programs * multiprocessors(device) // (batch * heads), most)))
    chunk = -(-tokens // (wanted * block.tokens)) * block.tokens
    settings = {"D": dim, "BD": padded, "BV": tile, "BS": block.tokens, "STAGES": block.stages}
    settings |= {"ALIGN": 8 if aligned else 1, "num_warps": block.warps}
    return Plan((-(-tokens // chunk), batch * heads, -(-dim // tile)), chunk, settings)


def _plan(kernel: str, x: Tensor, *read: Tensor, budget: float = math.inf) -> Plan:
    layouts = tuple([(y.stride(), y.storage_offset()) for y in (x, *read)])
    return plan(kernel, x.shape, x.element_size() == 4, layouts, x.device, budget)


def _rope(cos: Tensor | None, sin: Tensor | None, interleaved: bool, like: Tensor) -> tuple[Any, ...]:
    """cos, sin, their strides over batch, tokens, heads (0 where shared), and the kind; `like` stands in for none."""
    if cos is None or sin is None:
        return like, like, (0, 0, 0), "none"
    if sin.stride() != cos.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    kind = "interleaved" if interleaved else "halves"
    if cos.ndim == 2:
        return cos, sin, (0, cos.stride(0), 0), kind
    batch, tokens, heads, _ = cos.stride()
    return cos, sin, (batch if cos.shape[0] > 1 else 0, tokens, heads if cos.shape[2] > 1 else 0), kind


def _weight(weight: Tensor | None, count: Tensor | None, like: Tensor) -> tuple[Any, ...]:
    if weight is None:
        return like, like, (0, 0, 0), False
    return weight, count, weight.stride(), True


def partial_records(
    k: Tensor, v: Tensor, feature_map: str, *, budget: float, affine: bool = False, planes: Tensor | None = None,
    weight: Tensor | None = None, count: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    strides: tuple[int, int, int] = (0, 0, 0), rope: str = "none",
) -> Tensor:  # fmt: skip
    """Records `[B * H, parts, D + 2, D]` in fp32 of `state_kernel`, to be added up; at most `budget` bytes.

    Args:
        planes: three weights of each token `[3, B, S, H]` (two unless `affine`), or else
        weight, count: one `[B, S, H]`, and how many keys the means are over `[B]`.
        cos, sin, strides, rope: as `_rope` gives them.
    """
    batch, tokens, heads, dim = k.shape
    grid, chunk, settings = _plan("state", k, v, budget=budget)
    records = torch.empty((batch * heads, grid[0], dim + 2, dim), dtype=torch.float32, device=k.device)
    weight_strides: tuple[int, ...] = (0, 0, 0, 0)
    kind, weights = 0, k
    if planes is not None:
        kind, weights, weight_strides = 3, planes, (*planes.stride()[1:], planes.stride(0))
    elif weight is not None:
        kind, weights, weight_strides = 1, weight, (*weight.stride(), 0)
    launch(
        triton_kernels.state_kernel, grid,
        (k, v, weights, k if count is None else count, k if cos is None else cos, k if sin is None else sin, records,
         tokens, chunk, heads, *k.stride()[:3], *v.stride()[:3], *weight_strides, *strides),
        settings | {"PHI": feature_map, "ROPE": rope, "PLANES": kind, "AFFINE": affine},
    )  # fmt: skip
    return records


def forward(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, count: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, feature_map: str, normalize: str, eps: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output `[B, S, H, D]`, and the records `[B * H_kv, parts, D + 2, D]` in fp32."""
    kv_heads = k.shape[2]
    tokens, heads = q.shape[1:3]
    cos, sin, table_strides, kind = _rope(cos, sin, interleaved, q)
    records = partial_records(
        k, v, feature_map, budget=SCRATCH * 2 * (q.numel() + k.numel()) * q.element_size(),
        affine=normalize in AFFINE, weight=weight, count=count, cos=cos, sin=sin, strides=table_strides, rope=kind,
    )  # fmt: skip
    parts = records.shape[1]
    if parts > READ_TOGETHER:
        records, parts = records.sum(1, keepdim=True), 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grid, chunk, settings = _plan("output", q)
    launch(
        triton_kernels.output_kernel, grid,
        (q, records, cos, sin, out, tokens, chunk, heads, heads // kv_heads, parts, eps, scale,
         *q.stride()[:3], *out.stride()[:3], *table_strides),
        settings | {"PHI": feature_map, "ROPE": kind, "NORMALIZE": normalize, "SCALED": scale != 1.0},
    )  # fmt: skip
    return out, records


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, records: Tensor, weight: Tensor | None, count: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, feature_map: str, normalize: str, eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    batch, length, kv_heads, dim = k.shape
    tokens, heads = q.shape[1:3]
    cos, sin, table_strides, kind = _rope(cos, sin, interleaved, q)
    weight, count, weight_strides, weighted = _weight(weight, count, q)
    affine = normalize in AFFINE
    if records.shape[1] > 1:
        records = records.sum(1, keepdim=True)
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    budget = SCRATCH * (3 * q.numel() + 4 * k.numel()) * q.element_size()
    whole = dim <= WHOLE_BACKWARD
    grid, chunk, settings = _plan("query_backward", q, grad, budget=budget if whole else math.inf)
    shape = (batch * heads, grid[0], dim + 2, dim) if whole else (3 if affine else 2, *q.shape[:3])
    partial = torch.empty(shape, dtype=torch.float32, device=q.device)
    launch(
        triton_kernels.query_backward_kernel, (*grid[:2], 1),
        (q, grad, records, cos, sin, dq, partial, tokens, chunk, heads, heads // kv_heads, eps, scale,
         q.numel() // dim, *q.stride()[:3], *grad.stride()[:3], *table_strides),
        settings | {"PHI": feature_map, "ROPE": kind, "NORMALIZE": normalize, "SCALED": scale != 1.0, "WHOLE": whole},
    )  # fmt: skip
    if not whole:
        partial = partial_records(
            q, grad, feature_map, budget=budget, affine=affine, planes=partial, cos=cos, sin=sin,
            strides=table_strides, rope=kind,
        )  # fmt: skip
    # query heads that share a key head lie side by side, so their partial records are one list
    partial = partial.view(batch * kv_heads, -1, dim + 2, dim)
    parts = partial.shape[1]
    if parts > READ_TOGETHER:
        partial, parts = partial.sum(1, keepdim=True), 1
    if scale != 1.0:
        partial[:, :, : dim + 1] *= scale
    grid, chunk, settings = _plan("key_backward", k, v)
    launch(
        triton_kernels.key_backward_kernel, (*grid[:2], 1),
        (k, v, weight, count, partial, cos, sin, dk, dv, length, chunk, kv_heads, parts,
         *k.stride()[:3], *v.stride()[:3], *weight_strides, *table_strides),
        settings | {"PHI": feature_map, "ROPE": kind, "WEIGHTED": weighted, "AFFINE": affine},
    )  # fmt: skip
    return dq, dk, dv


@torch.library.custom_op("linfusion::linear_attention", mutates_args=())
def linear_attention_op(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, count: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, feature_map: str, normalize: str, eps: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, records = forward(q, k, v, weight, count, cos, sin, interleaved, feature_map, normalize, eps, scale)
    # one record for a head, so that shapes do not depend on the device
    return out, records if records.shape[1] == 1 else records.sum(1, keepdim=True)


@linear_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, count: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, feature_map: str, normalize: str, eps: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, _, heads, dim = k.shape
    records = q.new_empty((batch * heads, 1, dim + 2, dim), dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), records


@torch.library.custom_op("linfusion::linear_attention_backward", mutates_args=())
def linear_attention_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, records: Tensor, weight: Tensor | None, count: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, feature_map: str, normalize: str, eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(grad, q, k, v, records, weight, count, cos, sin, interleaved, feature_map, normalize, eps, scale)


@linear_attention_backward_op.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, records: Tensor, weight: Tensor | None, count: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, feature_map: str, normalize: str, eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, weight, count, cos, sin, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, output[1], weight, count, cos, sin)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(run: Callable[..., tuple], ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    return *run(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 9


linear_attention_op.register_autograd(functools.partial(_backward, linear_attention_backward_op), setup_context=_setup)
forward_with_gradients = differentiable(forward, _setup, functools.partial(_backward, backward))
