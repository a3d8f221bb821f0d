"""agent_attention and what it needs of the grid, against the formulas written out: values and every gradient."""

import itertools
import math

import pytest
import torch

from linfusion.kernels import agent_attention, pool_agents, reference, resize_bias
from linfusion.kernels.reference import agent_grid

GRIDS = [(1, 1), (5, 7), (2, 3, 5)]


def softmax(scores):
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def written_out(q, k, v, agents, scale=None, agent_scale=None, key_bias=0.0, query_bias=0.0):
    """As one matrix of weights per head, rows summing to one."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, agents = (x.transpose(1, 2) for x in (q, k, v, agents))
    read = softmax((scale if agent_scale is None else agent_scale) * q @ agents.mT + query_bias)
    gather = softmax(scale * agents @ k.mT + key_bias)
    return ((read @ gather) @ v).transpose(1, 2)


def pooled(x, grid, cells):
    """Plain means, cell by cell."""
    image, out = x.unflatten(1, grid), []
    for cell in itertools.product(*(range(c) for c in cells)):
        box = [slice(i * n // c, -(-(i + 1) * n // c)) for i, n, c in zip(cell, grid, cells, strict=True)]
        out.append(image[(slice(None), *box)].flatten(1, len(grid)).mean(1))
    return torch.stack(out, dim=1)


def resized(table, grid):
    """`[H, n, rows, columns]` at the centres of the grid's tokens, entries beyond the outermost held."""

    def place(i, length, entries):
        at = min(max((i + 0.5) * entries / length - 0.5, 0), entries - 1)
        low = min(int(at), entries - 1)
        return low, min(low + 1, entries - 1), at - low

    out = []
    for y, x in itertools.product(range(grid[-2]), range(grid[-1])):
        top, bottom, a = place(y, grid[-2], table.shape[2])
        left, right, b = place(x, grid[-1], table.shape[3])
        upper = (1 - b) * table[:, :, top, left] + b * table[:, :, top, right]
        lower = (1 - b) * table[:, :, bottom, left] + b * table[:, :, bottom, right]
        out.append((1 - a) * upper + a * lower)
    return torch.stack(out * math.prod(grid[:-2]), dim=-1)


def inputs(tokens=35, agents=6, heads=4, kv_heads=4, dim=8, dtype=torch.float64, keys=None):
    torch.manual_seed(0)
    shapes = [(2, tokens, heads), (2, keys or tokens, kv_heads), (2, keys or tokens, kv_heads), (2, agents, heads)]
    qkva = [torch.randn(*s, dim, dtype=dtype, requires_grad=True) for s in shapes]
    biases = [(heads, agents, keys or tokens), (heads, tokens, agents)]
    return qkva, [torch.randn(s, dtype=dtype, requires_grad=True) for s in biases]


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize(
    "shape",
    [dict(tokens=1, agents=1), dict(tokens=63, dim=40), dict(kv_heads=2), dict(keys=11, agents=20)],
    ids=str,
)
def test_equals_the_formula(shape, biased):
    (q, k, v, agents), biases = inputs(**shape)
    settings = dict(zip(("key_bias", "query_bias"), biases, strict=True)) if biased else {}
    leaves = [q, k, v, agents, *settings.values()]
    groups = q.shape[2] // k.shape[2]
    for scales in ({}, {"scale": 0.3}, {"scale": 0.3, "agent_scale": 0.7}):
        out = agent_attention(q, k, v, agents, **scales, **settings)
        want = written_out(
            q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2), agents, **scales, **settings
        )
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(reference.agent_attention(q, k, v, agents, **scales, **settings), want)
        grad = torch.randn_like(want)
        names = ("dq", "dk", "dv", "dagents", "dkey_bias", "dquery_bias")
        got, expected = (torch.autograd.grad(o, leaves, grad) for o in (out, want))
        for name, a, b in zip(names, got, expected, strict=False):
            torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_the_formula(dtype, assert_accurate):
    qkva, biases = inputs(tokens=200, dim=40, dtype=dtype)
    settings = dict(zip(("key_bias", "query_bias"), biases, strict=True))
    out = agent_attention(*qkva, **settings)
    exact = written_out(*(x.double() for x in qkva), **{k: b.double() for k, b in settings.items()})
    assert out.dtype == dtype
    assert_accurate("out", out, written_out(*qkva, **settings), exact)


