"""Agent attention as an operator of torch: launches the kernels of `agent_triton`, for compile and autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import HAS_TRITON, multiprocessors, why_not_triton
from .checks import Bias, check_agents, repeat_heads
from .eager import differentiable
from .launch import Launch, Remembered

if HAS_TRITON:
    from . import agent_triton as triton_kernels

# columns of a bias's factors
MAX_RANK = 64
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
# by kernel, largest head dim and largest number of agents, for 16-bit inputs; those of head dims 64 and 128 without a
# bias measured on an H100 (bench/NOTES.md)
BLOCKS = {
    "gather": {
        (64, 64): Blocks(64, 128, 4, 3, 1), (64, MANY): Blocks(64, 128, 4, 3, 2),
        (128, 64): Blocks(64, 64, 4, 3, 1), (128, MANY): Blocks(64, 64, 4, 3, 4),
        (256, MANY): Blocks(64, 32, 8, 2, 1),
    },
    "read": {
        (64, 64): Blocks(64, 64, 4, 3, 4), (64, 128): Blocks(128, 64, 4, 3, 3), (64, 256): Blocks(256, 64, 4, 3, 2),
        (64, MANY): Blocks(64, 64, 4, 3, 1),
        (128, 64): Blocks(64, 64, 4, 3, 2), (128, 128): Blocks(128, 128, 8, 3, 1),
        (128, 256): Blocks(256, 64, 4, 3, 2), (128, MANY): Blocks(64, 128, 8, 3, 1),
        (256, 64): Blocks(64, 64, 8, 2, 1), (256, MANY): Blocks(32, 64, 8, 2, 1),
    },
    "query_whole": {
        (64, 64): Blocks(64, 64, 4, 1, 2), (64, 128): Blocks(128, 64, 8, 1, 2),
        (128, 64): Blocks(64, 128, 8, 2, 1), (256, 64): Blocks(64, 32, 8, 1, 1),
    },
    "key_whole": {
        (64, 64): Blocks(64, 64, 4, 1, 4), (64, 128): Blocks(128, 64, 4, 2, 2),
        (128, 64): Blocks(64, 128, 8, 2, 1), (256, 64): Blocks(64, 32, 8, 1, 1),
    },
    "query_tokens": {
        (64, MANY): Blocks(32, 64, 4, 3, 1), (128, MANY): Blocks(64, 64, 4, 2, 1),
        (256, MANY): Blocks(32, 64, 8, 2, 1),
    },
    "key_tokens": {
        (64, MANY): Blocks(32, 64, 4, 3, 1), (128, MANY): Blocks(64, 64, 4, 2, 1),
        (256, MANY): Blocks(32, 64, 8, 2, 1),
    },
    "query_agents": {
        (64, MANY): Blocks(64, 64, 4, 2, 2), (128, MANY): Blocks(64, 64, 4, 2, 4),
        (256, MANY): Blocks(64, 16, 8, 2, 1),
    },
    "key_agents": {
        (64, MANY): Blocks(64, 128, 4, 2, 2), (128, MANY): Blocks(64, 64, 4, 2, 4),
        (256, MANY): Blocks(64, 16, 8, 2, 1),
    },
}  # fmt: skip
# the same where a bias needs shared memory and registers, too; not measured
BIASED = {
    "read": {
        (64, 256): Blocks(64, 128, 8, 3, 2), (128, 128): Blocks(128, 64, 4, 2, 2), (128, 256): Blocks(64, 128, 8, 3, 1),
    },
    "query_whole": {(64, 128): Blocks(128, 32, 8, 2, 1), (128, 64): Blocks(64, 64, 8, 2, 1)},
    "key_whole": {(64, 128): Blocks(128, 32, 8, 2, 1), (128, 64): Blocks(64, 32, 8, 2, 1)},
    "query_agents": {(128, MANY): Blocks(64, 32, 4, 2, 2)},
}  # fmt: skip
# fp32 takes small blocks, its products need room
WIDE = Blocks(16, 16, 4, 1, 2)
MERGED = 16  # agents in a program that merges or sums


class Plan(NamedTuple):
    """How a kernel is run: its grid, tokens of a program, and constants common to all kernels."""

    grid: tuple[int, int, int]
    chunk: int
    settings: dict[str, Any]

    def parts(self, x: Tensor) -> int:
        """Pieces that the tokens of `x` are cut into."""
        return -(-x.shape[1] // self.chunk)

    def filled(self, agents: int) -> dict[str, bool]:
        """Whether agents fill all tiles: a constant, while their number is none."""
        return {"FULL": agents % self.settings["BN"] == 0}


def blocks(kernel: str, agents: int, dim: int, wide: bool, rank: int = 0) -> Blocks | None:
    """The kernel's block sizes; None where it does not take so many agents of such a head dim."""
    known = BLOCKS[kernel] | (BIASED.get(kernel, {}) if rank else {})
    sizes = (b for (most, count), b in known.items() if dim <= most and agents <= count)
    block = next(sizes, None)
    if wide:
        block = WIDE._replace(warps=4 if dim <= 64 else 8)
        block = block if agents <= WIDE.agents or "whole" not in kernel else None
    return None if block is None else block._replace(agents=min(block.agents, _padded(agents)))


