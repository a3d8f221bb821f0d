"""Linear attention as an operator of torch: launches the kernels of `linear_triton`, for compile and autograd."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import HAS_TRITON, multiprocessors, why_not_triton
from .checks import check_linear
from .eager import differentiable
from .launch import Launch, Remembered
from .rotary import RopeTables, alike

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


def plan(kernel: str, x: Tensor, *read: Tensor, budget: float = math.inf) -> Plan:
    """Cut the `B * H` sequences of `x` `[B, S, H, D]` in pieces: `budget` bytes may go to one record for each.

    Args:
        read: what else is read, of the same shape: where rows and heads of all begin at multiples of 8 channels (with
            D 40 and 72, too), 8 are read at once.
        budget: infinite for kernels that leave no records.
    """
    batch, tokens, heads, dim = x.shape
    wide = x.element_size() == 4
    aligned = dim % 8 == 0 and all(n % 8 == 0 for y in (x, *read) for n in y.stride()[:-1])
    block = next(sizes for most, sizes in BLOCKS[kernel].items() if dim <= most)
    if wide:  # products of fp32 need room
        block = block._replace(tokens=16, stages=1, warps=4 if dim <= 64 else 8)
    padded = max(16, 1 << (dim - 1).bit_length())
    tile = padded if padded <= 64 else min(padded, (128 if padded == 128 else 64) // (2 if wide else 1))
    most = budget / (4 * (dim + 2) * dim * batch * heads)
    wanted = max(1, int(min(block.programs * multiprocessors(x.device) // (batch * heads), most)))
    chunk = -(-tokens // (wanted * block.tokens)) * block.tokens
    settings = {"D": dim, "BD": padded, "BV": tile, "BS": block.tokens, "STAGES": block.stages}
    settings |= {"ALIGN": 8 if aligned else 1, "num_warps": block.warps}
    return Plan((-(-tokens // chunk), batch * heads, -(-dim // tile)), chunk, settings)


def _rope(cos: Tensor | None, interleaved: bool) -> tuple[tuple[int, ...], str]:
    """Strides of the tables over batch, tokens, heads (0 where shared), and the kind."""
    if cos is None:
        return (0, 0, 0), "none"
    kind = "interleaved" if interleaved else "halves"
    if cos.ndim == 2:
        return (0, cos.stride(0), 0), kind
    batch, tokens, heads, _ = cos.stride()
    return (batch if cos.shape[0] > 1 else 0, tokens, heads if cos.shape[2] > 1 else 0), kind


def state_pass(
    k: Tensor, v: Tensor, feature_map: str, *, budget: float, affine: bool, planes: int,
    weight_strides: tuple[int, ...], table_strides: tuple[int, ...], rope: str, means: bool = False,
    stages: int | None = None,
) -> tuple[Launch, tuple[int, ...]]:  # fmt: skip
    """The launch of `state_kernel` on tensors like these, and the shape of its records.

    Args:
        budget: bytes for the records.
        planes: how many weights each token has, 0, 1 or 3; `weight_strides` are theirs, that of planes last.
        means: whether to leave the means of the keys that the kernel takes at once, too.
        stages: depth of the software pipeline, None for the table's.
    """
    batch, tokens, heads, dim = k.shape
    grid, chunk, settings = plan("state", k, v, budget=budget)
    if stages is not None:
        settings["STAGES"] = stages
    run = Launch(
        triton_kernels.state_kernel, grid,
        (tokens, chunk, heads, *k.stride()[:3], *v.stride()[:3], *weight_strides, *table_strides),
        settings | {"PHI": feature_map, "ROPE": rope, "PLANES": planes, "AFFINE": affine, "BLOCK_MEANS": means},
    )  # fmt: skip
    return run, (batch * heads, grid[0], dim + 2, dim)


def suits(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, count: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, feature_map: str, normalize: str, *_: float,
) -> bool:  # fmt: skip
    """Whether the kernels know these arguments of `forward`; ValueError where they do not belong together.

    Pairs that are half a head apart are turned where that is a power of two.
    """
    rope = None if cos is None or sin is None else RopeTables(cos, sin, interleaved)
    check_linear(q, k, v, feature_map, normalize, rope, None, None)
    dim = q.shape[-1]
    if 0 in q.shape:
        return False
    lacking = None
    if v.shape[-1] != dim:
        lacking = f"values have head dim {v.shape[-1]}, keys {dim}"
    elif rope is not None and not interleaved and dim & (dim - 1) != 0:
        lacking = f"pairs half a head apart need a head dim that is a power of two, not {dim}"
    return why_not_triton("linear_attention", dim, q, k, v, lacking=lacking) is None


def _strides(weight: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if weight is None else (*weight.stride(), 0)


@Remembered
def _records_recipe(
    k: Tensor, v: Tensor, feature_map: str, budget: float, affine: bool, planes: Tensor | None, weight: Tensor | None,
    means: bool, stages: int | None,
) -> tuple[Launch, tuple[int, ...]]:  # fmt: skip
    strides = _strides(weight) if planes is None else (*planes.stride()[1:], planes.stride(0))
    return state_pass(
        k, v, feature_map, budget=budget, affine=affine, planes=3 if planes is not None else int(weight is not None),
        weight_strides=strides, table_strides=(0, 0, 0), rope="none", means=means, stages=stages,
    )  # fmt: skip


def partial_records(
    k: Tensor, v: Tensor, feature_map: str, *, budget: float, affine: bool = False, planes: Tensor | None = None,
    weight: Tensor | None = None, count: Tensor | None = None, means: Tensor | None = None,
    stages: int | None = None,
) -> Tensor:  # fmt: skip
    """Records `[B * H, parts, D + 2, D]` in fp32 of `state_kernel`, to be added up; at most `budget` bytes.

    Args:
        planes: three weights of each token `[3, B, S, H]` (two unless `affine`), or else
        weight, count: one `[B, S, H]`, and how many keys the means are over `[B]`.
        means: takes the means of blocks of `tokens_at_once(k)` keys, `[B * H, blocks, D]` in fp32.
        stages: depth of the software pipeline, None for that of `linear_attention`.
    """
    run, shape = _records_recipe(k, v, feature_map, budget, affine, planes, weight, means is not None, stages)
    records = torch.empty(shape, dtype=torch.float32, device=k.device)
    weights = next((x for x in (planes, weight) if x is not None), k)
    run(k, v, weights, k if count is None else count, k, k, records, records if means is None else means)
    return records


def tokens_at_once(k: Tensor) -> int:
    """Of how many keys `partial_records` can make the means on its way; 0 for none."""
    if k.element_size() == 4:
        return 0
    return next(sizes.tokens for most, sizes in BLOCKS["state"].items() if k.shape[-1] <= most)


class Forward(NamedTuple):
    """Both passes of `forward` on tensors of one layout, and the records between them, perhaps summed first."""

    state: Launch
    output: Launch
    records: tuple[int, ...]
    summed: bool


def _forward_recipe(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, count: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, feature_map: str, normalize: str, eps: float, scale: float,
) -> Forward:  # fmt: skip
    kv_heads = k.shape[2]
    _, tokens, heads, dim = q.shape
    table_strides, kind = _rope(cos, interleaved)
    state, records = state_pass(
        k, v, feature_map, budget=SCRATCH * 2 * (q.numel() + k.numel()) * q.element_size(), affine=normalize in AFFINE,
        planes=0 if weight is None else 1, weight_strides=_strides(weight), table_strides=table_strides, rope=kind,
    )  # fmt: skip
    summed = records[1] > READ_TOGETHER
    grid, chunk, settings = plan("output", q)
    output = Launch(
        triton_kernels.output_kernel, grid,
        (tokens, chunk, heads, heads // kv_heads, 1 if summed else records[1], eps, scale,
         *q.stride()[:3], tokens * heads * dim, heads * dim, dim, *table_strides),
        settings | {"PHI": feature_map, "ROPE": kind, "NORMALIZE": normalize, "SCALED": scale != 1.0},
    )  # fmt: skip
    return Forward(state, output, records, summed)


# the operator was checked when it was traced
_known_to_suit = Remembered(_forward_recipe)


@Remembered
def forward_recipe(*arguments: Any) -> Forward | None:
    """How `forward` runs on arguments like these; None where PyTorch has to compute them."""
    return _forward_recipe(*arguments) if suits(*arguments) else None


def forward(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, count: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, *settings: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output `[B, S, H, D]`, and the records `[B * H_kv, parts, D + 2, D]` in fp32; `settings` end in a recipe."""
    recipe: Forward = settings[-1]
    if weight is None or count is None:  # what is not there is not read
        weight = count = q
    if cos is None or sin is None:
        cos = sin = q
    records = torch.empty(recipe.records, dtype=torch.float32, device=q.device)
    recipe.state(k, v, weight, count, cos, sin, records, records)
    if recipe.summed:
        records = records.sum(1, keepdim=True)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    recipe.output(q, records, cos, sin, out)
    return out, records


