"""Window attention in plain PyTorch, tile by tile: memory grows with the tokens, not with their square.

Each tile of queries gathers the box of keys that its windows can reach, plus the context (text and pooled keys) that
everyone sees, and masks inside that box. Any grid rank; every query's keys lie in one chunk, so softmax needs no merge.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import repeat_heads
from .reference import window_weights

SCORES_PER_CHUNK = 1 << 22  # scores of one head held at a time: 16 MiB in fp32
CACHED_MASK = 1 << 22


class Window(NamedTuple):
    """What is seen: see `window_attention`; `grid` and `radius` along each axis."""

    grid: tuple[int, ...]
    radius: tuple[float, ...]
    box: bool
    text: int
    text_first: bool
    text_sees_text: bool
    scale: float


class Plan(NamedTuple):
    """Which tokens each tile reads. Index tensors are int64 on the device of the call."""

    queries: Tensor  # [tiles, Q] token of each query slot; slots past the border repeat the last token
    keys: Tensor  # [tiles, K]
    slot: Tensor  # [N] where each token's result stands in the flattened [tiles * Q]
    distance: tuple[Tensor, ...]  # per axis [axis tiles, tile, span]: weighted squared distances
    shape: tuple[int, ...]  # axis tiles
    bound: float
    box: bool


@lru_cache(maxsize=16)
def plan(grid: tuple[int, ...], radius: tuple[float, ...], box: bool, device: torch.device) -> Plan:
    """The tiles of a grid. Cached by value: grids with equally many tokens never share an entry."""
    weights, bound = window_weights(radius)
    wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64; exact to 4,096 tokens a side
    tiles, q_axes, k_axes, distance = [], [], [], []
    with torch.inference_mode(False):  # the cache outlives an inference-mode caller
        for n, r, weight in zip(grid, radius, weights, strict=True):
            halo = min(math.ceil(r) - 1, n)
            tile = n if n <= 4 * halo or n <= 16 else max(8, min(halo, 16))
            span = min(n, tile + 2 * halo)
            start = torch.arange(0, n, tile, device=device)
            q = (start[:, None] + torch.arange(tile, device=device)).clamp(max=n - 1)
            k = (start - halo).clamp(0, n - span)[:, None] + torch.arange(span, device=device)
            distance.append((q[:, :, None] - k[:, None, :]).to(wide) ** 2 * weight)
            tiles.append(len(start))
            q_axes.append(q)
            k_axes.append(k)
        queries, keys = _flat_tokens(q_axes, grid), _flat_tokens(k_axes, grid)
        slot = torch.empty(math.prod(grid), dtype=torch.long, device=device)
        slot[queries.flatten()] = torch.arange(queries.numel(), device=device)
    return Plan(queries, keys, slot, tuple(distance), tuple(tiles), bound, box)


def _flat_tokens(axes: list[Tensor], grid: tuple[int, ...]) -> Tensor:
    """Coordinates per axis `[axis tiles, length]` to token numbers `[tiles, product of lengths]`."""
    rank, total = len(grid), torch.zeros((), dtype=torch.long, device=axes[0].device)
    for a, coordinate in enumerate(axes):
        shape = [1] * (2 * rank)
        shape[a], shape[rank + a] = coordinate.shape
        total = total + coordinate.reshape(shape) * math.prod(grid[a + 1 :])
    return total.flatten(rank).flatten(0, rank - 1)


def _mask(p: Plan, first: int, last: int) -> Tensor:
    """`[last - first, Q, K]` bool for a run of tiles."""
    rank, total = len(p.shape), p.distance[0].new_zeros(())
    index = torch.unravel_index(torch.arange(first, last, device=p.slot.device), p.shape)
    for a, i in enumerate(index):
        d = p.distance[a][i]
        shape = [d.shape[0]] + [1] * (2 * rank)
        shape[1 + a], shape[1 + rank + a] = d.shape[1:]
        total = torch.maximum(total, d.reshape(shape)) if p.box else total + d.reshape(shape)
    return (total < p.bound).flatten(1 + rank).flatten(1, rank)


@lru_cache(maxsize=16)
def _whole_mask(grid: tuple[int, ...], radius: tuple[float, ...], box: bool, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        p = plan(grid, radius, box, device)
        return _mask(p, 0, len(p.queries))


def _chunks(p: Plan, w: Window, context: int, batch: int):
    """Runs of tiles with their masks, such that a chunk's scores per head stay within the budget."""
    count, per_tile = len(p.queries), p.queries.shape[1] * (p.keys.shape[1] + context) * batch
    step = max(1, SCORES_PER_CHUNK // per_tile)
    small = count * p.queries.shape[1] * p.keys.shape[1] <= CACHED_MASK
    for first in range(0, count, step):
        last = min(count, first + step)
        yield (
            first,
            last,
            _whole_mask(w.grid, w.radius, w.box, p.slot.device)[first:last] if small else _mask(p, first, last),
        )


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """`x` `[B, N, H, D]` at `index` `[tiles, L]` as `[B * tiles, H, L, D]`."""
    picked = x.index_select(1, index.flatten()).unflatten(1, tuple(index.shape))
    return picked.flatten(0, 1).transpose(1, 2)


def _with_context(x: Tensor, index: Tensor, context: Tensor) -> Tensor:
    keys = _gather(x, index)
    if context.shape[1] == 0:
        return keys
    shared = context.transpose(1, 2)[:, None].expand(-1, len(index), -1, -1, -1).flatten(0, 1)
    return torch.cat((keys, shared), dim=2)


def _full_mask(window: Tensor, context: int, context_mask: Tensor | None, batch: int) -> Tensor:
    """`[B * tiles, 1, Q, K + context]` (batch 1 when all samples agree and there is one)."""
    window = window[None].expand(batch, *window.shape)
    if context:
        shape = (*window.shape[:-1], context)
        seen = window.new_ones(()).expand(shape) if context_mask is None else context_mask[:, None, None].expand(shape)
        window = torch.cat((window, seen), dim=-1)
    return window.flatten(0, 1).unsqueeze(1)


def softmax(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Probabilities and log-sum-exp, in fp32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    return (scores - lse.unsqueeze(-1)).exp(), lse


def image_forward(q, k, v, context_k, context_v, context_mask, w: Window, return_lse: bool):
    """Image queries `[B, N, H, D]`: out `[B, N, H, D]`, log-sum-exp `[B, N, H]` or None."""
    p, batch, context = plan(w.grid, w.radius, w.box, q.device), q.shape[0], context_k.shape[1]
    outs, lses = [], []
    for first, last, window in _chunks(p, w, context, batch):
        mask = _full_mask(window, context, context_mask, batch)
        qt = _gather(q, p.queries[first:last])
        kt = _with_context(k, p.keys[first:last], context_k)
        vt = _with_context(v, p.keys[first:last], context_v)
        if return_lse:
            probs, lse = softmax(qt, kt, mask, w.scale)
            outs.append((probs.to(v.dtype) @ vt).transpose(1, 2).unflatten(0, (batch, -1)))
            lses.append(lse.transpose(1, 2).unflatten(0, (batch, -1)))
        else:
            out = F.scaled_dot_product_attention(qt, kt, vt, attn_mask=mask, scale=w.scale)
            outs.append(out.transpose(1, 2).unflatten(0, (batch, -1)))
    out = torch.cat(outs, dim=1).flatten(1, 2).index_select(1, p.slot)
    return out, torch.cat(lses, dim=1).flatten(1, 2).index_select(1, p.slot) if return_lse else None


def attention_backward(q, k, v, mask, scale, grad_out, grad_lse):
    """Gradients of softmax attention on `[..., L, D]` tensors, by recomputing the probabilities."""
    probs, _ = softmax(q, k, mask, scale)
    wide = probs.dtype
    grad_out = grad_out.to(wide)
    grad_v = probs.transpose(-1, -2) @ grad_out
    grad_p = grad_out @ v.to(wide).transpose(-1, -2)
    inner = grad_p - (grad_p * probs).sum(dim=-1, keepdim=True)
    if grad_lse is not None:
        inner = inner + grad_lse.to(wide).unsqueeze(-1)
    grad_s = probs * inner * scale
    return grad_s @ k.to(wide), grad_s.transpose(-1, -2) @ q.to(wide), grad_v


def image_backward(q, k, v, context_k, context_v, context_mask, w: Window, grad_out, grad_lse):
    """Gradients of `image_forward`: q, k, v, context_k, context_v, all in fp32 or wider."""
    p, batch, context = plan(w.grid, w.radius, w.box, q.device), q.shape[0], context_k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    grads = [torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (q, k, v)]
    grad_ck, grad_cv = (torch.zeros_like(x, dtype=wide) for x in (context_k, context_v))
    # a slot past the border repeats a token; only the slot that was read hands its gradient back
    read = torch.zeros(p.queries.numel(), dtype=torch.bool, device=q.device)
    read[p.slot] = True
    read = read.unflatten(0, tuple(p.queries.shape))
    for first, last, window in _chunks(p, w, context, batch):
        mask = _full_mask(window, context, context_mask, batch)
        qi, ki = p.queries[first:last], p.keys[first:last]
        keep = read[first:last, None, :, None].repeat(batch, 1, 1, 1)
        g_out = _gather(grad_out, qi) * keep
        g_lse = None
        if grad_lse is not None:
            g_lse = (_gather(grad_lse.unsqueeze(-1), qi) * keep).squeeze(-1)
        kt, vt = _with_context(k, ki, context_k), _with_context(v, ki, context_v)
        gq, gk, gv = attention_backward(_gather(q, qi), kt, vt, mask, w.scale, g_out, g_lse)
        for grad, part, index in zip(
            grads, (gq, gk[:, :, : ki.shape[1]], gv[:, :, : ki.shape[1]]), (qi, ki, ki), strict=True
        ):
            grad.index_add_(1, index.flatten(), part.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2))
        if context:
            grad_ck += gk[:, :, ki.shape[1] :].transpose(1, 2).unflatten(0, (batch, -1)).sum(dim=1)
            grad_cv += gv[:, :, ki.shape[1] :].transpose(1, 2).unflatten(0, (batch, -1)).sum(dim=1)
    return *grads, grad_ck, grad_cv


class _Parts:
    """Slices of text and image, the context (text and pooled) that every image query sees, and what text sees."""

    def __init__(self, q, k, v, pooled_k, pooled_v, text_mask, w: Window):
        heads, tokens = q.shape[2], q.shape[1]
        self.words = slice(0, w.text) if w.text_first else slice(tokens - w.text, tokens)
        self.image = slice(w.text, tokens) if w.text_first else slice(0, tokens - w.text)
        self.k, self.v = repeat_heads(k, heads), repeat_heads(v, heads)
        self.context_k, self.context_v = self.k[:, self.words], self.v[:, self.words]
        pooled = 0 if pooled_k is None else pooled_k.shape[1]
        if pooled:
            self.context_k = torch.cat((self.context_k, repeat_heads(pooled_k, heads)), dim=1)
            self.context_v = torch.cat((self.context_v, repeat_heads(pooled_v, heads)), dim=1)
        self.seen = slice(None) if w.text_sees_text else self.image
        self.context_mask = self.text_mask = None
        if text_mask is not None and w.text:
            self.context_mask = F.pad(text_mask, (0, pooled), value=True)
            if w.text_sees_text:
                real = text_mask.new_ones(q.shape[:2])
                real[:, self.words] = text_mask
                self.text_mask = real[:, None, None]


def forward(q, k, v, pooled_k, pooled_v, text_mask, w: Window, keep_lse: bool) -> tuple[Tensor, Tensor]:
    """Output `[B, S, H, D]`, and log-sum-exps `[B, H, S]`, empty unless kept."""
    p = _Parts(q, k, v, pooled_k, pooled_v, text_mask, w)
    image, image_lse = image_forward(
        q[:, p.image], p.k[:, p.image], p.v[:, p.image], p.context_k, p.context_v, p.context_mask, w, keep_lse
    )
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]) if keep_lse else (0,), dtype=wide)
    out[:, p.image] = image
    if keep_lse:
        lse[:, :, p.image] = image_lse.transpose(1, 2)
    if w.text:
        qt, kt, vt = (x.transpose(1, 2) for x in (q[:, p.words], p.k[:, p.seen], p.v[:, p.seen]))
        words = F.scaled_dot_product_attention(qt, kt, vt, attn_mask=p.text_mask, scale=w.scale)
        out[:, p.words] = words.transpose(1, 2)
        if keep_lse:
            lse[:, :, p.words] = softmax(qt, kt, p.text_mask, w.scale)[1]
    return out, lse


