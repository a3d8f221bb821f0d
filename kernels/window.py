"""Window attention on a token grid (CLEAR, arXiv 2412.16112, eq. 4): a disc of image keys, all text keys, pooled keys.

One custom op, so that `torch.compile(fullgraph=True)` sees a single node and a grid that is only known on the device
(FLUX carries it in `img_ids`) is read when the op runs, not when it is traced.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_grid, check_qkv, check_radius, repeat_heads
from .reference import window_weights
from .window_torch import attention_backward, image_backward, image_forward, softmax


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int] | Tensor,
    radius: float | Sequence[float],
    text: int = 0,
    text_first: bool = True,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    pooled_k: Tensor | None = None,
    pooled_v: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which an image query sees its neighbours, the text and the pooled keys; text sees all.

    Args:
        q, k, v: `[B, S, H, D]`, rotated already; S = text + grid, the grid row by row. k and v may have fewer heads.
        grid: `(h, w)` or `(frames, h, w)` in tokens, or an int64 tensor of these on the CPU.
        radius: in tokens. One number is a disc (a ball on a 3-D grid) with the strict rule
            `dy^2 + dx^2 < radius^2`; one number per axis is an ellipsoid. 1 is the token itself.
        text: number of tokens outside the grid; `text_first` says whether they stand before the image.
        text_mask: `[B, text]` bool, which text keys are real; None for all.
        scale: of the scores, default `D ** -0.5`.
        pooled_k, pooled_v: `[B, P, H, D]`, further keys that image queries see and text queries do not.
        return_lse: also return the log-sum-exp of each query's scores, `[B, S, H]` in fp32 or wider.

    Returns:
        `[B, S, H, D]`, and the log-sum-exp when asked for.

    Raises:
        ValueError: shapes that do not belong together, a grid that does not match S, a radius that is not positive.
    """
    check_qkv(q, k, v)
    device_grid, sizes = (grid, []) if isinstance(grid, Tensor) else (None, list(grid))
    if device_grid is None:
        check_grid(sizes, q.shape[1], text, text_mask, q.shape[0])
    reach = check_radius(radius, len(grid))
    if pooled_k is not None and pooled_v is not None:
        check_qkv(q, pooled_k, pooled_v)
        pooled_k, pooled_v = (repeat_heads(x, q.shape[2]) for x in (pooled_k, pooled_v))
    elif pooled_k is not None or pooled_v is not None:
        raise ValueError("pooled_k and pooled_v go together; one of them is missing.")
    heads = q.shape[2]
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out, lse = _window_op(
        q, k, v, pooled_k, pooled_v, text_mask, device_grid, sizes, list(reach), text, text_first, scale, return_lse
    )
    return (out, lse) if return_lse else out


def window_pairs(grid: Sequence[int], radius: float | Sequence[float]) -> int:
    """How many (query, key) pairs of image tokens lie within the window, clipped at the grid's border."""
    grid = tuple(grid)
    reach = check_radius(radius, len(grid))
    weights, bound = window_weights(reach)
    total = torch.zeros((), dtype=torch.float64)
    counts = torch.ones((), dtype=torch.float64)
    for axis, (n, r, weight) in enumerate(zip(grid, reach, weights, strict=True)):
        halo = min(math.ceil(r) - 1, n - 1)
        step = torch.arange(-halo, halo + 1, dtype=torch.float64)
        shape = [1] * axis + [-1]
        total = total.unsqueeze(-1) + (weight * step**2).reshape(shape)
        counts = counts.unsqueeze(-1) * (n - step.abs()).reshape(shape)
    return int(counts[total < bound].sum())


class _Parts:
    """Slices of text and image, and the context (text and pooled) that every image query sees."""

    def __init__(self, q, k, v, pooled_k, pooled_v, text_mask, device_grid, sizes, text, text_first):
        sizes = device_grid.tolist() if device_grid is not None else sizes
        self.grid = check_grid(sizes, q.shape[1], text, text_mask, q.shape[0])
        self.words = slice(0, text) if text_first else slice(q.shape[1] - text, q.shape[1])
        self.image = slice(text, q.shape[1]) if text_first else slice(0, q.shape[1] - text)
        pooled = 0 if pooled_k is None else pooled_k.shape[1]
        self.context_k, self.context_v = k[:, self.words], v[:, self.words]
        if pooled:
            self.context_k = torch.cat((self.context_k, pooled_k), dim=1)
            self.context_v = torch.cat((self.context_v, pooled_v), dim=1)
        self.context_mask = self.all_mask = None
        if text_mask is not None and text:
            self.context_mask = F.pad(text_mask, (0, pooled), value=True)
            self.all_mask = text_mask.new_ones(q.shape[:2])
            self.all_mask[:, self.words] = text_mask
            self.all_mask = self.all_mask[:, None, None]


