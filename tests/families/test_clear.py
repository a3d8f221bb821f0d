"""`CLEAR` inside each host against the host itself, whose own attention is given a dense mask written out here."""

import math

import pytest
import torch
import torch.nn.functional as F

import linfusion as lf

from ..models import TEXT, TINY, forward, gap

GRIDS = [(6, 9), (9, 4), (5, 7)]


def windows(height, width, inside) -> torch.Tensor:
    """`[N, N]`: which token sees which, token by token; `inside(dy, dx)` is the rule."""
    tokens = [(y, x) for y in range(height) for x in range(width)]
    return torch.tensor([[inside(a - y, b - x) for y, x in tokens] for a, b in tokens])


def disc(radius):
    return lambda dy, dx: dy * dy + dx * dx < radius * radius


def dense(monkeypatch, tiny, grid, inside, *, text_first=True, turned=False, weights=None):
    """The stock model's output when its own self-attention sees only windows, text and, with `weights`, pooled keys.

    `text_first=False` and `turned` (columns for rows) are mistakes that a comparison must notice.
    """
    model, inputs = tiny.build(), tiny.inputs(*grid)
    joint = lf.families()[tiny.family].joint
    text = TEXT if joint else 0
    grids = [grid, tuple(math.ceil(n / 2) for n in grid)] if tiny.family.startswith("UNet") else [grid]
    masks, sizes = {}, {}
    for h, w in grids:
        mask = torch.ones(text + h * w, text + h * w, dtype=torch.bool)
        image = slice(text, None) if text_first else slice(0, h * w)
        mask[image, image] = windows(w, h, inside) if turned else windows(h, w, inside)
        masks[text + h * w], sizes[text + h * w] = mask, (h, w)
    real, seen = F.scaled_dot_product_attention, []

    def masked(query, key, value, attn_mask=None, **settings):
        q, k, v = query, key, value
        if q.shape[2] != k.shape[2]:  # cross-attention
            return real(q, k, v, attn_mask=attn_mask, **settings)
        assert attn_mask is None
        seen.append(q.shape[2])
        mask = masks[q.shape[2]]
        if weights is not None:
            h, w = sizes[q.shape[2]]
            k, v = (torch.cat((x, pooled(x[:, :, text:], h, w, weights)), dim=2) for x in (k, v))
            extra = torch.ones(mask.shape[0], k.shape[2] - mask.shape[1], dtype=torch.bool)
            extra[:text] = False
            mask = torch.cat((mask, extra), dim=1)
        return real(q, k, v, attn_mask=mask, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", masked)
        out = forward(model, inputs)
    assert len(seen) == tiny.layers
    return out


def pooled(x, height, width, weights):
    """`[B, H, N, D]` to one vector a cell; what the border cuts off a cell, the rest of it makes up for."""
    p, cells = len(weights), []
    for top in range(0, height, p):
        for left in range(0, width, p):
            places = [(y, z) for y in range(top, min(top + p, height)) for z in range(left, min(left + p, width))]
            total = sum(weights[y - top, z - left] * x[:, :, y * width + z] for y, z in places)
            cells.append(total * p * p / len(places))
    return torch.stack(cells, dim=2)


def clear(tiny, grid, *args, **settings):
    model = lf.apply(tiny.build(), lf.CLEAR(*args, **settings))
    return forward(model, tiny.inputs(*grid))


@pytest.mark.parametrize("radius", [1, 2, 3, 2.5], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_clear_is_the_host_with_a_dense_mask(tiny, monkeypatch, grid, radius):
    assert gap(clear(tiny, grid, radius), dense(monkeypatch, tiny, grid, disc(radius))) < 1e-5


def test_one_radius_per_axis_is_an_ellipse(tiny, monkeypatch):
    want = dense(monkeypatch, tiny, (6, 9), lambda dy, dx: 16 * dy * dy + 4 * dx * dx < 64)
    assert gap(clear(tiny, (6, 9), (2, 4)), want) < 1e-5
    assert gap(clear(tiny, (6, 9), (4, 2)), want) > 1e-2


def test_what_would_be_noticed(tiny, monkeypatch):
    """The same comparison fails by far for each plausible mistake."""
    grid = (6, 9)
    got = clear(tiny, grid, 4)
    assert gap(dense(monkeypatch, tiny, grid, lambda dy, dx: dy * dy + dx * dx <= 16), got) > 1e-2, "the rule is strict"
    assert gap(dense(monkeypatch, tiny, grid, lambda dy, dx: max(abs(dy), abs(dx)) < 4), got) > 1e-2, (
        "a disc, not a square"
    )
    assert gap(dense(monkeypatch, tiny, grid, disc(4), turned=True), got) > 1e-2, "rows are rows"
    model = lf.apply(tiny.build(), lf.CLEAR(4), layers=tiny.some)
    assert gap(forward(model, tiny.inputs(*grid)), got) > 1e-2, "every layer counts"
    if lf.families()[tiny.family].joint:
        assert gap(dense(monkeypatch, tiny, grid, disc(4), text_first=False), got) > 1e-2, "text comes first"


def test_a_radius_that_covers_the_grid_is_stock(tiny, model, inputs):
    stock = forward(model, inputs)
    for radius in (10.9, 1000, (10, 12)):
        lf.apply(model, lf.CLEAR(radius))
        assert gap(forward(model, inputs), stock) < 1e-5, radius
    lf.apply(model, lf.CLEAR(8))  # the 6 x 9 grid's corners no longer see each other
    assert gap(forward(model, inputs), stock) > 1e-2


@pytest.mark.parametrize("trained", [False, True], ids=["averages", "trained"])
@pytest.mark.parametrize("grid", [(6, 8), (5, 7)], ids=str)
def test_pooled_clear_is_the_host_with_pooled_keys(tiny, monkeypatch, grid, trained):
    """Cells of 2 x 2, cut by the border on the odd grid; text queries do not see them."""
    model, weights = lf.apply(tiny.build(), lf.CLEAR(2, pool=2)), torch.full((2, 2), 0.25)
    if trained:
        weights = torch.tensor([[0.4, 0.1], [-0.2, 0.6]])
        for name, parameter in model.named_parameters():
            if name.endswith("pool_weight"):
                parameter.data.copy_(weights)
    got = forward(model, tiny.inputs(*grid))
    assert gap(got, dense(monkeypatch, tiny, grid, disc(2), weights=weights)) < 1e-5
    assert gap(got, dense(monkeypatch, tiny, grid, disc(2))) > 1e-2


def test_text_is_global_both_ways():
    """With radius 1 an image token sees itself and the text: changing one far token still reaches all through text."""
    tiny = TINY["flux"]
    model = lf.apply(tiny.build(), lf.CLEAR(1))
    inputs = tiny.inputs(5, 7)
    before = forward(model, inputs)
    inputs["hidden_states"] = inputs["hidden_states"].clone()
    inputs["hidden_states"][:, 0] += 1
    assert ((forward(model, inputs) - before).abs().amax(dim=-1) > 1e-5).all()