def test_every_token_an_agent_of_itself():
    """Agents that see one key each and queries that read one agent each hand v over."""
    (q, k, v, _), _ = inputs(tokens=6)
    sharp = 1e4 * torch.eye(6, dtype=q.dtype)[None]
    torch.testing.assert_close(agent_attention(q, k, v, q, key_bias=sharp, query_bias=sharp), v)
    assert (agent_attention(q, k, v, q) - v).abs().max() > 1e-2


CELLS = [((1, 1), (1, 1)), ((5, 7), (2, 3)), ((5, 7), (5, 7)), ((5, 7), (7, 2)), ((2, 3, 5), (1, 2, 3))]


@pytest.mark.parametrize("late", [False, True], ids=["known", "tensor"])
@pytest.mark.parametrize(("grid", "cells"), CELLS, ids=str)
def test_agents_are_means_of_cells(grid, cells, late):
    x = torch.randn(2, math.prod(grid), 3, 4, dtype=torch.float64, requires_grad=True)
    want = pooled(x, grid, cells)
    out = pool_agents(x, grid=torch.tensor(grid) if late else grid, agents=cells)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(reference.pool_agents(x, grid=grid, agents=cells), want)
    grad = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(out, x, grad), torch.autograd.grad(want, x, grad))


def test_pooling_tells_rows_from_columns():
    x = torch.randn(1, 35, 1, 4, dtype=torch.float64)
    out = pool_agents(x, grid=(5, 7), agents=(2, 3))
    assert (pool_agents(x, grid=(7, 5), agents=(2, 3)) - out).abs().max() > 1e-2
    assert (pool_agents(x, grid=(5, 7), agents=(3, 2)) - out).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_means_of_large_cells_keep_their_precision(dtype):
    x = (torch.randn(1, 128 * 128, 1, 4) + 30).to(dtype)  # their sum is beyond fp16
    got = pool_agents(x, grid=(128, 128), agents=1).double()
    want = x.double().mean(1, keepdim=True)
    assert (got - want).abs().max() <= torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize("late", [False, True], ids=["known", "tensor"])
@pytest.mark.parametrize("grid", [*GRIDS, (16, 9)], ids=str)
def test_tables_are_resized_bilinearly(grid, late):
    table, tokens = torch.randn(2, 3, 7, 7, dtype=torch.float64, requires_grad=True), math.prod(grid)
    want = resized(table, grid)
    out = resize_bias(table, grid=torch.tensor(grid) if late else grid, tokens=tokens)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(reference.resize_bias(table, grid=grid, tokens=tokens), want)
    grad = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(out, table, grad), torch.autograd.grad(want, table, grad))
    if grid == (16, 9):
        assert (resize_bias(table, grid=(9, 16), tokens=tokens) - want).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("agents", "grid", "cells"),
    [
        (49, (64, 64), (7, 7)),
        (49, (24, 1024), (1, 49)),
        (64, (32, 128), (4, 16)),
        (64, (128, 32), (16, 4)),
        (6, (6, 9), (2, 3)),
        (8, (8, 8), (2, 4)),  # of two equally good ones, fewer rows
        (7, (64, 64), (1, 7)),
        (12, (2, 12), (1, 12)),  # cells of 2 x 1; those of 2 x 6 are 1 x 2
        (16, (3, 30), (1, 16)),
        (16, (8, 30), (2, 8)),
        (6, (1, 12), (1, 6)),  # one row cannot hold two cells
        (12, (3, 8, 8), (1, 3, 4)),
        (1, (1, 1), (1, 1)),
        ((2, 5), (5, 7), (2, 5)),
    ],
    ids=str,
)
def test_a_number_of_agents_is_factorised(agents, grid, cells):
    assert agent_grid(agents, grid) == cells
    if math.prod(grid) < 100:
        x = torch.randn(1, math.prod(grid), 1, 2, dtype=torch.float64)
        for g in (grid, torch.tensor(grid)):
            torch.testing.assert_close(pool_agents(x, grid=g, agents=agents), pooled(x, grid, cells))


