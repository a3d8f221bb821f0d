"""The prologue as an operator of torch: launches the kernels of `prologue_triton`, for compile and autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import HAS_TRITON, multiprocessors, why_not_triton
from .checks import check_prologue
from .eager import differentiable
from .launch import Launch, Remembered
from .rotary import RopeTables, alike

if HAS_TRITON:
    from . import prologue_triton as triton_kernels

# programs for each multiprocessor that share the tokens of a backward pass; each leaves one partial weight gradient
BACKWARD_PROGRAMS = 4


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _strides(x: Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1)


def _settings(
    q: Tensor, weight: Tensor | None, cos: Tensor | None, interleaved: bool, eps: float | None, across: bool
) -> dict[str, Any]:
    """What the kernels are compiled for; a row of all heads goes to 4 warps, a large one to 8."""
    heads, dim = q.shape[2:]
    return {
        "D": dim, "BD": max(16, _power(dim)), "BH": _power(heads), "NORM": eps is not None,
        "WEIGHT": eps is not None and weight is not None, "ACROSS": across, "ROPE": cos is not None,
        "PAIRED": interleaved or cos is None, "PER_HEAD": cos is not None and cos.ndim == 4 and cos.shape[2] > 1,
        "num_warps": 4 if heads * dim <= 4096 else 8,
    }  # fmt: skip


def _table_strides(cos: Tensor | None) -> tuple[int, int, int]:
    """Over batch, tokens and heads; 0 where shared."""
    if cos is None:
        return 0, 0, 0
    if cos.ndim == 2:
        return 0, cos.stride(0), 0
    batch, tokens, heads, _ = cos.stride()
    return batch if cos.shape[0] > 1 else 0, tokens, heads


def suits(
    q: Tensor, k: Tensor, v: Tensor | None, text_q: Tensor | None, text_k: Tensor | None, text_v: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, text_q_weight: Tensor | None, text_k_weight: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, eps: float | None, across_heads: bool,
    text_first: bool, turn_first: int, turn_tokens: int,
) -> bool:  # fmt: skip
    """Whether the kernels know these arguments of `forward`; ValueError where they do not belong together."""
    text = None if text_q is None or text_k is None else (text_q, text_k, text_v)
    weights = None if q_weight is None or k_weight is None else (q_weight, k_weight)
    text_weights = None if text_q_weight is None or text_k_weight is None else (text_q_weight, text_k_weight)
    rope = None if cos is None or sin is None else RopeTables(cos, sin, interleaved)
    check_prologue(q, k, v, weights, across_heads, rope, text, text_weights, turn_first)
    used = [x for x in (q, k, v, *text) if x is not None] if text else [q, k]
    lacking = None
    if rope is not None and not interleaved and q.shape[-1] % 2:
        lacking = "pairs half a head apart need an even head dim"
    elif not all(map(_rows, used)):
        lacking = "a token's heads do not lie side by side"
    return why_not_triton("qk_norm_rope", q.shape[-1], *used, lacking=lacking) is None


def _forward_launch(
    q: Tensor, k: Tensor, v: Tensor | None, text_q: Tensor | None, text_k: Tensor | None, text_v: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, text_q_weight: Tensor | None, text_k_weight: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, eps: float | None, across_heads: bool,
    text_first: bool, turn_first: int, turn_tokens: int,
) -> Launch:  # fmt: skip
    batch, image, heads, _ = q.shape
    text = 0 if text_q is None else text_q.shape[1]
    words = (q, k) if text_q is None or text_k is None else (text_q, text_k)
    values, text_values = (k, k) if v is None or text_v is None else (v, text_v)
    return Launch(
        triton_kernels.prologue_kernel, (text + image, batch, 1),
        (image, text, heads, k.shape[2], text if text_first else 0, 0 if text_first else image,
         turn_first, turn_tokens, 0.0 if eps is None else eps,
         *(n for x in (q, k, values, *words, text_values) for n in x.stride()[:2]), *_table_strides(cos)),
        _settings(q, q_weight, cos, interleaved, eps, across_heads) | {"VALUES": text_v is not None},
    )  # fmt: skip


# the operator was checked when it was traced
_known_to_suit = Remembered(_forward_launch)


@Remembered
def forward_launch(*arguments: Any) -> Launch | None:
    """How `forward` runs on arguments like these; None where PyTorch has to compute them."""
    return _forward_launch(*arguments) if suits(*arguments) else None


def forward(
    q: Tensor, k: Tensor, v: Tensor | None, text_q: Tensor | None, text_k: Tensor | None, text_v: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, text_q_weight: Tensor | None, text_k_weight: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k and v of the whole sequence; v is empty where none was given; `settings` end in a launch."""
    run: Launch = settings[-1]
    tokens = q.shape[1] if text_q is None else q.shape[1] + text_q.shape[1]
    out_q, out_k = (torch.empty((x.shape[0], tokens, *x.shape[2:]), dtype=x.dtype, device=x.device) for x in (q, k))
    out_v = torch.empty_like(out_k) if v is not None else q.new_empty(0)
    given = (q, k, v, text_q, text_k, text_v, q_weight, k_weight, text_q_weight, text_k_weight, cos, sin)
    run(*[q if x is None else x for x in given], out_q, out_k, out_v)
    return out_q, out_k, out_v