@torch.library.custom_op("linfusion::window_attention", mutates_args=())
def _window_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor | None,
    pooled_v: Tensor | None,
    text_mask: Tensor | None,
    device_grid: Tensor | None,
    sizes: Sequence[int],
    radius: Sequence[float],
    text: int,
    text_first: bool,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    p = _Parts(q, k, v, pooled_k, pooled_v, text_mask, device_grid, sizes, text, text_first)
    image, image_lse = image_forward(
        q[:, p.image], k[:, p.image], v[:, p.image], p.context_k, p.context_v, p.context_mask,
        p.grid, tuple(radius), scale, return_lse,
    )  # fmt: skip
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3] if return_lse else (0,), dtype=torch.promote_types(q.dtype, torch.float32))
    out[:, p.image] = image
    if return_lse:
        lse[:, p.image] = image_lse
    if text:
        qt, kt, vt = q[:, p.words].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out[:, p.words] = F.scaled_dot_product_attention(qt, kt, vt, attn_mask=p.all_mask, scale=scale).transpose(1, 2)
        if return_lse:
            lse[:, p.words] = softmax(qt, kt, p.all_mask, scale)[1].transpose(1, 2)
    return out, lse


@_window_op.register_fake
def _(q, k, v, pooled_k, pooled_v, text_mask, device_grid, sizes, radius, text, text_first, scale, return_lse):
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:3] if return_lse else (0,), dtype=wide)


@torch.library.custom_op("linfusion::window_attention_backward", mutates_args=())
def _window_backward_op(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_k: Tensor | None,
    pooled_v: Tensor | None,
    text_mask: Tensor | None,
    device_grid: Tensor | None,
    sizes: Sequence[int],
    radius: Sequence[float],
    text: int,
    text_first: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    p = _Parts(q, k, v, pooled_k, pooled_v, text_mask, device_grid, sizes, text, text_first)
    gq, gk, gv, gck, gcv = image_backward(
        q[:, p.image], k[:, p.image], v[:, p.image], p.context_k, p.context_v, p.context_mask,
        p.grid, tuple(radius), scale,
        grad_out[:, p.image], None if grad_lse is None else grad_lse[:, p.image],
    )  # fmt: skip
    dq, dk, dv = (torch.zeros_like(x, dtype=gq.dtype, memory_format=torch.contiguous_format) for x in (q, k, v))
    dq[:, p.image], dk[:, p.image], dv[:, p.image] = gq, gk, gv
    dk[:, p.words], dv[:, p.words] = gck[:, :text], gcv[:, :text]
    if text:
        grads = attention_backward(
            q[:, p.words].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), p.all_mask, scale,
            grad_out[:, p.words].transpose(1, 2),
            None if grad_lse is None else grad_lse[:, p.words].transpose(1, 2),
        )  # fmt: skip
        tq, tk, tv = (g.transpose(1, 2) for g in grads)
        dq[:, p.words] = tq
        dk += tk
        dv += tv
    pooled = (g[:, text:].contiguous() for g in (gck, gcv))
    dq, dk, dv, dpk, dpv = (g.to(q.dtype) for g in (dq, dk, dv, *pooled))
    return dq, dk, dv, dpk, dpv


@_window_backward_op.register_fake
def _(grad_out, grad_lse, q, k, v, pooled_k, pooled_v, text_mask, device_grid, sizes, radius, text, text_first, scale):
    pooled = 0 if pooled_k is None else pooled_k.shape[1]
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    extra = [q.new_empty((q.shape[0], pooled, *q.shape[2:])) for _ in range(2)]
    return (*like, *extra)


def _setup(ctx, inputs, output):
    *tensors, ctx.sizes, ctx.radius, ctx.text, ctx.text_first, ctx.scale, ctx.return_lse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_out, grad_lse):
    tensors = ctx.saved_tensors
    grads = _window_backward_op(
        grad_out, grad_lse if ctx.return_lse else None, *tensors,
        ctx.sizes, ctx.radius, ctx.text, ctx.text_first, ctx.scale,
    )  # fmt: skip
    dq, dk, dv, dpk, dpv = grads
    pooled = (None, None) if tensors[3] is None else (dpk, dpv)
    return dq, dk, dv, *pooled, *(None,) * 8


_window_op.register_autograd(_backward, setup_context=_setup)
