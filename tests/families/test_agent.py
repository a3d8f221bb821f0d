"""`Agent` inside hosts, layer by layer, against its published formula written out in float64."""

import pytest
import torch
import torch.nn.functional as F

import linfusion as lf

from ..models import TEXT, TINY, forward, gap
from .test_linfusion import PLAIN, heads, layers, linear, turn, wide
from .test_lit import GRIDS, assert_layer, convolved, exact_text, flux_parts, train

CELLS = {(6, 9): (2, 3), (3, 5): (2, 3)}
"""What six agents make of each grid."""


def agent_attention(q, k, v, grid, cells, m):
    """reference/mechanisms.md, 1.3, without the tables per row and column: `[B, H, N, D]`."""
    n, scale = q.shape[2], q.shape[-1] ** -0.5
    image = q.transpose(2, 3).flatten(1, 2).unflatten(2, grid)
    agents = F.adaptive_avg_pool2d(image, cells).flatten(2).unflatten(1, (q.shape[1], -1)).transpose(2, 3)
    from_keys, to_queries = scale * agents @ k.transpose(-1, -2), scale * q @ agents.transpose(-1, -2)
    if hasattr(m, "key_bias"):
        b1, b2 = (F.interpolate(b.double(), size=grid, mode="bilinear").flatten(2) for b in (m.key_bias, m.query_bias))
        assert b1.shape == (q.shape[1], cells[0] * cells[1], n)
        from_keys, to_queries = from_keys + b1, to_queries + b2.transpose(1, 2)
    return to_queries.softmax(-1) @ (from_keys.softmax(-1) @ v)


def published(attn, x, grid, cells, local=True):
    x = x.double()
    q, k, v = (heads(linear(x, to), attn.heads) for to in (attn.to_q, attn.to_k, attn.to_v))
    out = agent_attention(q, k, v, grid, cells, attn.linfusion).transpose(1, 2).flatten(2)
    if local:
        out = out + convolved(linear(x, attn.to_v), grid, attn.linfusion.local, 1)  # a weight for every channel
    return linear(out, attn.to_out[0])


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("settings", [dict(agents=6), dict(agents=(2, 3), kernel_size=5, bias=False)], ids=str)
def test_agent_is_the_published_formula(name, settings):
    model = lf.apply(TINY[name].build().double(), lf.Agent(**settings))
    train(model)
    seen = layers(model, wide(TINY[name].inputs(6, 9)))
    assert len(seen) == TINY[name].layers
    for attn, given, out in seen:
        x = given["hidden_states"]
        grid = GRIDS[x.shape[1]]
        assert gap(out, published(attn, x, grid, CELLS[grid])) < 1e-9
        assert gap(out, published(attn, x, grid, CELLS[grid], local=False)) > 1e-4
        assert gap(out, published(attn, x, grid, CELLS[grid][::-1])) > 1e-4
        assert gap(out, published(attn, x, grid[::-1], CELLS[grid])) > 1e-4


@pytest.mark.parametrize("name", PLAIN)
def test_a_fresh_layer_has_no_bias_and_no_convolution(name):
    model = lf.apply(TINY[name].build().double(), lf.Agent(6))
    for attn, given, out in layers(model, wide(TINY[name].inputs(6, 9))):
        assert all(not p.any() for p in attn.linfusion.parameters())
        x, bare = given["hidden_states"], lf.Agent(6, bias=False)
        attn.linfusion = bare.build(attn.linfusion.site).double()
        grid = GRIDS[x.shape[1]]
        assert gap(out, published(attn, x, grid, CELLS[grid], local=False)) < 1e-9


@pytest.mark.parametrize("bias", [True, False], ids=["biased", "plain"])
def test_on_flux_agents_are_pooled_from_rotated_queries_and_text_stays_exact(bias):
    tiny = TINY["flux"]
    model = lf.apply(tiny.build(), lf.Agent(6, bias=bias))
    train(model)
    seen = layers(model, tiny.inputs(6, 9))
    assert len(seen) == tiny.layers
    for attn, given, out in seen:
        q, k, v, tables, leave = flux_parts(attn, given)
        local = heads(convolved(v.transpose(1, 2).flatten(2)[:, TEXT:], (6, 9), attn.linfusion.local, 1), attn.heads)

        def layer(rotated_q, rotated_k):
            image = agent_attention(rotated_q, rotated_k, v[:, :, TEXT:], (6, 9), (2, 3), attn.linfusion)  # noqa: B023
            whole = exact_text(q, k, v, tables, image)  # noqa: B023
            whole[:, :, TEXT:] += local  # noqa: B023
            return leave(whole)  # noqa: B023

        rotated = [turn(x, tables)[:, :, TEXT:] for x in (q, k)]
        assert_layer(out, layer(*rotated))
        with pytest.raises(AssertionError):
            assert_layer(out, layer(*(x[:, :, TEXT:] for x in (q, k))), 1e-2)


def test_the_same_weights_serve_every_size():
    """Biases are resized with the grid: what was trained on one runs on the others."""
    tiny = TINY["pixart"]
    model = lf.apply(tiny.build().double(), lf.Agent(6))
    train(model)
    for grid in ((6, 9), (9, 4), (5, 7)):
        cells = (3, 2) if grid == (9, 4) else (2, 3)
        for attn, given, out in layers(model, wide(tiny.inputs(*grid))):
            assert gap(out, published(attn, given["hidden_states"], grid, cells)) < 1e-9


def test_more_agents_than_tokens(tiny, model, inputs):
    """Only the grid tells, so the first call says so; the model still restores."""
    stock = forward(model, inputs)
    lf.apply(model, lf.Agent(1000))
    with pytest.raises(ValueError, match=r"attn.*: 1000 agents are more than the grid's \d+ tokens"):
        forward(model, inputs)
    lf.restore(model)
    assert torch.equal(forward(model, inputs), stock)


def test_cells_for_another_rank_are_refused_when_applied(tiny, model):
    with pytest.raises(ValueError, match=r"attn.*agents=\(1, 2(, 2)?(, 1)?\) has \d axes, the grid has \d"):
        lf.apply(model, lf.Agent((1, 2) if tiny.frames else (1, 2, 2)))
