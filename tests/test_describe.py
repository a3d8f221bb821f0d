"""`describe`: what was replaced and what was not, why, and how much attention is left."""

import json

import pytest
import torch
from torch import nn

import linfusion as lf

from .models import TEXT, TINY, forward, processors

REASONS = {"replaced", "not chosen", "cross-attention"}


def test_before_apply(tiny, model):
    report = lf.describe(model)
    assert report.model == tiny.family and report.replaced == 0 and report.attention_work_left is None
    assert [r.layer for r in report.layers] == list(processors(model))
    assert {r.reason for r in report.layers} <= {"not chosen", "cross-attention"}
    assert sum(r.reason == "not chosen" for r in report.layers) == tiny.layers


def test_every_layer_has_its_line(tiny, model, inputs):
    lf.apply(model, lf.CLEAR(2, pool=2), layers=tiny.some)
    forward(model, inputs)
    report = lf.describe(model)
    lines = {r.layer: r for r in report.layers}
    assert list(lines) == list(processors(model)) and {r.reason for r in report.layers} <= REASONS
    on = {name for name, m in model.named_modules() if hasattr(m, "linfusion")}
    assert report.replaced == len(on) and 0 < len(on) < tiny.layers
    for name, line in lines.items():
        if name in on:
            assert (line.mechanism, line.parameters, line.reason) == (str(lf.CLEAR(2, pool=2)), 4, "replaced")
            assert line.grid == (6, 9)
            assert line.text == (TEXT if lf.families()[tiny.family].joint else None)
        else:
            assert (line.mechanism, line.grid, line.text, line.parameters) == (None, None, None, 0)
            cross = getattr(model.get_submodule(name), "is_cross_attention", False)
            assert line.reason == ("cross-attention" if cross else "not chosen")


def test_to_dict_is_json(tiny, model, inputs):
    forward(lf.apply(model, lf.CLEAR((2, 4))), inputs)
    report = lf.describe(model)
    data = json.loads(json.dumps(report.to_dict()))
    assert data.keys() == {"model", "layers", "attention_work_left", "replaced"}
    assert data["replaced"] == tiny.layers and data["attention_work_left"] == report.attention_work_left
    assert data["layers"][0].keys() == {"layer", "mechanism", "grid", "text", "parameters", "reason", "backend"}
    grids = {tuple(r["grid"]) for r in data["layers"] if r["mechanism"]}
    assert (6, 9) in grids


def test_the_table(tiny, model, inputs):
    forward(lf.apply(model, lf.CLEAR(2)), inputs)
    report = lf.describe(model)
    text = " ".join(str(report).split())
    total = len(report.layers)
    assert f"{tiny.family}: {tiny.layers} of {total} attention layers replaced" in text
    assert f"{report.attention_work_left:.1%} of the self-attention work left" in text
    assert str(lf.CLEAR(2)) in text and "6 x 9" in text
    assert max(map(len, str(report).splitlines())) <= 120


def brute(grid, text, radius, pool):
    """Query-key pairs of one head, counted one by one."""
    h, w = grid
    tokens = [(y, x) for y in range(h) for x in range(w)]
    near = sum((a - y) ** 2 + (b - x) ** 2 < radius**2 for a, b in tokens for y, x in tokens)
    cells = len({(y // pool, x // pool) for y, x in tokens}) if pool > 1 else 0
    return near + len(tokens) * (text + cells) + text * (len(tokens) + text)


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_attention_work_left_is_counted(tiny, model, pool):
    """At the sizes of the latest forward, over all self-attention, replaced or not."""
    lf.apply(model, lf.CLEAR(3, pool=pool), layers=tiny.some)
    assert lf.describe(model).attention_work_left is None
    text = TEXT if lf.families()[tiny.family].joint else 0
    for grid in ((6, 9), (9, 5)):
        forward(model, tiny.inputs(*grid))
        half = tuple((n + 1) // 2 for n in grid)
        done = exact = 0
        for name in processors(model):
            if getattr(model.get_submodule(name), "is_cross_attention", False):
                continue
            here = half if name.startswith("mid_block") else grid
            attn = model.get_submodule(name)
            channels = attn.to_q.out_features
            full = (here[0] * here[1] + text) ** 2
            exact += channels * full
            done += channels * (brute(here, text, 3, pool) if hasattr(attn, "linfusion") else full)
        assert lf.describe(model).attention_work_left == pytest.approx(done / exact, rel=1e-12)


def test_the_work_of_exact_and_of_linear_attention(tiny, model, inputs):
    forward(lf.apply(model, lf.Softmax()), inputs)
    assert lf.describe(model).attention_work_left == 1
    forward(lf.apply(model, lf.LinFusion()), inputs)
    report = lf.describe(model)
    # a state of D x D per head, built and read: N * D pairs' worth; text stays exact
    done = exact = 0
    for line in report.layers:
        if line.mechanism:
            n, t = line.grid[0] * line.grid[1] if line.grid else 54, line.text or 0
            attn = model.get_submodule(line.layer)
            channels = attn.to_q.out_features
            done += channels * (n * attn.linfusion.site.head_dim + t * (n + t) + n * t)
            # the two MLPs' products; a pair costs each channel two multiplications
            mlps = [m for m in attn.linfusion.modules() if isinstance(m, nn.Linear)]
            done += n * sum(m.in_features * m.out_features for m in mlps) / 2
            exact += channels * (n + t) ** 2
    assert report.attention_work_left == pytest.approx(done / exact, rel=1e-12)


def test_a_pipeline_is_its_denoiser(tiny):
    pipe = tiny.build_pipeline()
    lf.apply(pipe, lf.CLEAR(2))
    model = getattr(pipe, "unet", None) or pipe.transformer
    assert lf.describe(pipe) == lf.describe(model)
    tiny.draw(pipe, 1.0)
    assert lf.describe(pipe).attention_work_left < 1


def test_what_was_set_over_it(model, tiny):
    """A user who set other processors by hand is told that the mechanism is off."""
    stock = dict(model.attn_processors)
    lf.apply(model, lf.CLEAR(2))
    name, processor = next((n, p) for n, p in stock.items() if hasattr(model.get_submodule(n[:-10]), "linfusion"))
    model.get_submodule(name[:-10]).set_processor(type(processor)())
    line = next(r for r in lf.describe(model).layers if f"{r.layer}.processor" == name)
    assert line.mechanism is None and "was set over it" in line.reason and type(processor).__name__ in line.reason
    assert lf.describe(model).replaced == tiny.layers - 1


def test_temporal_attention_is_left_alone():
    """Same names, another axis: `attn1` of a temporal block attends along time."""
    model = TINY["unet-sd15"].build()
    block = model.down_blocks[0].attentions[0]
    block.temporal_transformer_blocks = nn.ModuleList([block.transformer_blocks[0].__class__(16, 2, 8)])
    lf.apply(model, lf.CLEAR(2))
    lines = {r.layer: r for r in lf.describe(model).layers}
    temporal = [r for name, r in lines.items() if "temporal" in name]
    assert temporal and all(r.mechanism is None for r in temporal)
    assert next(r for r in temporal if r.layer.endswith("attn1")).reason == "temporal attention"
    lf.restore(model)


def test_unsupported_models():
    for thing in (nn.Linear(2, 2), nn.Sequential(TINY["flux"].build())):
        with pytest.raises(ValueError, match=r"is not supported\. Supported: UNet2DConditionModel"):
            lf.describe(thing)
    with pytest.raises(ValueError, match="pass a diffusers pipeline or model"):
        lf.describe(torch.ones(1))