def forward_to_keep(*arguments: Any) -> tuple[Tensor, Tensor]:
    """As `forward`, with one record for a head: less to keep, and a shape that does not depend on the device."""
    out, records = forward(*arguments)
    return out, records if records.shape[1] == 1 else records.sum(1, keepdim=True)


class Backward(NamedTuple):
    """The passes of `backward` on tensors of one layout.

    Attributes:
        planes: shape of the weights of each query that `state` reads, where `query` leaves no records.
        records: shape of the gradient's partial records.
        summed: whether these are added up before `key` reads them.
    """

    query: Launch
    state: Launch | None
    key: Launch
    planes: tuple[int, ...]
    records: tuple[int, ...]
    summed: bool


@Remembered
def _backward_recipe(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, count: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, feature_map: str, normalize: str, eps: float, scale: float,
) -> Backward:  # fmt: skip
    batch, length, kv_heads, dim = k.shape
    tokens, heads = q.shape[1:3]
    table_strides, kind = _rope(cos, interleaved)
    affine = normalize in AFFINE
    budget = SCRATCH * (3 * q.numel() + 4 * k.numel()) * q.element_size()
    whole = dim <= WHOLE_BACKWARD
    rows = q.numel() // dim
    grid, chunk, settings = plan("query_backward", q, grad, budget=budget if whole else math.inf)
    query = Launch(
        triton_kernels.query_backward_kernel, (*grid[:2], 1),
        (tokens, chunk, heads, heads // kv_heads, eps, scale, rows,
         *q.stride()[:3], *grad.stride()[:3], *table_strides),
        settings | {"PHI": feature_map, "ROPE": kind, "NORMALIZE": normalize, "SCALED": scale != 1.0, "WHOLE": whole},
    )  # fmt: skip
    state, parts = None, grid[0]
    if not whole:
        state, (_, parts, *_) = state_pass(
            q, grad, feature_map, budget=budget, affine=affine, planes=3,
            weight_strides=(tokens * heads, heads, 1, rows), table_strides=table_strides, rope=kind,
        )  # fmt: skip
    # query heads that share a key head lie side by side, so their partial records are one list
    parts *= heads // kv_heads
    summed = parts > READ_TOGETHER
    grid, chunk, settings = plan("key_backward", k, v)
    key = Launch(
        triton_kernels.key_backward_kernel, (*grid[:2], 1),
        (length, chunk, kv_heads, 1 if summed else parts,
         *k.stride()[:3], *v.stride()[:3], *_strides(weight)[:3], *table_strides),
        settings | {"PHI": feature_map, "ROPE": kind, "WEIGHTED": weight is not None, "AFFINE": affine},
    )  # fmt: skip
    planes = (3 if affine else 2, *q.shape[:3])
    return Backward(query, state, key, planes, (batch * kv_heads, parts, dim + 2, dim), summed)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, records: Tensor, weight: Tensor | None, count: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, feature_map: str, normalize: str, eps: float,
    scale: float, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    recipe = _backward_recipe(grad, q, k, v, weight, count, cos, sin, interleaved, feature_map, normalize, eps, scale)
    if weight is None or count is None:
        weight = count = q
    if cos is None or sin is None:
        cos = sin = q
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    partial = torch.empty(recipe.records, dtype=torch.float32, device=q.device)
    if recipe.state is None:
        recipe.query(q, grad, records, cos, sin, dq, partial)
    else:
        planes = torch.empty(recipe.planes, dtype=torch.float32, device=q.device)
        recipe.query(q, grad, records, cos, sin, dq, planes)
        recipe.state(q, grad, planes, q, cos, sin, partial, partial)
    if recipe.summed:
        partial = partial.sum(1, keepdim=True)
    if scale != 1.0:
        partial[:, :, :-1] *= scale
    recipe.key(k, v, weight, count, partial, cos, sin, dk, dv)
    return dq, dk, dv


@torch.library.custom_op("linfusion::linear_attention", mutates_args=())
def linear_attention_op(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, count: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, feature_map: str, normalize: str, eps: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    cos, sin = alike(cos, sin)
    recipe = _known_to_suit(q, k, v, weight, count, cos, sin, interleaved, feature_map, normalize, eps, scale)
    return forward_to_keep(q, k, v, weight, count, cos, sin, recipe)


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
    cos, sin = alike(cos, sin)
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
    gradients = (None,) * 3 if grad is None else run(grad, *ctx.saved_tensors, *ctx.settings)
    return *gradients, *(None,) * (4 + len(ctx.settings))


linear_attention_op.register_autograd(functools.partial(_backward, linear_attention_backward_op), setup_context=_setup)
forward_with_gradients = differentiable(forward_to_keep, _setup, functools.partial(_backward, backward))
