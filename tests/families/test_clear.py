"""`CLEAR` inside each host against the host itself, whose own attention is given a dense mask written out here."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import linfusion as lf

from ..models import TINY, forward, gap, grids_for


def windows(grid, inside) -> torch.Tensor:
    """`[N, N]`: which token sees which, token by token; `inside(dy, dx)` or `inside(dt, dy, dx)` is the rule."""
    tokens = list(itertools.product(*map(range, grid)))
    return torch.tensor([[inside(*(a - b for a, b in zip(one, two, strict=True))) for two in tokens] for one in tokens])


def disc(radius):
    return lambda *d: sum(x * x for x in d) < radius * radius


def dense(monkeypatch, tiny, grid, inside, *, text_first=None, turned=False, weights=None):
    """The stock model's output when its own self-attention sees only windows, text and, with `weights`, pooled keys.

    `text_first` (text on the wrong side) and `turned` (columns for rows) are mistakes that a comparison must notice.
    """
    model, inputs = tiny.build(), tiny.inputs(*grid)
    runs = {run.tokens: run for run in tiny.sequences(*grid)}
    masks = {}
    for tokens, run in runs.items():
        before = run.before if text_first is None else (run.before + run.after) * text_first
        image = slice(before, before + math.prod(run.grid))
        masks[tokens] = torch.ones(tokens, tokens, dtype=torch.bool)
        shape = (*run.grid[:-2], run.grid[-1], run.grid[-2]) if turned else run.grid
        masks[tokens][image, image] = windows(shape, inside)
    if tiny.masks is not None:
        shape = tiny.grid(*grid)
        shape = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
        masks = tiny.masks(shape, lambda shape: windows(shape, inside))
    real, seen = F.scaled_dot_product_attention, []

    def masked(query, key, value, attn_mask=None, *more, **settings):
        q, k, v = query, key, value
        if q.shape[2] != k.shape[2] or q.shape[2] not in masks:  # cross-attention, text alone
            return real(q, k, v, attn_mask, *more, **settings)
        seen.append(q.shape[2])
        mask = masks[q.shape[2]]
        if weights is not None:
            run = runs[q.shape[2]]
            image = slice(run.before, run.before + math.prod(run.grid))
            k, v = (torch.cat((x, pooled(x[:, :, image], run.grid, weights)), dim=2) for x in (k, v))
            extra = torch.zeros(mask.shape[0], k.shape[2] - mask.shape[1], dtype=torch.bool)
            extra[image] = True
            mask = torch.cat((mask, extra), dim=1)
        if attn_mask is not None:  # the host's own: padding
            keep = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -1
            keep = keep.expand(*keep.shape[:-1], q.shape[2])
            mask = mask & F.pad(keep, (0, mask.shape[-1] - keep.shape[-1]), value=True)
        return real(q, k, v, mask, *more, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", masked)
        out = forward(model, inputs)
    assert len(seen) == tiny.layers
    return out


def pooled(x, grid, weights):
    """`[B, H, N, D]` to one vector a cell of each frame; the rest of a cell makes up for what the border cuts off."""
    (height, width), p, cells = grid[-2:], len(weights), []
    for frame in range(math.prod(grid[:-2])):
        for top in range(0, height, p):
            for left in range(0, width, p):
                places = [(y, z) for y in range(top, min(top + p, height)) for z in range(left, min(left + p, width))]
                tokens = [x[:, :, (frame * height + y) * width + z] for y, z in places]
                total = sum(weights[y - top, z - left] * t for (y, z), t in zip(places, tokens, strict=True))
                cells.append(total * p * p / len(places))
    return torch.stack(cells, dim=2)


def clear(tiny, grid, *args, **settings):
    model = lf.apply(tiny.build(), lf.CLEAR(*args, **settings))
    return forward(model, tiny.inputs(*grid))


@pytest.mark.parametrize("radius", [1, 2, 3, 2.5], ids=str)
def test_clear_is_the_host_with_a_dense_mask(tiny, monkeypatch, radius):
    for grid in grids_for(tiny, (6, 9), (9, 4), (5, 7)):
        assert gap(clear(tiny, grid, radius), dense(monkeypatch, tiny, grid, disc(radius))) < 1e-5, grid


def per_axis(tiny, *radii):
    """One radius per axis; on video the window also reaches to neighbouring frames."""
    return radii if tiny.frames is None else (2, *radii)


def test_one_radius_per_axis_is_an_ellipse(tiny, monkeypatch):
    grid = grids_for(tiny, (6, 9))[0]

    def inside(dy, dx):
        return 16 * dy * dy + 4 * dx * dx < 64

    def inside_video(dt, dy, dx):
        return 16 * dt * dt + 16 * dy * dy + 4 * dx * dx < 64

    want = dense(monkeypatch, tiny, grid, inside if tiny.frames is None else inside_video)
    assert gap(clear(tiny, grid, per_axis(tiny, 2, 4)), want) < 1e-5
    assert gap(clear(tiny, grid, per_axis(tiny, 4, 2)), want) > 1e-2


def test_what_would_be_noticed(tiny, monkeypatch):
    """The same comparison fails by far for each plausible mistake."""
    grid = grids_for(tiny, (6, 9))[0]
    got = clear(tiny, grid, 4)
    assert gap(dense(monkeypatch, tiny, grid, lambda *d: sum(x * x for x in d) <= 16), got) > 1e-2, "the rule is strict"
    assert gap(dense(monkeypatch, tiny, grid, lambda *d: max(map(abs, d)) < 4), got) > 1e-2, "a disc, not a square"
    if not tiny.square:
        assert gap(dense(monkeypatch, tiny, grid, disc(4), turned=True), got) > 1e-2, "rows are rows"
    if tiny.frames is not None:
        # one frame away, a ball of radius 4 and a cylinder hold the same tokens: 15 is no sum of two squares, 8 is
        ball = clear(tiny, grid, 3)
        tube = dense(monkeypatch, tiny, grid, lambda dt, dy, dx: dy * dy + dx * dx < 9)
        apart = dense(monkeypatch, tiny, grid, lambda dt, dy, dx: dt == 0 and dy * dy + dx * dx < 9)
        assert gap(tube, ball) > 1e-2 and gap(apart, ball) > 1e-2, "frames are an axis"
    model = lf.apply(tiny.build(), lf.CLEAR(4), layers=tiny.some)
    assert gap(forward(model, tiny.inputs(*grid)), got) > 1e-2, "every layer counts"
    if tiny.masks is None and any(run.before or run.after for run in tiny.sequences(*grid)):
        other = any(run.after for run in tiny.sequences(*grid))
        assert gap(dense(monkeypatch, tiny, grid, disc(4), text_first=other), got) > 1e-2, "text on its side"


def test_a_radius_that_covers_the_grid_is_stock(tiny, model, inputs):
    stock = forward(model, inputs)
    for radius in (10.9, 1000, per_axis(tiny, 10, 12) if tiny.frames is None else (4, 10, 14)):
        lf.apply(model, lf.CLEAR(radius))
        assert gap(forward(model, inputs), stock) < 1e-5, radius
    lf.apply(model, lf.CLEAR(6))  # the corners no longer see each other
    assert gap(forward(model, inputs), stock) > 1e-2


@pytest.mark.parametrize("trained", [False, True], ids=["averages", "trained"])
def test_pooled_clear_is_the_host_with_pooled_keys(tiny, monkeypatch, trained):
    """Cells of 2 x 2, cut by the border on the odd grid; text queries do not see them."""
    if tiny.masks is not None:
        pytest.skip("its samples' tokens stand in different places; pooling is the same as in the other hosts")
    grid = grids_for(tiny, (5, 7))[0]
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
