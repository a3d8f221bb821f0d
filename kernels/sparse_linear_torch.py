"""Block-sparse attention and its linear remainder in plain PyTorch, a run of query blocks at a time.

Nothing here grows with the square of the tokens, and no D x D state is kept per block: a chunk of query blocks routes
itself, gathers the key blocks that it chose, and sums the states of the others while it lasts. The remainder is summed
up rather than subtracted from the total, which would cancel where the chosen blocks carry most of the weight.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import block_counts
from .reference_sparse import LINEAR_EPS
from .window_torch import attention_backward

CHUNK = 1 << 22
"""Elements of the largest tensor of a chunk: 16 MiB in fp32."""


class Routing(NamedTuple):
    """How queries choose key blocks: shares of the key blocks, and tokens per block."""

    topk: float
    skip: float
    block_q: int
    block_k: int


class Chunk(NamedTuple):
    """Some query blocks of some (sample, head) pairs: `g` pairs, `c` query blocks each."""

    pairs: slice
    rows: slice
    gather: Tensor  # [g * c * chosen] which key blocks, numbered through the g pairs
    mask: Tensor | None  # [g * c, 1, keys] bool, None where every key is real
    rest: Tensor  # [g, c, key blocks] 1 where the linear part sums the block, 0 elsewhere


class Problem:
    """q, k, v in blocks, `[B * H, blocks, size, D]`, and the plan of chunks; forward and backward walk the same.

    Args:
        q, k, v: `[B, N, H, D]`, what is cut into blocks.
        context_k, context_v: `[B, T, H, D]`, further keys that every query sees; `context_mask` `[B, T]` bool or None.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context_k: Tensor,
        context_v: Tensor,
        context_mask: Tensor | None,
        routing: Routing,
    ) -> None:
        self.routing, self.batch, heads = routing, q.shape[0], q.shape[2]
        self.queries, self.keys = q.shape[1], k.shape[1]
        self.q, self.k, self.v = (
            to_blocks(x, size) for x, size in ((q, routing.block_q), (k, routing.block_k), (v, routing.block_k))
        )
        self.context_k, self.context_v = (x.transpose(1, 2).flatten(0, 1) for x in (context_k, context_v))
        self.context_mask = None if context_mask is None else context_mask.repeat_interleave(heads, dim=0)
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.pooled_q = block_means(self.q, self.queries, self.wide)
        # what all keys share cannot change the order within a row, only drown it in rounding
        centred = k - k.mean(dim=1, keepdim=True, dtype=self.wide)
        self.pooled_k = block_means(to_blocks(centred, routing.block_k), self.keys, self.wide)
        self.chosen, self.dropped = block_counts(routing.topk, routing.skip, self.k.shape[1])

    def chunks(self) -> Iterator[Chunk]:
        """All query blocks once; whole (sample, head) pairs together where they fit."""
        pairs, blocks, block_q, dim = self.q.shape
        key_blocks = self.k.shape[1]
        keys = self.chosen * self.routing.block_k + self.context_k.shape[1]
        step = max(1, CHUNK // max(block_q * keys, keys * dim, dim * dim, key_blocks))
        height, width = (max(1, step // blocks), blocks) if step >= blocks else (1, step)
        for pair in range(0, pairs, height):
            for row in range(0, blocks, width):
                yield self._chunk(slice(pair, min(pair + height, pairs)), slice(row, min(row + width, blocks)))

    def _chunk(self, pairs: slice, rows: slice) -> Chunk:
        scores = self.pooled_q[pairs, rows] @ self.pooled_k[pairs].transpose(-1, -2)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        chosen, dropped = order[..., : self.chosen], order[..., order.shape[-1] - self.dropped :]
        rest = torch.ones_like(scores).scatter(-1, chosen, 0).scatter(-1, dropped, 0)
        g, c, blocks = scores.shape
        first = torch.arange(g, device=order.device)[:, None, None] * blocks
        return Chunk(pairs, rows, (chosen + first).flatten(), self._mask(pairs, chosen), rest)

    def _mask(self, pairs: slice, chosen: Tensor) -> Tensor | None:
        size, context = self.routing.block_k, self.context_k.shape[1]
        if self.keys % size == 0 and self.context_mask is None:
            return None
        token = chosen[..., None] * size + torch.arange(size, device=chosen.device)
        real = (token < self.keys).flatten(2)
        if self.context_mask is None:
            shared = real.new_ones(()).expand(*real.shape[:2], context)
        else:
            shared = self.context_mask[pairs, None].expand(*real.shape[:2], context)
        return torch.cat((real, shared), dim=-1).flatten(0, 1)[:, None]

    def take(self, blocks: Tensor, context: Tensor, chunk: Chunk) -> Tensor:
        """Chosen blocks, then the context: `[g * c, keys, D]`."""
        g, c = chunk.rest.shape[:2]
        keys = blocks[chunk.pairs].flatten(0, 1).index_select(0, chunk.gather)
        keys = keys.view(g * c, -1, keys.shape[-1])
        if context.shape[1] == 0:
            return keys
        shared = context[chunk.pairs, None].expand(-1, c, -1, -1).flatten(0, 1)
        return torch.cat((keys, shared), dim=1)

    def queries_of(self, blocks: Tensor, chunk: Chunk) -> Tensor:
        """`[g * c, block_q, D]`."""
        return blocks[chunk.pairs, chunk.rows].flatten(0, 1)

    def key_steps(self, chunk: Chunk) -> Iterator[slice]:
        """Runs of key blocks whose states fit into a chunk's budget."""
        dim, blocks = self.k.shape[-1], self.k.shape[1]
        step = max(1, CHUNK // (chunk.rest.shape[0] * max(dim, self.routing.block_k) * dim))
        for first in range(0, blocks, step):
            yield slice(first, min(first + step, blocks))


def to_blocks(x: Tensor, size: int) -> Tensor:
    """`[B, N, H, D]` to `[B * H, blocks, size, D]`, zeros past the end; contiguous, as whole blocks are gathered."""
    x = F.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % size))
    return x.contiguous().flatten(0, 1).unflatten(1, (-1, size))


def from_blocks(x: Tensor, batch: int, tokens: int) -> Tensor:
    """The inverse of `to_blocks`: `[B, N, H, D]`, contiguous."""
    return x.flatten(1, 2)[:, :tokens].unflatten(0, (batch, -1)).transpose(1, 2).contiguous()


def block_means(x: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """`[B * H, blocks, D]`; the last block is divided by what it really holds."""
    blocks, size = x.shape[1:3]
    held = (tokens - size * torch.arange(blocks, device=x.device)).clamp(max=size)
    return x.sum(dim=2, dtype=dtype) / held[:, None]


def forward(problem: Problem, phi_q: Tensor | None, phi_k: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    """Sparse part `[B, N, H, D]`, and the linear part when features `[B, N, H, D]` are given."""
    p = problem
    sparse = torch.empty_like(p.q)
    features = _feature_blocks(p, phi_q, phi_k)
    linear = None if features is None else torch.empty_like(p.q, dtype=p.wide)
    for chunk in p.chunks():
        shape = (*chunk.rest.shape[:2], *p.q.shape[2:])
        k, v = p.take(p.k, p.context_k, chunk), p.take(p.v, p.context_v, chunk)
        mask = None if chunk.mask is None else chunk.mask[:, None]
        q = p.queries_of(p.q, chunk)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask, scale=scale)
        sparse[chunk.pairs, chunk.rows] = out.view(shape)
        if features is not None and linear is not None:
            state, norm = _states(p, features[1], chunk)
            fq = features[0][chunk.pairs, chunk.rows]
            linear[chunk.pairs, chunk.rows] = (fq @ state) / (fq @ norm[..., None] + LINEAR_EPS)
    out_linear = None if linear is None else from_blocks(linear, p.batch, p.queries)
    return from_blocks(sparse, p.batch, p.queries), out_linear


def _feature_blocks(p: Problem, phi_q: Tensor | None, phi_k: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if phi_q is None or phi_k is None:
        return None
    return to_blocks(phi_q, p.routing.block_q), to_blocks(phi_k, p.routing.block_k)


def _states(p: Problem, fk: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Sums over each query block's remaining key blocks: `phi(k)^T v` `[g, c, D, D]`, `phi(k)` `[g, c, D]` (eq. 5)."""
    dim = fk.shape[-1]
    state = chunk.rest.new_zeros(*chunk.rest.shape[:2], dim * dim)
    norm = chunk.rest @ fk[chunk.pairs].sum(dim=2)
    for some in p.key_steps(chunk):
        of_block = fk[chunk.pairs, some].transpose(-1, -2) @ p.v[chunk.pairs, some].to(p.wide)
        state += chunk.rest[..., some] @ of_block.flatten(2)
    return state.unflatten(-1, (dim, dim)), norm


def backward(
    problem: Problem,
    phi_q: Tensor | None,
    phi_k: Tensor | None,
    scale: float,
    grad_sparse: Tensor,
    grad_linear: Tensor | None,
) -> dict[str, Tensor]:
    """Gradients by the names of the inputs, in fp32 or wider; everything is computed again from the inputs."""
    p, dim = problem, problem.q.shape[-1]
    size = p.routing.block_k
    gq, gk, gv = (torch.zeros_like(x, dtype=p.wide) for x in (p.q, p.k, p.v))
    g_ck, g_cv = (torch.zeros_like(x, dtype=p.wide) for x in (p.context_k, p.context_v))
    grad_sparse = to_blocks(grad_sparse, p.routing.block_q)
    features = _feature_blocks(p, phi_q, phi_k)
    if features is not None and grad_linear is not None:
        g_fq, g_fk = (torch.zeros_like(x) for x in features)
        grad_linear = to_blocks(grad_linear, p.routing.block_q).to(p.wide)
    for chunk in p.chunks():
        g, c = chunk.rest.shape[:2]
        k, v = p.take(p.k, p.context_k, chunk), p.take(p.v, p.context_v, chunk)
        q, grad = p.queries_of(p.q, chunk), p.queries_of(grad_sparse, chunk)
        dq, dk, dv = attention_backward(q, k, v, chunk.mask, scale, grad, None)
        gq[chunk.pairs, chunk.rows] = dq.view(g, c, *dq.shape[1:])
        for total, shared, part in ((gk, g_ck, dk), (gv, g_cv, dv)):
            blocks = part[:, : p.chosen * size].reshape(-1, size, dim)
            total[chunk.pairs].view(-1, size, dim).index_add_(0, chunk.gather, blocks)
            shared[chunk.pairs] += part[:, p.chosen * size :].unflatten(0, (g, c)).sum(dim=1)
        if features is not None and grad_linear is not None:
            _linear_backward(p, features, chunk, grad_linear[chunk.pairs, chunk.rows], g_fq, g_fk, gv)
    grads = {
        "q": from_blocks(gq, p.batch, p.queries),
        "k": from_blocks(gk, p.batch, p.keys),
        "v": from_blocks(gv, p.batch, p.keys),
        "context_k": from_blocks(g_ck[:, None], p.batch, g_ck.shape[1]),
        "context_v": from_blocks(g_cv[:, None], p.batch, g_cv.shape[1]),
    }
    if features is not None and grad_linear is not None:
        grads["phi_q"] = from_blocks(g_fq, p.batch, p.queries)
        grads["phi_k"] = from_blocks(g_fk, p.batch, p.keys)
    return grads


def _linear_backward(
    p: Problem, features: tuple[Tensor, Tensor], chunk: Chunk, grad: Tensor, g_fq: Tensor, g_fk: Tensor, gv: Tensor
) -> None:
    """Adds a chunk's share to the gradients of features and values (eq. 7 and 8, with the denominator's epsilon)."""
    dim = grad.shape[-1]
    fq, fk = features[0][chunk.pairs, chunk.rows], features[1]
    state, norm = _states(p, fk, chunk)
    total = fq @ norm[..., None] + LINEAR_EPS
    g_top = grad / total
    g_total = -(g_top * ((fq @ state) / total)).sum(dim=-1, keepdim=True)
    g_fq[chunk.pairs, chunk.rows] = g_top @ state.transpose(-1, -2) + g_total * norm[..., None, :]
    g_state = (fq.transpose(-1, -2) @ g_top).flatten(2)
    g_norm = (fq * g_total).sum(dim=2)
    for some in p.key_steps(chunk):
        back = chunk.rest[..., some].transpose(-1, -2)
        of_block = (back @ g_state).unflatten(-1, (dim, dim))
        v = p.v[chunk.pairs, some].to(p.wide)
        g_fk[chunk.pairs, some] += v @ of_block.transpose(-1, -2) + (back @ g_norm)[:, :, None]
        gv[chunk.pairs, some] += fk[chunk.pairs, some] @ of_block
