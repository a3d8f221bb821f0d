"""The most valuable tests here: `Softmax`, which runs through `AttnCall` like any mechanism, is the stock model.

Bit for bit, on the oldest and the newest supported diffusers: what drifts in the host shows up here first.
"""

import math

import diffusers
import pytest
import torch

import linfusion as lf
from linfusion.call import AttnCall

from ..models import HOSTS, TEXT, TINY, Tiny, forward, gap, grids_for, make_unet, noise, processors, unet_inputs
from .matrix import CONFIGS

pytestmark = pytest.mark.parity


def test_every_family_has_a_tiny_host():
    known = {name for name in lf.families() if hasattr(diffusers, name)}  # the oldest diffusers lacks some
    missing = known - {t.family for t in HOSTS.values()}
    assert not missing, f"add a tiny {', '.join(missing)} to tests/models"


def test_the_hosts_really_attend(model, inputs):
    """Were attention invisible in the output, equality would prove nothing: every layer alone must matter."""
    stock = forward(model, inputs)
    for name in replaced(lf.apply(model, lf.CLEAR(radius=1))):
        lf.apply(model, lf.CLEAR(radius=1), layers=name)
        assert gap(forward(model, inputs), stock) > 1e-2, name


def test_softmax_is_the_stock_model(tiny, model):
    grids = grids_for(tiny, (6, 9), (9, 5), (8, 8), (18, 26))
    stock = [forward(model, tiny.inputs(*grid)) for grid in grids]
    lf.apply(model, lf.Softmax())
    for grid, want in zip(grids, stock, strict=True):
        assert torch.equal(forward(model, tiny.inputs(*grid)), want)


def test_every_call_goes_through_the_mechanism(tiny, model, inputs, monkeypatch):
    """Each self-attention layer once a forward, as an `AttnCall`; the stock processor never runs there."""
    calls, stock = {}, {}

    def record(mechanism, args, out):
        calls.setdefault(mechanism.site.name, []).append((*args, out))

    for cls in {type(p) for p in processors(model).values()}:
        assert cls.__module__.startswith("diffusers.")
        real = cls.__call__
        monkeypatch.setattr(
            cls,
            "__call__",
            lambda self, attn, *a, _real=real, **k: stock.update({attn: 1}) or _real(self, attn, *a, **k),
        )
    # CLEAR on one layer: some mechanism needs the grid, so every layer's is read
    lf.apply(model, {tiny.some: lf.CLEAR(radius=100), "*": lf.Softmax()})
    layers = replaced(model)
    assert len(layers) == tiny.layers
    for name in layers:
        model.get_submodule(name).linfusion.register_forward_hook(record)
    forward(model, inputs)
    forward(model, inputs)
    assert calls.keys() == set(layers) and all(len(c) == 2 for c in calls.values())
    assert not {n for n in layers if model.get_submodule(n) in stock}
    runs = {(run.grid, run.before + run.references, run.after) for run in tiny.sequences(6, 6 if tiny.square else 9)}
    seen = set()
    for name, ((call, out), _) in calls.items():
        site = model.get_submodule(name).linfusion.site
        assert isinstance(call, AttnCall)
        assert call.q.shape == out.shape and call.k.shape == call.v.shape
        assert call.q.shape[0] == tiny.rows and call.q.shape[2:] == (site.heads, site.head_dim) and site.name == name
        assert len(call.grid) == site.axes and (call.text == 0 or site.joint)
        assert call.q.shape[1] == math.prod(call.grid) + call.text
        seen.add((call.grid, *((call.text, 0) if call.text_first else (0, call.text))))
    assert seen == runs


@pytest.mark.parametrize("guidance", [1.0, 5.0], ids=["plain", "guided"])
@pytest.mark.parametrize("name", [name for name, tiny in HOSTS.items() if tiny.pipeline is not None])
def test_softmax_is_the_stock_pipeline(name, guidance):
    """With and without guidance, which doubles the batch or runs the model twice a step."""
    tiny = HOSTS[name]
    pipe = tiny.build_pipeline()
    stock = tiny.draw(pipe, guidance)
    assert lf.apply(pipe, lf.Softmax()) is pipe
    assert torch.equal(tiny.draw(pipe, guidance), stock)
    lf.apply(pipe, lf.CLEAR(radius=2))
    assert gap(tiny.draw(pipe, guidance), stock) > 1e-2
    lf.restore(pipe)
    assert torch.equal(tiny.draw(pipe, guidance), stock)


def masked_unet() -> tuple[torch.nn.Module, dict]:
    """Attention at one resolution only: a mask of the latents' tokens fits no other."""
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    tiny = Tiny("UNet2DConditionModel", lambda: make_unet(**blocks), unet_inputs, 4, "*", None, None)
    keep = noise(2, 6 * 9) > -0.5
    return tiny.build(), tiny.inputs(12, 18) | {"attention_mask": keep}


def masked_pixart() -> tuple[torch.nn.Module, dict]:
    tiny = TINY["pixart"]
    return tiny.build(), tiny.inputs(6, 9) | {"attention_mask": (noise(2, 6 * 9) > -0.5).float()}


@pytest.mark.parametrize("make", [masked_unet, masked_pixart])
def test_a_mask_is_honoured_or_refused(make):
    model, inputs = make()
    stock = forward(model, inputs)
    unmasked = forward(model, {k: v for k, v in inputs.items() if k != "attention_mask"})
    assert gap(stock, unmasked) > 1e-2
    lf.apply(model, lf.Softmax())
    assert torch.equal(forward(model, inputs), stock)
    for config in (c for c in CONFIGS.values() if not isinstance(c, lf.Softmax)):
        lf.apply(model, config)
        with pytest.raises(ValueError, match=r"attn1.*cannot honour an attention mask"):
            forward(model, inputs)
        lf.restore(model)
        assert torch.equal(forward(model, inputs), stock)


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if not lf.families()[tiny.family].joint])
def test_cross_attention_masks_stay_the_hosts(name):
    """The padding of the prompt is cross-attention's business: no mechanism refuses it."""
    tiny = TINY[name]
    model = tiny.build()
    keep = torch.tensor([[1] * TEXT, [1] * 3 + [0] * (TEXT - 3)])
    inputs = tiny.inputs(6, 9) | {"encoder_attention_mask": keep}
    stock = forward(model, inputs)
    lf.apply(model, lf.Softmax())
    assert torch.equal(forward(model, inputs), stock)
    lf.apply(model, lf.CLEAR(radius=100))
    torch.testing.assert_close(forward(model, inputs), stock, atol=1e-5, rtol=1e-5)


def replaced(model) -> list[str]:
    return [r.layer for r in lf.describe(model).layers if r.mechanism]