def backward(grad, grad_lse, q, k, v, pooled_k, pooled_v, text_mask, w: Window) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and the pooled keys and values, of each query head, in fp32 or wider."""
    p = _Parts(q, k, v, pooled_k, pooled_v, text_mask, w)
    gq, gk, gv, gck, gcv = image_backward(
        q[:, p.image], p.k[:, p.image], p.v[:, p.image], p.context_k, p.context_v, p.context_mask, w,
        grad[:, p.image], None if grad_lse is None else grad_lse[:, :, p.image].transpose(1, 2),
    )  # fmt: skip
    dq, dk, dv = (torch.zeros_like(x, dtype=gq.dtype, memory_format=torch.contiguous_format) for x in (q, p.k, p.v))
    dq[:, p.image], dk[:, p.image], dv[:, p.image] = gq, gk, gv
    dk[:, p.words], dv[:, p.words] = gck[:, : w.text], gcv[:, : w.text]
    if w.text:
        grads = attention_backward(  # type: ignore[call-arg]
            *(x.transpose(1, 2) for x in (q[:, p.words], p.k[:, p.seen], p.v[:, p.seen])), p.text_mask, w.scale,
            grad[:, p.words].transpose(1, 2), None if grad_lse is None else grad_lse[:, :, p.words],
        )  # fmt: skip
        tq, tk, tv = (g.transpose(1, 2) for g in grads)
        dq[:, p.words] = tq
        dk[:, p.seen] += tk
        dv[:, p.seen] += tv
    return dq, dk, dv, gck[:, w.text :], gcv[:, w.text :]
