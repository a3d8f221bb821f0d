"""Sparse-linear attention (SLA, arXiv 2509.24006): softmax over chosen key blocks, linear attention over the rest.

On a GPU all of it is one operator of Triton kernels (`sla_launch`). Elsewhere what is cut into blocks is one custom op,
so that `torch.compile(fullgraph=True)` sees a single node; feature maps, kept tokens and the projection are plain
PyTorch around it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import sla_launch
from . import sparse_linear_torch as path
from .backend import why_not_triton
from .block_sparse import lacking
from .checks import (
    block_counts,
    check_head_dim_of_values,
    check_keep,
    check_projection,
    check_qkv,
    check_routing,
    repeat_heads,
)
from .features import named_feature_map
from .reference_sparse import LINEAR_EPS
from .rest_launch import MOST_DIM


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
    """`softmax over the chosen key blocks + Proj(linear attention)` (arXiv 2509.24006, eq. 2 to 6).

    Blocks are runs of tokens. A query block chooses the key blocks with the highest product of block means, those of k
    less k's mean over all tokens, in fp32; no gradient flows through the choice. Kept tokens stand outside of the
    blocks: every query sees them, and as queries they see everything, by exact softmax and with no linear part.

    Args:
        q, k, v: `[B, S, H, D]`, rotated already. k and v may have fewer heads, and without `keep` another length.
        topk: share of the key blocks that a query block sees, in (0, 1]; rounded down to blocks, at least one.
            1 is exact softmax attention.
        block_q, block_k: tokens per block of queries and of keys; the last block may be shorter.
        feature_map: phi of the linear part, one of "softmax" (over D), "elu1", "relu".
        linear: what the linear part sums over: "all" tokens (the published code), "complement" (all but the chosen
            blocks and the kept tokens), "marginal" (the same less the lowest blocks, as in the paper). An empty sum
            is 0: 1e-5 is added to the sum of its weights.
        skip: share of the key blocks, those with the lowest scores, that "marginal" drops; rounded down.
        keep: `(start, stop)` of a run of tokens at either end (text); None for none.
        text_mask: `[B, stop - start]` bool, which kept keys are real; None for all.
        proj_weight, proj_bias: `[D, D]` and `[D]`, shared by the heads, `linear @ weight^T + bias`; None adds the
            linear part as it is.
        scale: of the scores, default `D ** -0.5`.
        return_parts: return the sparse part and the projected linear part, which sum to the output.

    Returns:
        `[B, S, H, D]`, or two of them.

    Raises:
        ValueError: shapes that do not belong together, or a setting that is out of its range.
    """
    check_qkv(q, k, v)
    check_head_dim_of_values(q, v)
    check_routing(topk, block_q, block_k, feature_map, linear, skip)
    start, stop = check_keep(keep, q.shape[1], k.shape[1], text_mask, q.shape[0])
    check_projection(proj_weight, proj_bias, q.shape[-1])
    proj_bias = None if proj_bias is None else proj_bias.contiguous()  # the kernels read it without a stride
    heads, scale = q.shape[2], q.shape[-1] ** -0.5 if scale is None else float(scale)
    sparse: Tensor
    if topk < 1 and stop - start < k.shape[1]:
        reason = _lacking(q, k, block_q, block_k, linear, scale)
        if why_not_triton("sparse_linear_attention", q.shape[-1], q, k, v, lacking=reason) is None:
            settings = (float(topk), float(skip), block_q, block_k, feature_map, linear, scale, start, stop)
            sparse, summed, *_ = _operator(q, k, v, proj_weight, proj_bias)(
                q, k, v, text_mask, proj_weight, proj_bias, *settings, return_parts
            )
            if not return_parts:
                return sparse
            nothing = None if start == stop else torch.zeros_like(q[:, start:stop])
            return sparse, _join(nothing, summed, start == 0)
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    phi = named_feature_map(feature_map)
    kept, rest = slice(start, stop), slice(stop, None) if start == 0 else slice(0, start)
    real = None
    if text_mask is not None:
        real = text_mask.new_ones(k.shape[:2])
        real[:, kept] = text_mask

    rows = q[:, rest]
    if topk == 1 or stop - start == k.shape[1]:
        sparse, summed = _exact(rows, k, v, real, scale), torch.zeros_like(rows)
    else:
        features: tuple[Tensor | None, Tensor | None] = (None, None)
        if linear != "all":
            features = phi(_wide(rows)), phi(_wide(k[:, rest]))
        sparse, summed = _blocks_op(
            rows, k[:, rest], v[:, rest], k[:, kept], v[:, kept], text_mask, *features,
            float(topk), float(skip), block_q, block_k, scale,
        )  # fmt: skip
    if linear == "all":
        summed = _linear(phi(_wide(rows)), phi(_wide(k)), v, real)
    if proj_weight is not None:
        summed = F.linear(summed, proj_weight.to(summed.dtype), None if proj_bias is None else proj_bias.to(q.dtype))

    exact = None if start == stop else _exact(q[:, kept], k, v, real, scale)
    if return_parts:
        nothing = None if exact is None else torch.zeros_like(exact)
        return _join(exact, sparse, start == 0), _join(nothing, summed, start == 0)
    return _join(exact, sparse + summed, start == 0)


def _lacking(q: Tensor, k: Tensor, block_q: int, block_k: int, linear: str, scale: float) -> str | None:
    """What the kernels do not know of this call."""
    most = MOST_DIM if q.dtype != torch.float32 else MOST_DIM // 2
    if linear != "all" and q.shape[-1] > most:
        return f"linear={linear!r} needs more registers at {q.dtype}, head dim {q.shape[-1]}, than there are"
    return lacking(q, k, block_q, block_k, scale)


def _operator(*inputs: Tensor | None) -> Callable[..., tuple[Tensor, ...]]:
    """The Triton kernels as an operator where torch.compile traces it, with or without gradients elsewhere."""
    if torch.compiler.is_compiling():
        return sla_launch.sla_op
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return sla_launch.forward_with_gradients if wanted else sla_launch.forward


def sparse_linear_pairs(
    tokens: int, dim: int, *, topk: float, block_q: int, block_k: int, linear: str, skip: float = 0.0
) -> float:
    """Work among `tokens` that stand in blocks, in units of one query-key pair (two dot products of length `dim`).

    Chosen pairs, the routing scores, and the linear part with its projection; kept tokens come on top.
    """
    queries, keys = -(-tokens // block_q), -(-tokens // block_k)
    chosen = block_counts(topk, skip, keys)[0]
    if topk == 1:
        routing = between = 0.0
    else:
        routing = queries * keys / 2
        between = 0.0 if linear == "all" else queries * keys * dim / 2  # which block's state goes to which queries
    return tokens * min(tokens, chosen * block_k) + routing + tokens * dim + between + tokens * dim / 2


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _exact(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if real is None else real[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _linear(phi_q: Tensor, phi_k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    """Linear attention to all real keys; features in fp32 or wider, the result in v's dtype."""
    if real is not None:
        phi_k = phi_k * real[..., None, None]
    with torch.autocast(v.device.type, enabled=False):  # the sums of long sequences leave fp16's range
        state = torch.einsum("bshd,bshe->bhde", phi_k, _wide(v))
        total = torch.einsum("bshd,bhd->bsh", phi_q, phi_k.sum(dim=1)) + LINEAR_EPS
        return (torch.einsum("bshd,bhde->bshe", phi_q, state) / total.unsqueeze(-1)).to(v.dtype)


