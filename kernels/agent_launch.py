"""Agent attention as an operator of torch: launches the kernels of `agent_triton`, for compile and autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import HAS_TRITON, multiprocessors
from .checks import repeat_heads
from .eager import differentiable
from .launch import launch

if HAS_TRITON:
    from . import agent_triton as triton_kernels

# partial sums may take this share of inputs and outputs together, or so many bytes, which stay in the cache
SCRATCH, CACHED = 0.04, 2**23


class Blocks(NamedTuple):
    """Agents and tokens in a block, warps, depth of the software pipeline, and programs for each multiprocessor."""

    agents: int
    tokens: int
    warps: int
    stages: int
    programs: int


MANY = 2**31
# by kernel, largest head dim and largest number of agents, for 16-bit inputs; chosen by what sm_90 has registers for
# (none spills, with a bias or without), not yet by time
BLOCKS = {
    "gather": {
        (64, 64): Blocks(64, 128, 4, 3, 3), (64, MANY): Blocks(128, 64, 8, 3, 2),
        (128, 64): Blocks(64, 64, 4, 3, 2), (128, MANY): Blocks(128, 64, 8, 3, 1),
        (256, MANY): Blocks(64, 32, 8, 2, 1),
    },
    "read": {
        (64, 64): Blocks(64, 64, 4, 4, 4), (64, 128): Blocks(128, 64, 4, 3, 3), (64, MANY): Blocks(64, 128, 8, 3, 2),
        (128, 64): Blocks(64, 64, 4, 3, 2), (128, 128): Blocks(128, 64, 4, 2, 2),
        (128, MANY): Blocks(64, 128, 8, 3, 1), (256, 64): Blocks(64, 64, 8, 2, 1), (256, MANY): Blocks(32, 64, 8, 2, 1),
    },
    "query_whole": {
        (64, 64): Blocks(64, 64, 4, 2, 2), (64, 128): Blocks(128, 32, 8, 2, 1),
        (128, 64): Blocks(64, 64, 8, 2, 1), (256, 64): Blocks(64, 32, 8, 1, 1),
    },
    "key_whole": {
        (64, 64): Blocks(64, 32, 4, 2, 2), (64, 128): Blocks(128, 32, 8, 2, 1),
        (128, 64): Blocks(64, 32, 8, 2, 1), (256, 64): Blocks(64, 32, 8, 1, 1),
    },
    "query_tokens": {
        (64, MANY): Blocks(64, 128, 8, 2, 1), (128, MANY): Blocks(64, 64, 4, 2, 1),
        (256, MANY): Blocks(32, 64, 8, 2, 1),
    },
    "key_tokens": {
        (64, MANY): Blocks(64, 128, 8, 2, 1), (128, MANY): Blocks(32, 64, 4, 2, 1),
        (256, MANY): Blocks(32, 64, 8, 2, 1),
    },
    "query_agents": {
        (64, MANY): Blocks(128, 64, 8, 2, 1), (128, MANY): Blocks(64, 32, 4, 2, 2),
        (256, MANY): Blocks(64, 16, 8, 2, 1),
    },
    "key_agents": {
        (64, MANY): Blocks(128, 64, 8, 2, 1), (128, MANY): Blocks(128, 64, 8, 2, 1),
        (256, MANY): Blocks(64, 16, 8, 2, 1),
    },
}  # fmt: skip
# fp32 takes small blocks, its products need room
WIDE = Blocks(16, 16, 4, 1, 2)
MERGED = 16  # agents in a program that merges or sums


class Plan(NamedTuple):
    """How a kernel is run: its grid, tokens of a program, and constants common to all kernels."""

    grid: tuple[int, int, int]
    chunk: int
    settings: dict[str, Any]

    @property
    def shared(self) -> dict[str, Any]:
        """Constants of the kernels that add up what this one leaves."""
        return {n: self.settings[n] for n in ("D", "BD")} | {"BN": MERGED}


def blocks(kernel: str, agents: int, dim: int, wide: bool) -> Blocks | None:
    """The kernel's block sizes; None where it does not take so many agents of such a head dim."""
    sizes = (b for (most, count), b in BLOCKS[kernel].items() if dim <= most and agents <= count)
    found = next(sizes, None)
    if wide:
        found = WIDE._replace(warps=4 if dim <= 64 else 8)
        found = found if agents <= WIDE.agents or "whole" not in kernel else None
    return None if found is None else found._replace(agents=min(found.agents, _padded(agents)))


