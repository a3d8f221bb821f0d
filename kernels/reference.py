"""The specification: every op in plain PyTorch, same signature as the public one, in fp32 or wider.

Tests measure against these functions in float64. They favour clearness; `window_attention` and
`sparse_linear_attention` here build the whole score matrix and are no path for real sizes.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    block_counts,
    check_grid,
    check_keep,
    check_projection,
    check_qkv,
    check_radius,
    check_routing,
    repeat_heads,
)
from .rotary import RopeTables, rotate

FEATURE_MAPS = {
    "elu1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "softmax": lambda x: x.softmax(dim=-1),
    "identity": lambda x: x,
}
NORMALIZE = ("divide", "none")
LINEAR_EPS = 1e-5  # added to the sum of the linear weights in sparse_linear_attention, as in the published code


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def named_feature_map(name: str) -> Callable[[Tensor], Tensor]:
    """The feature map called `name`; ValueError listing them all when there is none."""
    if name not in FEATURE_MAPS:
        raise ValueError(f"Unknown feature_map={name!r}. Available: {', '.join(FEATURE_MAPS)}.")
    return FEATURE_MAPS[name]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "elu1",
    normalize: str = "divide",
    eps: float = 1e-6,
    rope: RopeTables | None = None,
) -> Tensor:
    """See `linfusion.kernels.linear_attention`."""
    check_qkv(q, k, v)
    phi = named_feature_map(feature_map)
    if normalize not in NORMALIZE:
        raise ValueError(f"Unknown normalize={normalize!r}. Available: {', '.join(NORMALIZE)}.")
    dtype, heads, n = q.dtype, q.shape[2], k.shape[1]
    q, k, v = _wide(q, repeat_heads(k, heads), repeat_heads(v, heads))
    q, k = phi(q), phi(k)
    rq, rk = (q, k) if rope is None else (rotate(q, rope), rotate(k, rope))
    state = torch.einsum("bshd,bshe->bhde", rk, v) / n
    out = torch.einsum("bshd,bhde->bshe", rq, state)
    if normalize == "divide":
        out = out / (torch.einsum("bshd,bhd->bsh", q, k.mean(dim=1)) + eps).unsqueeze(-1)
    return out.to(dtype)


def window_mask(grid: tuple[int, ...], radius: tuple[float, ...], device: torch.device | None = None) -> Tensor:
    """`[N, N]` bool: which grid tokens see which. Strict: sum over axes of (distance / radius)^2 < 1.

    Multiplied out, so that whole-number radii compare whole numbers: `dy^2 + dx^2 < r^2` for one radius.
    """
    axes = [torch.arange(n, device=device, dtype=torch.float64) for n in grid]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
    weights, bound = window_weights(radius)
    distance = (position[:, None] - position[None]) ** 2
    return distance @ torch.tensor(weights, dtype=torch.float64, device=device) < bound


def window_weights(radius: tuple[float, ...]) -> tuple[list[float], float]:
    """Weights w and bound b such that the window is `sum_i w_i d_i^2 < b`, exact for whole-number radii."""
    if len(set(radius)) == 1:
        return [1.0] * len(radius), float(radius[0]) ** 2
    product = 1.0
    for r in radius:
        product *= float(r) ** 2
    return [product / float(r) ** 2 for r in radius], product


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    radius: float | Sequence[float],
    text: int = 0,
    text_first: bool = True,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    pooled_k: Tensor | None = None,
    pooled_v: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `linfusion.kernels.window_attention`."""
    check_qkv(q, k, v)
    batch, tokens, heads, _ = q.shape
    grid = check_grid(grid, tokens, text, text_mask, batch)
    reach = check_radius(radius, len(grid))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = q.dtype
    if pooled_k is not None and pooled_v is not None:
        k, v = torch.cat((k, pooled_k), dim=1), torch.cat((v, pooled_v), dim=1)
    image = slice(text, tokens) if text_first else slice(0, tokens - text)
    words = slice(0, text) if text_first else slice(tokens - text, tokens)
    allowed = torch.zeros(batch, tokens, k.shape[1], dtype=torch.bool, device=q.device)
    allowed[:, words, :tokens] = True  # text sees all but the pooled copies of what it sees anyway
    allowed[:, image, image] = window_mask(grid, reach, q.device)
    allowed[:, image, words] = True
    allowed[:, image, tokens:] = True
    if text_mask is not None:
        allowed[:, :, words] &= text_mask[:, None]
    q, k, v = _wide(q, repeat_heads(k, heads), repeat_heads(v, heads))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores.masked_fill(~allowed[:, None], float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v).to(dtype)
    return (out, scores.logsumexp(dim=-1).transpose(1, 2)) if return_lse else out


def block_classes(q: Tensor, k: Tensor, topk: float, skip: float, block_q: int, block_k: int) -> Tensor:
    """`[B, H, query blocks, key blocks]` int: 1 chosen, -1 dropped, 0 between (arXiv 2509.24006, eq. 2 and 3).

    Softmax and the scale would not change the order within a row, nor does the mean that k loses, but for rounding.
    """
    q, k = _wide(q, k)
    pooled_q = torch.stack([x.mean(dim=1) for x in q.split(block_q, dim=1)], dim=1)
    pooled_k = torch.stack([x.mean(dim=1) for x in (k - k.mean(dim=1, keepdim=True)).split(block_k, dim=1)], dim=1)
    scores = torch.einsum("bmhd,bnhd->bhmn", pooled_q, pooled_k)
    place = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # of equals the first comes first
    blocks = scores.shape[-1]
    chosen, dropped = block_counts(topk, skip, blocks)
    return (place < chosen).long() - (place >= blocks - dropped).long()


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
    q, k, v = _wide(q, repeat_heads(k, heads), repeat_heads(v, heads))
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
        rest = F.linear(rest, *_wide(proj_weight, *([] if proj_bias is None else [proj_bias])))
        rest = rest * ~kept_rows[:, None, None]  # kept rows are exact: no linear part, no bias
    return (sparse.to(dtype), rest.to(dtype)) if return_parts else (sparse + rest).to(dtype)