def _padded(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def plan(kernel: str, x: Tensor, agents: Tensor, rank: int, *read: Tensor, budget: float = 0.0) -> Plan:
    """Cut the sequences of `x` `[B, S, H_kv, D]`, one for each head of the agents, in pieces.

    Args:
        rank: of the bias, 0 without one.
        read: what else is read: where all strides are multiples of 8, 8 channels are read at once.
        budget: bytes for partial sums.
    """
    (batch, tokens, _, dim), (count, heads) = x.shape, agents.shape[1:3]
    aligned = dim % 8 == 0 and all(n % 8 == 0 for y in (x, *read) for n in y.stride()[:-1])
    block = blocks(kernel, count, dim, x.element_size() == 4, rank)
    assert block is not None  # asked before
    tiles, programs = -(-count // block.agents), block.programs * multiprocessors(x.device)
    if "tokens" in kernel or (kernel == "read" and tiles > 1):
        tiles, chunk = 1, block.tokens
    else:
        tiles = 1 if kernel == "read" else tiles
        record = 4 * count * (dim if kernel == "gather" else 2 * dim + rank)
        most = tokens if kernel == "read" else max(budget, CACHED) / (batch * heads * record)
        wanted = max(1, int(min(programs // (batch * heads * tiles), most)))
        chunk = -(-tokens // (wanted * block.tokens)) * block.tokens
    settings = {"D": dim, "BD": _padded(dim), "BN": block.agents, "BS": block.tokens, "R": rank}
    settings |= {"STAGES": block.stages, "ALIGN": 8 if aligned else 1, "num_warps": block.warps}
    return Plan((-(-tokens // chunk) * tiles, batch * heads, 1), chunk, settings)


def whole(agents: int, q: Tensor) -> bool:
    """Whether one pass makes all gradients of a side."""
    return blocks("query_whole", agents, q.shape[-1], q.element_size() == 4) is not None


def _rank(table: Tensor | None) -> int:
    """Columns of a bias's factors as kernels read them."""
    return 0 if table is None else _padded(table.shape[-1])


def _shared(table: Tensor | None) -> int:
    """The table's stride over heads."""
    return 0 if table is None or table.shape[0] == 1 else table.shape[1] * _rank(table)


def _bias(table: Tensor | None, weights: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors with a power of two of columns; `like` stands in for none."""
    if table is None or weights is None:
        return like, like
    more = _rank(table) - table.shape[-1]
    if more:
        table, weights = F.pad(table, (0, more)), F.pad(weights, (0, more))
    return table.contiguous(), weights.to(like.dtype).contiguous()


def _small(dim: int) -> dict[str, Any]:
    """Constants of the kernels that add up what others leave."""
    return {"D": dim, "BD": _padded(dim), "BN": MERGED, "num_warps": 4}


def suits(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, key_table: Tensor | None, key_weights: Tensor | None,
    query_table: Tensor | None, query_weights: Tensor | None, scale: float, agent_scale: float, shortcut: float,
    trained: bool, _: bool = True,
) -> bool:  # fmt: skip
    """Whether the kernels know these arguments of `forward`; ValueError where they do not belong together.

    Args:
        key_table, query_table: dense biases where there are no weights.
        trained: whether gradients of the weights are wanted.
    """
    key_bias: Bias | None = key_table if key_table is None or key_weights is None else (key_table, key_weights)
    query_bias: Bias | None = (
        query_table if query_table is None or query_weights is None else (query_table, query_weights)
    )
    check_agents(q, k, v, agents, scale, agent_scale, key_bias, query_bias, shortcut)
    lacking: str | None = None
    factors: list[Tensor] = []
    for bias in (key_bias, query_bias):
        if isinstance(bias, Tensor):
            lacking = "its kernels take biases in two factors (bias_factors), not dense ones"
        elif bias is not None:
            factors += bias
            if bias[0].shape[-1] > MAX_RANK:
                lacking = f"its kernels take biases with up to {MAX_RANK} columns, not {bias[0].shape[-1]}"
    if v.shape[-1] != q.shape[-1]:
        lacking = f"values have head dim {v.shape[-1]}, keys {q.shape[-1]}"
    if trained:
        lacking = "gradients of a bias's weights are computed by PyTorch"
    if not min(scale, agent_scale) > 0:
        lacking = f"its kernels take positive scales, not {scale} and {agent_scale}"
    if 0 in q.shape or 0 in k.shape:
        lacking = "there are no tokens"
    return why_not_triton("agent_attention", q.shape[-1], q, k, v, agents, *factors, lacking=lacking) is None


class Forward(NamedTuple):
    """The passes of `forward` on tensors of one layout.

    Attributes:
        parts: shape of what agents gather from pieces of the keys, where `merge` merges them.
        lse: shape of the queries' log-sum-exps, empty where nobody wants them.
    """

    gather: Launch
    merge: Launch | None
    read: Launch
    parts: tuple[int, ...]
    lse: tuple[int, ...]


def _forward_recipe(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, key_table: Tensor | None, key_weights: Tensor | None,
    query_table: Tensor | None, query_weights: Tensor | None, scale: float, agent_scale: float, shortcut: float,
    trained: bool, differentiate: bool,
) -> Forward:  # fmt: skip
    (batch, tokens, heads, dim), (length, kv_heads), count = q.shape, k.shape[1:3], agents.shape[1]
    group, lanes = heads // kv_heads, batch * heads
    run = plan(
        "gather", k, agents, _rank(key_table), v, budget=SCRATCH * 2 * (q.numel() + k.numel()) * q.element_size()
    )
    parts = run.parts(k)
    gather = Launch(
        triton_kernels.gather_kernel, run.grid,
        (count, length, run.chunk, heads, group, parts, scale,
         *agents.stride()[:3], *k.stride()[:3], *v.stride()[:3], _shared(key_table)),
        run.settings | {"EVEN": length % run.settings["BS"] == 0},
    )  # fmt: skip
    merge = Launch(triton_kernels.merge_kernel, (-(-count // MERGED), lanes, 1), (count, parts), _small(dim))
    keep = differentiate and not whole(count, q)
    run = plan("read", q, agents, _rank(query_table), agents, v)
    read = Launch(
        triton_kernels.read_kernel, run.grid,
        (count, tokens, run.chunk, heads, group, agent_scale, shortcut,
         *q.stride()[:3], *agents.stride()[:3], *v.stride()[:3], _shared(query_table)),
        run.settings | run.filled(count)
        | {"ONE": count <= run.settings["BN"], "LSES": keep, "SHORTCUT": shortcut != 0.0},
    )  # fmt: skip
    lse = (batch, heads, tokens) if keep else (0,)
    return Forward(gather, merge if parts > 1 else None, read, (batch, heads, parts, count, dim), lse)


# the operator was checked when it was traced
_known_to_suit = Remembered(_forward_recipe)


@Remembered
def forward_recipe(*arguments: Any) -> Forward | None:
    """How `forward` runs on arguments like these; None where PyTorch has to compute them."""
    return _forward_recipe(*arguments) if suits(*arguments) else None


def forward(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, key_table: Tensor | None, key_weights: Tensor | None,
    query_table: Tensor | None, query_weights: Tensor | None, *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, and what its gradients need; `settings` end in a recipe.

    That is what the agents gathered `[B, H, n, D]` and log-sum-exp of the scores of agents `[B, H, n]` and queries
    `[B, H, S]` in fp32, the last one empty where gradients make it again or none are wanted.
    """
    recipe: Forward = settings[-1]
    fp32 = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    batch, heads, _, count, dim = recipe.parts
    gathered = torch.empty((batch, heads, count, dim), dtype=q.dtype, device=q.device)
    mass = fp32((batch, heads, count))
    factors = _bias(key_table, key_weights, q)
    if recipe.merge is None:
        recipe.gather(agents, k, v, *factors, gathered, mass)
    else:
        parts, masses = fp32(recipe.parts), fp32(recipe.parts[:4])
        recipe.gather(agents, k, v, *factors, parts, masses)
        recipe.merge(parts, masses, gathered, mass)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = fp32(recipe.lse)
    recipe.read(q, agents, gathered, *_bias(query_table, query_weights, q), v, out, lse)
    return out, gathered, mass, lse


class Side(NamedTuple):
    """The passes that make the gradients of one side, see `agent_triton`: one for all, or `tokens` first.

    Attributes:
        parts: shape of partial sums over the tokens, without channels: `[B, H, parts, n]`.
        rank: of the bias.
    """

    tokens: Launch | None
    agents: Launch
    parts: tuple[int, ...]
    rank: int


class Backward(NamedTuple):
    """The passes of `backward` on tensors of one layout; the agents' gradient is summed from `slots` parts."""

    query: Side
    gathered: Launch
    key: Side
    total: Launch
    slots: int


@Remembered
def _backward_recipe(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, agents: Tensor, key_table: Tensor | None,
    query_table: Tensor | None, scale: float, agent_scale: float,
) -> Backward:  # fmt: skip
    (batch, _, heads, dim), count = q.shape, agents.shape[1]
    budget = SCRATCH * (3 * q.numel() + 4 * k.numel()) * q.element_size() / 2
    kind = "whole" if whole(count, q) else "agents"
    sides = [(q, grad, query_table, agent_scale), (k, v, key_table, scale)]
    names = "query", "key"
    runs = [
        plan(f"{n}_{kind}", x, agents, _rank(table), y, agents, budget=budget)
        for n, (x, y, table, _) in zip(names, sides, strict=True)
    ]
    parts = [run.parts(x) for run, (x, *_) in zip(runs, sides, strict=True)]

    def side(i: int) -> Side:
        keys, run, (x, y, table, factor) = i == 1, runs[i], sides[i]
        group, strides = heads // x.shape[2], (*x.stride()[:3], *y.stride()[:3], *agents.stride()[:3], _shared(table))
        slot, first = sum(parts[:i]), None
        numbers: tuple[Any, ...] = (count, x.shape[1], run.chunk, heads, group, slot, sum(parts))
        settings = run.settings | {"KEYS": keys}
        if kind == "whole":
            kernel, settings = triton_kernels.whole_backward_kernel, settings | run.filled(count)
        else:
            kernel, numbers = triton_kernels.agents_backward_kernel, (*numbers, parts[i])
            tokens = plan(f"{names[i]}_tokens", x, agents, _rank(table), y, agents)
            first = Launch(
                triton_kernels.tokens_backward_kernel, tokens.grid,
                (count, x.shape[1], heads, group, factor, *strides),
                tokens.settings | tokens.filled(count) | {"KEYS": keys},
            )  # fmt: skip
        second = Launch(kernel, run.grid, (*numbers, factor, *strides), settings)
        return Side(first, second, (batch, heads, parts[i], count), _rank(table))

    def summing(parts: int, strides: tuple[int, ...], deltas: bool) -> Launch:
        return Launch(
            triton_kernels.sum_kernel, (-(-count // MERGED), batch * heads, 1), (count, parts, heads, *strides),
            _small(dim) | {"DELTAS": deltas},
        )  # fmt: skip

    return Backward(
        side(0), summing(parts[0], (heads * count * dim, dim, count * dim), True), side(1),
        summing(sum(parts), (count * heads * dim, heads * dim, dim), False), sum(parts),
    )  # fmt: skip


def _side(
    side: Side, keys: bool, x: Tensor, y: Tensor, agents: Tensor, c: Tensor, table: Tensor | None,
    weights: Tensor | None, lse: Tensor, delta: Tensor, out: Tensor, partial: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x, of y (of keys), of c as partial sums (of queries) and of the table: see `agent_triton`."""
    heads, dim = agents.shape[2:]
    fp32 = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    dx = torch.empty((*x.shape[:2], heads, dim), dtype=x.dtype, device=x.device)
    dy = torch.empty_like(dx) if keys else dx
    dc = delta if keys else fp32((*side.parts, dim))
    dtable = partial if table is None else fp32((*side.parts, side.rank))
    given = x, y, agents, c, *_bias(table, weights, x), lse, delta
    if side.tokens is None:
        side.agents(*given, dx, dy, partial, dc, dtable)
    else:
        side.tokens(*given, out, dx, dy)
        side.agents(*given, partial, dc, dtable)
    return dx, dy, dc, None if table is None else _summed(dtable, table)


def _summed(partial: Tensor, table: Tensor) -> Tensor:
    """A table's gradient out of `[B, H, parts, n, columns]`."""
    total = partial.sum((0, 2) if table.shape[0] > 1 else (0, 1, 2))
    return total.view(*table.shape[:2], -1)[..., : table.shape[2]].to(table.dtype)


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
    recipe = _backward_recipe(grad, q, k, v, agents, key_table, query_table, scale, agent_scale)
    if out is None:
        out = q  # nobody reads it
    elif shortcut:
        out = torch.sub(out, repeat_heads(v, heads), alpha=shortcut)
    fp32 = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    partial = fp32((batch, heads, recipe.slots, count, dim))
    deltas = fp32(0 if recipe.query.tokens is None else (batch, heads, tokens))
    dq, _, dc, dquery_table = _side(
        recipe.query, False, q, grad, agents, gathered, query_table, query_weights, lse, deltas, out, partial
    )
    dgathered, delta = torch.empty_like(gathered), torch.empty_like(mass)
    recipe.gathered(dc, gathered, dgathered, delta)
    dk, dv, _, dkey_table = _side(
        recipe.key, True, k, v, agents, dgathered, key_table, key_weights, mass, delta, out, partial
    )
    dagents = torch.empty(agents.shape, dtype=agents.dtype, device=agents.device)
    recipe.total(partial, gathered, dagents, partial)
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
    tensors = q, k, v, agents, key_table, key_weights, query_table, query_weights
    return forward(*tensors, _known_to_suit(*tensors, scale, agent_scale, shortcut, False, True))


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
    q, k, v, agents, *factors = inputs[:8]
    out, gathered, mass, lse = output
    ctx.settings, ctx.others = inputs[8:11], len(inputs) - 8
    # a single pass needs no output, and keeping it would keep its memory
    kept = None if whole(agents.shape[1], q) else out
    ctx.save_for_backward(q, k, v, agents, *factors, kept, gathered, mass, lse)
    ctx.mark_non_differentiable(gathered, mass, lse)
    ctx.set_materialize_grads(False)


def _backward(run: Callable[..., tuple], ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * (8 + ctx.others)
    *gradients, dkey_table, dquery_table = run(grad, *ctx.saved_tensors, *ctx.settings)
    if ctx.saved_tensors[4] is None:
        dkey_table = None
    if ctx.saved_tensors[6] is None:
        dquery_table = None
    return *gradients, dkey_table, None, dquery_table, None, *(None,) * ctx.others


agent_attention_op.register_autograd(functools.partial(_backward, agent_attention_backward_op), setup_context=_setup)
forward_with_gradients = differentiable(forward, _setup, functools.partial(_backward, backward))