def test_equally_long_grids_do_not_share_weights():
    x, table = torch.randn(1, 64, 1, 4), torch.randn(1, 2, 7, 7)
    for grid in [(8, 8), (16, 4), (4, 16), (8, 8)]:
        want = reference.pool_agents(x, grid=grid, agents=4)
        torch.testing.assert_close(pool_agents(x, grid=grid, agents=4), want)
        torch.testing.assert_close(
            resize_bias(table, grid=grid, tokens=64), reference.resize_bias(table, grid=grid, tokens=64)
        )


def test_weights_made_in_inference_mode_serve_training_and_survive_changes():
    x, table = torch.randn(1, 33, 1, 4, requires_grad=True), torch.randn(1, 2, 7, 7, requires_grad=True)
    with torch.inference_mode():
        pool_agents(x.detach(), grid=(3, 11), agents=4).zero_()
        resize_bias(table.detach(), grid=(3, 11), tokens=33).zero_()
    torch.ops.linfusion.agent_weights(None, [3, 11], [4], 33, torch.float32, torch.device("cpu")).zero_()
    out = pool_agents(x, grid=(3, 11), agents=4)
    torch.testing.assert_close(out, reference.pool_agents(x, grid=(3, 11), agents=4))
    (out.sum() + resize_bias(table, grid=(3, 11), tokens=33).sum()).backward()
    assert x.grad is not None and table.grad is not None


def test_opcheck():
    settings = (torch.float32, torch.device("cpu"))
    for grid in ((None, [4, 5]), (torch.tensor([4, 5]), [])):
        torch.library.opcheck(torch.ops.linfusion.agent_weights.default, (*grid, [6], 20, *settings))
        torch.library.opcheck(torch.ops.linfusion.resize_weights.default, (*grid, [7, 7], 20, *settings))


def test_compiles_whole():
    def whole(q, k, v, table, grid):
        bias = resize_bias(table, grid=grid, tokens=q.shape[1])
        return agent_attention(q, k, v, pool_agents(q, grid=grid, agents=6), key_bias=bias, query_bias=bias.mT)

    (q, k, v, _), _ = inputs(tokens=30)
    table = torch.randn(4, 6, 7, 7, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    want = whole(q, k, v, table, (6, 5))
    expected = torch.autograd.grad(want.square().sum(), (q, table))
    for grid in ((6, 5), torch.tensor([6, 5])):
        got = compiled(q, k, v, table, grid)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.square().sum(), (q, table)), expected)


Q, TABLE = torch.randn(2, 20, 4, 8), torch.randn(4, 3, 7, 7)


def attend(**biases):
    return agent_attention(Q, Q, Q, Q[:, :3], **biases)


BAD = {
    "agents of another width": (lambda: agent_attention(Q, Q, Q, Q[..., :4]), "agents must be"),
    "agents of another batch": (lambda: agent_attention(Q, Q, Q, Q[:1]), "agents must be"),
    "bias of another length": (lambda: attend(key_bias=torch.ones(4, 3, 19)), "key_bias must"),
    "biases exchanged": (lambda: attend(query_bias=torch.ones(4, 3, 20)), "query_bias must"),
    "more agents than tokens": (lambda: pool_agents(Q, grid=(4, 5), agents=21), "no more than the 20 tokens"),
    "more cells than tokens": (lambda: pool_agents(Q, grid=(4, 5), agents=(3, 7)), "no more than the 20 tokens"),
    "no agents": (lambda: pool_agents(Q, grid=(4, 5), agents=0), "must be positive"),
    "cells of another rank": (lambda: pool_agents(Q, grid=(4, 5), agents=(1, 2, 2)), "has 3 axes, the grid has 2"),
    "another grid": (lambda: pool_agents(Q, grid=(4, 4), agents=2), "4 x 4 = 16"),
    "another late grid": (lambda: pool_agents(Q, grid=torch.tensor([4, 4]), agents=2), "4 x 4 = 16"),
    "table for another grid": (lambda: resize_bias(TABLE, grid=(4, 4), tokens=20), "4 x 4 = 16"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