def _join(kept: Tensor | None, rest: Tensor, kept_first: bool) -> Tensor:
    if kept is None:
        return rest
    return torch.cat((kept, rest) if kept_first else (rest, kept), dim=1)


@torch.library.custom_op("linfusion::sparse_linear_attention", mutates_args=())
def _blocks_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    context_mask: Tensor | None,
    phi_q: Tensor | None,
    phi_k: Tensor | None,
    topk: float,
    skip: float,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    # an op's inside is still under autocast, which would take the routing scores and the states down to 16 bits
    with torch.autocast(q.device.type, enabled=False):
        routing = path.Routing(topk, skip, block_q, block_k)
        problem = path.Problem(q, k, v, context_k, context_v, context_mask, routing)
        sparse, linear = path.forward(problem, phi_q, phi_k, scale)
    return sparse, q.new_empty(0) if linear is None else linear.to(q.dtype)


@_blocks_op.register_fake
def _(q, k, v, context_k, context_v, context_mask, phi_q, phi_k, topk, skip, block_q, block_k, scale):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(0) if phi_q is None else torch.empty_like(out)


@torch.library.custom_op("linfusion::sparse_linear_attention_backward", mutates_args=())
def _blocks_backward_op(
    grad_sparse: Tensor,
    grad_linear: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    context_mask: Tensor | None,
    phi_q: Tensor | None,
    phi_k: Tensor | None,
    topk: float,
    skip: float,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        routing = path.Routing(topk, skip, block_q, block_k)
        problem = path.Problem(q, k, v, context_k, context_v, context_mask, routing)
        grads = path.backward(problem, phi_q, phi_k, scale, grad_sparse, grad_linear)
    dq, dk, dv, dck, dcv = (grads[n].to(q.dtype) for n in ("q", "k", "v", "context_k", "context_v"))
    return dq, dk, dv, dck, dcv, grads.get("phi_q", q.new_empty(0)), grads.get("phi_k", q.new_empty(0))


@_blocks_backward_op.register_fake
def _(grad_sparse, grad_linear, q, k, v, context_k, context_v, context_mask, phi_q, phi_k, *settings):
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, context_k, context_v)]
    features = [
        q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (phi_q, phi_k)
    ]
    return (*like, *features)


def _setup(ctx, inputs, output):
    *tensors, ctx.topk, ctx.skip, ctx.block_q, ctx.block_k, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_sparse, grad_linear):
    tensors = ctx.saved_tensors
    *grads, phi_q, phi_k = _blocks_backward_op(
        grad_sparse, grad_linear, *tensors, ctx.topk, ctx.skip, ctx.block_q, ctx.block_k, ctx.scale
    )
    features = (None, None) if tensors[6] is None else (phi_q, phi_k)
    return *grads, None, *features, *(None,) * 5


_blocks_op.register_autograd(_backward, setup_context=_setup)
