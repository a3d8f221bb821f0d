"""Linear attention as an operator of torch: launches the kernels of `linear_triton`, for compile and autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import HAS_TRITON, multiprocessors

if HAS_TRITON:
    from . import linear_triton as triton_kernels

# partial records may take this share of inputs and outputs together
SCRATCH = 0.04
# readers add up so many partial records themselves; of more, one sum is made first
READ_TOGETHER = 4


class Blocks(NamedTuple):
    """Tokens in a block, warps, depth of the software pipeline, and programs for each multiprocessor."""

    tokens: int
    warps: int
    stages: int
    programs: int


# by kernel and padded head dim, for 16-bit inputs; measured on an H100 (bench/NOTES.md)
BLOCKS = {
    "state": {64: Blocks(64, 4, 3, 4), 128: Blocks(64, 8, 3, 2), 256: Blocks(32, 8, 2, 2)},
    "output": {64: Blocks(64, 4, 3, 4), 128: Blocks(64, 4, 3, 2), 256: Blocks(32, 8, 2, 2)},
    "query_backward": {64: Blocks(64, 4, 3, 4), 128: Blocks(64, 4, 2, 2), 256: Blocks(16, 8, 1, 1)},
    "key_backward": {64: Blocks(64, 4, 3, 4), 128: Blocks(64, 4, 2, 2), 256: Blocks(16, 8, 1, 1)},
}


def padded(dim: int) -> int:
    """The power of two that a head takes in a block."""
    return max(16, 1 << (dim - 1).bit_length())


def blocks(kernel: str, x: Tensor) -> Blocks:
    """Block sizes of a kernel for inputs like `x`; fp32 takes small ones, its products need three times the room."""
    chosen = BLOCKS[kernel][max(64, padded(x.shape[-1]))]
    if x.element_size() == 4:
        chosen = chosen._replace(tokens=16, stages=1)
    return chosen


def chunks(tokens: int, heads: int, block: Blocks, most: float, device: torch.device) -> tuple[int, int]:
    """In how many pieces `heads` sequences are cut, at most `most`, and the length of one."""
    wanted = max(1, min(block.programs * multiprocessors(device) // heads, int(most)))
    length = -(-tokens // (wanted * block.tokens)) * block.tokens
    return -(-tokens // length), length


def _constants(x: Tensor, block: Blocks, *read: Tensor) -> dict[str, Any]:
    dim = padded(x.shape[-1])
    tile = min(dim, (128 if dim <= 128 else 64) * 2 // x.element_size()) if dim > 64 else dim
    return {
        "D": x.shape[-1], "BD": dim, "BV": tile, "BS": block.tokens,
        "STAGES": block.stages, "ALIGN": _alignment(x, *read), "num_warps": block.warps,
    }  # fmt: skip


def _alignment(*read: Tensor) -> int:
    """How many channels can be read at once: 8 where heads and rows begin at multiples of 8 (D 40 and 72, too)."""
    return 8 if all(n % 8 == 0 for x in read for n in (x.shape[-1], *x.stride()[:-1], x.storage_offset())) else 1


def _tiles(constants: dict[str, Any]) -> int:
    return -(-constants["D"] // constants["BV"])


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


def forward(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, count: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, interleaved: bool, feature_map: str, normalize: str, eps: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output `[B, S, H, D]`, and the records `[B * H_kv, parts, D + 2, D]` in fp32."""
    batch, length, kv_heads, dim = k.shape
    tokens, heads = q.shape[1:3]
    cos, sin, table_strides, kind = _rope(cos, sin, interleaved, q)
    weight, count, weight_strides, weighted = _weight(weight, count, q)
    affine = normalize in ("inline", "mala")
    block = blocks("state", k)
    both = (q.numel() * 2 + k.numel() * 2) * q.element_size()
    scratch = SCRATCH * both / (4 * (dim + 2) * dim * batch * kv_heads)
    parts, chunk = chunks(length, batch * kv_heads, block, scratch, q.device)
    records = torch.empty((batch * kv_heads, parts, dim + 2, dim), dtype=torch.float32, device=q.device)
    constants = _constants(k, block, v)
    triton_kernels.state_kernel[(parts, batch * kv_heads, _tiles(constants))](
        k, v, weight, count, cos, sin, records, length, chunk, kv_heads,
        *k.stride()[:3], *v.stride()[:3], *weight_strides, 0, *table_strides,
        **constants, PHI=feature_map, ROPE=kind, PLANES=int(weighted), AFFINE=affine,
    )  # fmt: skip
    if parts > READ_TOGETHER:
        records, parts = records.sum(1, keepdim=True), 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block = blocks("output", q)
    constants = _constants(q, block)
    pieces, chunk = chunks(tokens, batch * heads, block, tokens, q.device)
    triton_kernels.output_kernel[(pieces, batch * heads, _tiles(constants))](
        q, records, cos, sin, out, tokens, chunk, heads, heads // kv_heads, parts, eps, scale,
        *q.stride()[:3], *out.stride()[:3], *table_strides,
        **constants, PHI=feature_map, ROPE=kind, NORMALIZE=normalize, SCALED=scale != 1.0,
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
    if records.shape[1] > 1:
        records = records.sum(1, keepdim=True)
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    affine = normalize in ("inline", "mala")
    parts_of_q = torch.empty((3 if affine else 2, *q.shape[:3]), dtype=torch.float32, device=q.device)
    plane = q.numel() // dim
    block = blocks("query_backward", q)
    constants = _constants(q, block, grad)
    pieces, chunk = chunks(tokens, batch * heads, block, tokens, q.device)
    triton_kernels.query_backward_kernel[(pieces, batch * heads)](
        q, grad, records, cos, sin, dq, parts_of_q, tokens, chunk, heads, heads // kv_heads, eps, scale, plane,
        *q.stride()[:3], *grad.stride()[:3], *table_strides,
        **constants, PHI=feature_map, ROPE=kind, NORMALIZE=normalize, SCALED=scale != 1.0,
    )  # fmt: skip
    block = blocks("state", q)
    constants = _constants(q, block, grad)
    scratch = SCRATCH * (3 * q.numel() + 4 * k.numel()) * q.element_size() / (4 * (dim + 2) * dim * batch * heads)
    parts, chunk = chunks(tokens, batch * heads, block, scratch, q.device)
    partial = torch.empty((batch * heads, parts, dim + 2, dim), dtype=torch.float32, device=q.device)
    triton_kernels.state_kernel[(parts, batch * heads, _tiles(constants))](
        q, grad, parts_of_q, q, cos, sin, partial, tokens, chunk, heads,
        *q.stride()[:3], *grad.stride()[:3], *parts_of_q.stride()[1:], plane, *table_strides,
        **constants, PHI=feature_map, ROPE=kind, PLANES=3, AFFINE=affine,
    )  # fmt: skip
    # query heads that share a key head lie side by side, so their partial records are one list
    parts *= heads // kv_heads
    partial = partial.view(batch * kv_heads, parts, dim + 2, dim)
    if parts > READ_TOGETHER:
        partial, parts = partial.sum(1, keepdim=True), 1
    if scale != 1.0:
        partial[:, :, : dim + 1] *= scale
    block = blocks("key_backward", k)
    constants = _constants(k, block, v)
    pieces, chunk = chunks(length, batch * kv_heads, block, length, q.device)
    triton_kernels.key_backward_kernel[(pieces, batch * kv_heads)](
        k, v, weight, count, partial, cos, sin, dk, dv, length, chunk, kv_heads, parts,
        *k.stride()[:3], *v.stride()[:3], *weight_strides, *table_strides,
        **constants, PHI=feature_map, ROPE=kind, WEIGHTED=weighted, AFFINE=affine,
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


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    return *linear_attention_backward_op(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 9


linear_attention_op.register_autograd(_backward, setup_context=_setup)