class Backward(NamedTuple):
    """The gradients' launch, and the shape of the weights' partial gradients, None where there are no weights."""

    run: Launch
    partial: tuple[int, ...] | None


@Remembered
def _backward_launch(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, eps: float | None, across_heads: bool,
    at: int, turn_first: int, turn_tokens: int, learn: bool,
) -> Backward:  # fmt: skip
    batch, tokens, heads, dim = q.shape
    settings = _settings(q, q_weight, cos, interleaved, eps, across_heads)
    chunk = -(-tokens * batch // (BACKWARD_PROGRAMS * multiprocessors(q.device)))
    parts = -(-tokens // chunk)
    run = Launch(
        triton_kernels.prologue_backward_kernel, (parts, batch, 1),
        (tokens, chunk, heads, k.shape[2], at, turn_first, turn_tokens, 0.0 if eps is None else eps,
         *(n for x in (q, k, grad_q, grad_k) for n in x.stride()[:2]), *_table_strides(cos)),
        settings | {"LEARN": learn, "STAGES": 2},
    )  # fmt: skip
    return Backward(run, (batch * parts, 2, heads * dim if across_heads else dim) if learn else None)


def backward(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, eps: float | None, across_heads: bool,
    at: int, turn_first: int, turn_tokens: int, learn: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k and, if they are to `learn`, of their weights.

    For the text or the image, which begins at `at` in the joint sequence.
    """
    cos, sin = alike(cos, sin)
    recipe = _backward_launch(
        grad_q, grad_k, q, k, q_weight, k_weight, cos, sin, interleaved, eps, across_heads, at, turn_first, turn_tokens,
        learn,
    )  # fmt: skip
    dq, dk = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)
    partial = q if recipe.partial is None else torch.empty(recipe.partial, dtype=torch.float32, device=q.device)
    weights = [q if x is None else x for x in (q_weight, k_weight, cos, sin)]
    recipe.run(q, k, *weights[:2], grad_q, grad_k, *weights[2:], dq, dk, partial)
    if recipe.partial is None or q_weight is None or k_weight is None:
        return dq, dk, None, None
    dqw, dkw = partial.sum(0).unbind(0)
    return dq, dk, dqw.to(q_weight.dtype), dkw[: k_weight.numel()].to(k_weight.dtype)


@torch.library.custom_op("linfusion::qk_norm_rope", mutates_args=())
def prologue_op(
    q: Tensor, k: Tensor, v: Tensor | None, text_q: Tensor | None, text_k: Tensor | None, text_v: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, text_q_weight: Tensor | None, text_k_weight: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, eps: float | None, across_heads: bool,
    text_first: bool, turn_first: int, turn_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (
        q, k, v, text_q, text_k, text_v, q_weight, k_weight, text_q_weight, text_k_weight, *alike(cos, sin),
    )  # fmt: skip
    run = _known_to_suit(*tensors, interleaved, eps, across_heads, text_first, turn_first, turn_tokens)
    return forward(*tensors, run)


@prologue_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor | None, text_q: Tensor | None, text_k: Tensor | None, text_v: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, text_q_weight: Tensor | None, text_k_weight: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, eps: float | None, across_heads: bool,
    text_first: bool, turn_first: int, turn_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tokens = q.shape[1] + (0 if text_q is None else text_q.shape[1])
    out_q, out_k = (x.new_empty((x.shape[0], tokens, *x.shape[2:])) for x in (q, k))
    return out_q, out_k, q.new_empty(0) if v is None else torch.empty_like(out_k)


@torch.library.custom_op("linfusion::qk_norm_rope_backward", mutates_args=())
def prologue_backward_op(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, eps: float | None, across_heads: bool,
    at: int, turn_first: int, turn_tokens: int, learn: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, *weights = backward(
        grad_q, grad_k, q, k, q_weight, k_weight, cos, sin, interleaved, eps, across_heads, at, turn_first, turn_tokens,
        learn,
    )  # fmt: skip
    # outputs of an operator are tensors of their own
    dqw, dkw = (q.new_empty(0) if x is None else x.clone() for x in weights)
    return dq, dk, dqw, dkw


@prologue_backward_op.register_fake
def _(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, eps: float | None, across_heads: bool,
    at: int, turn_first: int, turn_tokens: int, learn: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    dqw, dkw = (w.new_empty(w.shape) if learn and w is not None else q.new_empty(0) for w in (q_weight, k_weight))
    return dq, dk, dqw, dkw


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, text_q, text_k, text_v, *weights_and_tables = inputs[:12]
    ctx.save_for_backward(q, k, text_q, text_k, *weights_and_tables)
    *ctx.settings, ctx.text_first, first, tokens = inputs[12:18]
    ctx.turns = (first, tokens)
    ctx.others = len(inputs) - 10
    ctx.has_values = v is not None


def _backward(
    run: Callable[..., tuple], ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
) -> tuple[Tensor | None, ...]:
    q, k, text_q, text_k, qw, kw, tqw, tkw, cos, sin = ctx.saved_tensors
    grad_q, grad_k = (g if _rows(g) else g.contiguous() for g in (grad_q, grad_k))
    image, text = q.shape[1], 0 if text_q is None else text_q.shape[1]
    image_at, text_at = (text, 0) if ctx.text_first else (0, image)

    def part(
        q: Tensor, k: Tensor, qw: Tensor | None, kw: Tensor | None, at: int, learn: bool
    ) -> tuple[Tensor | None, ...]:
        dq, dk, dqw, dkw = run(grad_q, grad_k, q, k, qw, kw, cos, sin, *ctx.settings, at, *ctx.turns, learn)
        return (
            dq,
            dk,
            dqw if dqw is not None and dqw.numel() else None,
            dkw if dkw is not None and dkw.numel() else None,
        )

    normed = ctx.settings[1] is not None
    learns = [normed and any(ctx.needs_input_grad[i : i + 2]) for i in (6, 8)]
    dq, dk, dqw, dkw = part(q, k, qw, kw, image_at, learns[0])
    dtq, dtk, dtqw, dtkw = part(text_q, text_k, tqw, tkw, text_at, learns[1]) if text else (None,) * 4
    dv = grad_v[:, image_at : image_at + image] if ctx.has_values else None
    dtv = grad_v[:, text_at : text_at + text] if ctx.has_values and text else None
    return dq, dk, dv, dtq, dtk, dtv, dqw, dkw, dtqw, dtkw, *(None,) * ctx.others


def _rows(x: Tensor) -> bool:
    """Whether heads and channels of `[B, S, H, D]` lie side by side, as the kernels need."""
    return x.stride(3) == 1 and x.stride(2) == x.shape[3]


prologue_op.register_autograd(functools.partial(_backward, prologue_backward_op), setup_context=_setup)
forward_with_gradients = differentiable(forward, _setup, functools.partial(_backward, backward))