def _padded(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


@functools.lru_cache(4096)
def plan(
    kernel: str, shape: tuple[int, ...], agents: int, rank: int, wide: bool,
    layouts: tuple[tuple[tuple[int, ...], int], ...], device: torch.device, budget: float,
) -> Plan:  # fmt: skip
    """Cut `B * H` sequences of `shape` `[B, S, H, D]` in pieces.

    Args:
        rank: of the bias, 0 without one.
        layouts: strides and offset of each tensor that is read: where all are multiples of 8, 8 are read at once.
        budget: bytes for partial sums.
    """
    batch, tokens, heads, dim = shape
    aligned = dim % 8 == 0 and all(n % 8 == 0 for strides, offset in layouts for n in (*strides[:-1], offset))
    block = blocks(kernel, agents, dim, wide)
    assert block is not None  # asked before
    tiles, programs = -(-agents // block.agents), block.programs * multiprocessors(device)
    if "tokens" in kernel or (kernel == "read" and tiles > 1):
        tiles, chunk = 1, block.tokens
    else:
        tiles = 1 if kernel == "read" else tiles
        record = 4 * agents * (dim if kernel == "gather" else 2 * dim + rank)
        most = tokens if kernel == "read" else max(budget, CACHED) / (batch * heads * record)
        wanted = max(1, int(min(programs // (batch * heads * tiles), most)))
        chunk = -(-tokens // (wanted * block.tokens)) * block.tokens
    settings = {"D": dim, "BD": _padded(dim), "BN": block.agents, "BS": block.tokens, "R": rank}
    settings |= {"STAGES": block.stages, "ALIGN": 8 if aligned else 1, "num_warps": block.warps}
    return Plan((-(-tokens // chunk) * tiles, batch * heads, 1), chunk, settings)


def _plan(kernel: str, x: Tensor, heads: int, agents: Tensor, rank: int, *read: Tensor, budget: float = 0.0) -> Plan:
    layouts = tuple([(y.stride(), y.storage_offset()) for y in (x, *read)])
    shape = (*x.shape[:2], heads, x.shape[3])
    return plan(kernel, shape, agents.shape[1], rank, x.element_size() == 4, layouts, x.device, budget)


def whole(agents: int, q: Tensor) -> bool:
    """Whether one pass makes all gradients of a side."""
    return blocks("query_whole", agents, q.shape[-1], q.element_size() == 4) is not None


def _filled(run: Plan, agents: int) -> dict[str, bool]:
    """Whether agents fill all tiles: a constant, while their number is none."""
    return {"FULL": agents % run.settings["BN"] == 0}


def _bias(table: Tensor | None, weights: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Both factors with a power of two of columns, the table's stride over heads, and the columns."""
    if table is None or weights is None:
        return like, like, 0, 0
    rank = _padded(table.shape[-1])
    more = rank - table.shape[-1]
    table, weights = (F.pad(x, (0, more)) if more else x.contiguous() for x in (table, weights))
    return table, weights.to(like.dtype), table.stride(0) if table.shape[0] > 1 else 0, rank


def forward(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, key_table: Tensor | None, key_weights: Tensor | None,
    query_table: Tensor | None, query_weights: Tensor | None, scale: float, agent_scale: float, shortcut: float,
    differentiate: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, and what its gradients need.

    That is what the agents gathered `[B, H, n, D]` and log-sum-exp of the scores of agents `[B, H, n]` and queries
    `[B, H, S]` in fp32, the last one empty where gradients make it again or none are wanted.
    """
    (batch, tokens, heads, dim), (length, kv_heads), count = q.shape, k.shape[1:3], agents.shape[1]
    group, fp32 = heads // kv_heads, functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    gathered = torch.empty((batch, heads, count, dim), dtype=q.dtype, device=q.device)
    mass = fp32((batch, heads, count))
    table, weights, stride, rank = _bias(key_table, key_weights, q)
    budget = SCRATCH * 2 * (q.numel() + k.numel()) * q.element_size()
    run = _plan("gather", k, heads, agents, rank, v, budget=budget)
    parts = -(-length // run.chunk)
    piece, pieces = (gathered, mass) if parts == 1 else (
        fp32((batch, heads, parts, count, dim)), fp32((batch, heads, parts, count))
    )  # fmt: skip
    launch(
        triton_kernels.gather_kernel, run.grid,
        (agents, k, v, table, weights, piece, pieces, count, length, run.chunk, heads, group, parts, scale,
         *agents.stride()[:3], *k.stride()[:3], *v.stride()[:3], stride),
        run.settings | {"EVEN": length % run.settings["BS"] == 0},
    )  # fmt: skip
    if parts > 1:
        launch(
            triton_kernels.merge_kernel, (-(-count // MERGED), batch * heads, 1),
            (piece, pieces, gathered, mass, count, parts), run.shared | {"num_warps": 4},
        )  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    keep = differentiate and not whole(count, q)
    lse = fp32((batch, heads, tokens) if keep else 0)
    table, weights, stride, rank = _bias(query_table, query_weights, q)
    run = _plan("read", q, heads, agents, rank, agents, v)
    launch(
        triton_kernels.read_kernel, run.grid,
        (q, agents, gathered, table, weights, v, out, lse, count, tokens, run.chunk, heads, group, agent_scale,
         shortcut, *q.stride()[:3], *agents.stride()[:3], *v.stride()[:3], stride),
        run.settings | _filled(run, count)
        | {"ONE": count <= run.settings["BN"], "LSES": keep, "SHORTCUT": shortcut != 0.0},
    )  # fmt: skip
    return out, gathered, mass, lse


class Sums(NamedTuple):
    """Partial sums of the agents' gradient, `[B, H, slots, n, D]` in fp32, and the first slot of this side."""

    partial: Tensor
    slot: int


def _side(
    run: Plan, keys: bool, x: Tensor, y: Tensor, agents: Tensor, c: Tensor, table: Tensor | None,
    weights: Tensor | None, scale: float, lse: Tensor, delta: Tensor, out: Tensor, sums: Sums,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x, of y (of keys), of c as partial sums (of queries) and of the table: see `agent_triton`."""
    (batch, tokens), (count, heads, dim) = x.shape[:2], agents.shape[1:]
    fp32, given = functools.partial(torch.empty, dtype=torch.float32, device=x.device), table
    dx = torch.empty((batch, tokens, heads, dim), dtype=x.dtype, device=x.device)
    dy = torch.empty_like(dx) if keys else dx
    parts = -(-tokens // run.chunk)
    dc = delta if keys else fp32((batch, heads, parts, count, dim))
    table, weights, stride, rank = _bias(table, weights, x)
    dtable = fp32((batch, heads, parts, count, rank))
    one_pass = whole(count, x)
    rest = (*x.stride()[:3], *y.stride()[:3], *agents.stride()[:3], stride)
    if not one_pass:
        first = _plan("key_tokens" if keys else "query_tokens", x, heads, agents, rank, y, agents)
        launch(
            triton_kernels.tokens_backward_kernel, first.grid,
            (x, y, agents, c, table, weights, lse, delta, out, dx, dy, count, tokens, heads,
             heads // x.shape[2], scale, *rest),
            first.settings | _filled(first, count) | {"KEYS": keys},
        )  # fmt: skip
    kernel = triton_kernels.whole_backward_kernel if one_pass else triton_kernels.agents_backward_kernel
    launch(
        kernel, run.grid,
        (x, y, agents, c, table, weights, lse, delta, *((dx, dy) if one_pass else ()), sums.partial, dc, dtable,
         count, tokens, run.chunk, heads, heads // x.shape[2], sums.slot, sums.partial.shape[2],
         *(() if one_pass else (parts,)), scale, *rest),
        run.settings | (_filled(run, count) if one_pass else {}) | {"KEYS": keys},
    )  # fmt: skip
    return dx, dy, dc, None if given is None else _summed(dtable, given)


def _summed(partial: Tensor, table: Tensor) -> Tensor:
    """A table's gradient out of `[B, H, parts, n, columns]`."""
    total = partial.sum((0, 2) if table.shape[0] > 1 else (0, 1, 2))
    return total.view(*table.shape[:2], -1)[..., : table.shape[2]].to(table.dtype)


def _sum(partial: Tensor, c: Tensor, out: Tensor, strides: tuple[int, ...], delta: Tensor | None, run: Plan) -> None:
    batch, heads, parts, count = partial.shape[:4]
    launch(
        triton_kernels.sum_kernel, (-(-count // MERGED), batch * heads, 1),
        (partial, c, out, partial if delta is None else delta, count, parts, heads, *strides),
        run.shared | {"DELTAS": delta is not None, "num_warps": 4},
    )  # fmt: skip


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, agents: Tensor, key_table: Tensor | None,
    key_weights: Tensor | None, query_table: Tensor | None, query_weights: Tensor | None, out: Tensor | None,
    gathered: Tensor, mass: Tensor, lse: Tensor, scale: float, agent_scale: float, shortcut: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, the agents and both tables."""
    batch, tokens, heads, dim = q.shape
    count, group = agents.shape[1], heads // k.shape[2]
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    one_pass = whole(count, q)
    if out is None:
        out = q  # nobody reads it
    elif shortcut:
        out = torch.sub(out, repeat_heads(v, heads), alpha=shortcut)
    budget = SCRATCH * (3 * q.numel() + 4 * k.numel()) * q.element_size() / 2
    ranks = [0 if t is None else _padded(t.shape[-1]) for t in (query_table, key_table)]
    query_name, key_name = ("query_whole", "key_whole") if one_pass else ("query_agents", "key_agents")
    query_run = _plan(query_name, q, heads, agents, ranks[0], grad, budget=budget)
    key_run = _plan(key_name, k, heads, agents, ranks[1], v, budget=budget)
    slots = [-(-x.shape[1] // run.chunk) for x, run in ((q, query_run), (k, key_run))]
    fp32 = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    partial = fp32((batch, heads, sum(slots), count, dim))
    deltas = fp32(0 if one_pass else (batch, heads, tokens))
    dq, _, dc, dquery_table = _side(
        query_run, False, q, grad, agents, gathered, query_table, query_weights, agent_scale, lse, deltas, out,
        Sums(partial, 0),
    )  # fmt: skip
    dgathered, delta = torch.empty_like(gathered), torch.empty_like(mass)
    _sum(dc, gathered, dgathered, gathered.stride()[:1] + gathered.stride()[2:0:-1], delta, query_run)
    dk, dv, _, dkey_table = _side(
        key_run, True, k, v, agents, dgathered, key_table, key_weights, scale, mass, delta, out,
        Sums(partial, slots[0]),
    )  # fmt: skip
    dagents = torch.empty(agents.shape, dtype=agents.dtype, device=agents.device)
    _sum(partial, gathered, dagents, dagents.stride()[:3], None, query_run)
    if shortcut:
        dv.add_(grad, alpha=shortcut)
    if group > 1:
        dk, dv = (x.unflatten(2, (-1, group)).sum(3) for x in (dk, dv))
    return dq, dk, dv, dagents, dkey_table, dquery_table


@torch.library.custom_op("linfusion::agent_attention", mutates_args=())
def agent_attention_op(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, key_table: Tensor | None, key_weights: Tensor | None,
    query_table: Tensor | None, query_weights: Tensor | None, scale: float, agent_scale: float, shortcut: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return forward(
        q, k, v, agents, key_table, key_weights, query_table, query_weights, scale, agent_scale, shortcut
    )  # fmt: skip


@agent_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, key_table: Tensor | None, key_weights: Tensor | None,
    query_table: Tensor | None, query_weights: Tensor | None, scale: float, agent_scale: float, shortcut: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, tokens, heads, dim), count = q.shape, agents.shape[1]
    mass = q.new_empty((batch, heads, count), dtype=torch.float32)
    lse = q.new_empty(0 if whole(count, q) else (batch, heads, tokens), dtype=torch.float32)
    return q.new_empty(q.shape), q.new_empty((batch, heads, count, dim)), mass, lse


@torch.library.custom_op("linfusion::agent_attention_backward", mutates_args=())
def agent_attention_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, agents: Tensor, key_table: Tensor | None,
    key_weights: Tensor | None, query_table: Tensor | None, query_weights: Tensor | None, out: Tensor | None,
    gathered: Tensor, mass: Tensor, lse: Tensor, scale: float, agent_scale: float, shortcut: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    *gradients, dkey_table, dquery_table = backward(
        grad, q, k, v, agents, key_table, key_weights, query_table, query_weights, out, gathered, mass, lse, scale,
        agent_scale, shortcut,
    )  # fmt: skip
    # operators return tensors only
    tables = (q.new_empty(0) if d is None else d for d in (dkey_table, dquery_table))
    return *gradients, *tables  # type: ignore[return-value]


@agent_attention_backward_op.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, agents: Tensor, key_table: Tensor | None,
    key_weights: Tensor | None, query_table: Tensor | None, query_weights: Tensor | None, out: Tensor | None,
    gathered: Tensor, mass: Tensor, lse: Tensor, scale: float, agent_scale: float, shortcut: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, dagents = (x.new_empty(x.shape) for x in (q, k, v, agents))
    dkey_table, dquery_table = (q.new_empty(0) if t is None else t.new_empty(t.shape) for t in (key_table, query_table))
    return dq, dk, dv, dagents, dkey_table, dquery_table


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, k, v, agents, *factors, scale, agent_scale, shortcut = inputs
    out, gathered, mass, lse = output
    ctx.settings = scale, agent_scale, shortcut
    # a single pass needs no output, and keeping it would keep its memory
    kept = None if whole(agents.shape[1], q) else out
    ctx.save_for_backward(q, k, v, agents, *factors, kept, gathered, mass, lse)
    ctx.mark_non_differentiable(gathered, mass, lse)
    ctx.set_materialize_grads(False)


def _backward(run: Callable[..., tuple], ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    *gradients, dkey_table, dquery_table = run(grad, *ctx.saved_tensors, *ctx.settings)
    if ctx.saved_tensors[4] is None:
        dkey_table = None
    if ctx.saved_tensors[6] is None:
        dquery_table = None
    return *gradients, dkey_table, None, dquery_table, None, None, None, None


agent_attention_op.register_autograd(functools.partial(_backward, agent_attention_backward_op), setup_context=_setup)
forward_with_gradients = differentiable(forward, _setup, functools.partial(_backward, backward))
