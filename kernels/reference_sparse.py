"""The specification of sparse-linear attention; part of `reference`.

It builds dense masks and the whole score matrix, and is no path for real sizes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import block_counts, check_block_map, check_keep, check_projection, check_qkv, check_routing, repeat_heads
from .features import named_feature_map, wide

LINEAR_EPS = 1e-5
"""Added to the sum of the linear weights, as in the published code."""


def block_classes(q: Tensor, k: Tensor, topk: float, skip: float, block_q: int, block_k: int) -> Tensor:
    """`[B, H, query blocks, key blocks]` int: 1 chosen, -1 dropped, 0 between (arXiv 2509.24006, eq. 2 and 3).

    Softmax and the scale would not change the order within a row, nor does the mean that k loses, but for rounding.
    """
    q, k = wide(q, k)
    pooled_q = torch.stack([x.mean(dim=1) for x in q.split(block_q, dim=1)], dim=1)
    pooled_k = torch.stack([x.mean(dim=1) for x in (k - k.mean(dim=1, keepdim=True)).split(block_k, dim=1)], dim=1)
    scores = torch.einsum("bmhd,bnhd->bhmn", pooled_q, pooled_k)
    place = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # of equals the first comes first
    blocks = scores.shape[-1]
    chosen, dropped = block_counts(topk, skip, blocks)
    return (place < chosen).long() - (place >= blocks - dropped).long()


def block_map(q: Tensor, k: Tensor, *, topk: float, block_q: int = 128, block_k: int = 64) -> Tensor:
    """See `linfusion.kernels.block_map`."""
    check_qkv(q, k, k)
    check_routing(topk, block_q, block_k, "softmax", "all", 0.0)
    return block_classes(q, repeat_heads(k, q.shape[2]), topk, 0.0, block_q, block_k) == 1


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, *, block_q: int = 128, block_k: int = 64,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """See `linfusion.kernels.block_sparse_attention`."""
    check_qkv(q, k, v)
    seen = check_block_map(block_map, q, k, block_q, block_k)
    seen = seen.repeat_interleave(block_q, 2)[:, :, : q.shape[1]].repeat_interleave(block_k, 3)[..., : k.shape[1]]
    dtype, scale, heads = q.dtype, q.shape[-1] ** -0.5 if scale is None else scale, q.shape[2]
    q, k, v = wide(q, repeat_heads(k, heads), repeat_heads(v, heads))
    some = seen.any(-1, keepdim=True)
    scores = (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).masked_fill(~seen & some, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1) * some, v).to(dtype)


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    topk: float,
    block_q: int = 128,
    block_k: int = 64,
    feature_map: str = "softmax",
    linear: str = "all",
    skip: float = 0.0,
    keep: tuple[int, int] | None = None,
    text_mask: Tensor | None = None,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    scale: float | None = None,
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `linfusion.kernels.sparse_linear_attention`."""
    check_qkv(q, k, v)
    check_routing(topk, block_q, block_k, feature_map, linear, skip)
    check_projection(proj_weight, proj_bias, q.shape[-1])
    batch, keys, heads, dim = q.shape[0], k.shape[1], q.shape[2], q.shape[3]
    start, stop = check_keep(keep, q.shape[1], keys, text_mask, batch)
    dtype, scale, phi = q.dtype, dim**-0.5 if scale is None else scale, named_feature_map(feature_map)
    q, k, v = wide(q, repeat_heads(k, heads), repeat_heads(v, heads))
    kept = torch.zeros(keys, dtype=torch.bool, device=q.device)
    kept[start:stop] = True
    kept_rows = kept if keep is not None else kept.new_zeros(q.shape[1])
    real = torch.ones(batch, keys, dtype=torch.bool, device=q.device)
    if text_mask is not None:
        real[:, start:stop] = text_mask

    seen = torch.ones(batch, heads, q.shape[1], keys, dtype=torch.bool, device=q.device)
    summed = torch.zeros_like(seen)
    rows, columns = (~kept_rows).nonzero().flatten(), (~kept).nonzero().flatten()
    if len(rows) and len(columns):
        classes = block_classes(q[:, rows], k[:, columns], topk, skip, block_q, block_k)
        classes = classes.repeat_interleave(block_q, 2)[:, :, : len(rows)]
        classes = classes.repeat_interleave(block_k, 3)[..., : len(columns)]
        seen[:, :, rows[:, None], columns] = classes == 1
        summed[:, :, rows[:, None], columns] = classes == 0
    if linear == "all":
        summed[:, :, rows] = True
    seen, summed = seen & real[:, None, None], summed & real[:, None, None]

    scores = (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).masked_fill(~seen, float("-inf"))
    sparse = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)
    weights = torch.einsum("bqhd,bkhd->bhqk", phi(q), phi(k)) * summed
    total = weights.sum(dim=-1).transpose(1, 2).unsqueeze(-1)
    rest = torch.einsum("bhqk,bkhd->bqhd", weights, v) / (total + LINEAR_EPS)
    if proj_weight is not None:
        rest = F.linear(rest, *wide(proj_weight, *([] if proj_bias is None else [proj_bias])))
        rest = rest * ~kept_rows[:, None, None]  # kept rows are exact: no linear part, no bias
    return (sparse.to(dtype), rest.to(dtype)) if return_parts else (sparse + rest).to(dtype)
