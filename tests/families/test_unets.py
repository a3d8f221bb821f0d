"""UNets beyond plain pictures: temporal layers stay the host's, and ControlNets work beside and by themselves."""

import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline

import linfusion as lf

from ..models import HOSTS, ddim, forward, gap, noise, processors
from ..models.base import draw, vae
from .matrix import CONFIGS


@pytest.mark.parametrize("name", ["motion", "svd"])
def test_attention_over_time_is_left_alone(name):
    tiny = HOSTS[name]
    model = tiny.build()
    before = processors(model)
    lf.apply(model, lf.CLEAR(2))
    report = lf.describe(model)
    over_time = [r for r in report.layers if r.reason == "temporal attention"]
    assert over_time and report.replaced == tiny.layers
    for line in report.layers:
        over = "temporal" in line.layer or "motion_modules" in line.layer
        assert not (over and line.mechanism)
        assert (model.get_submodule(line.layer).processor is before[line.layer]) == (line.mechanism is None)


@pytest.mark.parametrize("name", ["motion", "svd"])
def test_frames_do_not_see_each_other_in_replaced_layers(name):
    """Every layer's batch is samples times frames, so one frame's tokens reach another only through the host."""
    model, inputs = HOSTS[name].build(), HOSTS[name].inputs(6, 9)
    seen = []
    lf.apply(model, lf.CLEAR(100))
    for module in model.modules():
        if hasattr(module, "linfusion"):
            module.linfusion.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    forward(model, inputs)
    for call, out in seen:
        for row in range(HOSTS[name].rows):
            q, k = call.rotated()
            alone = call.exact(q[row : row + 1], k[row : row + 1], call.v[row : row + 1])
            assert gap(out[row : row + 1], alone) < 1e-5


def controlled() -> StableDiffusionControlNetPipeline:
    pipe = StableDiffusionControlNetPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, unet=HOSTS["unet-sd15"].build(), scheduler=ddim(),
        controlnet=HOSTS["controlnet"].build(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, scale=1.0):
    condition = noise(2, 3, 16, 24, seed=6).sigmoid()
    return draw(pipe, 16, image=condition, controlnet_conditioning_scale=scale, guidance_scale=4.0)


@pytest.mark.parity
def test_a_unet_beside_a_controlnet():
    """The residuals of a stock ControlNet enter a replaced UNet."""
    pipe = controlled()
    stock, without = picture(pipe), picture(pipe, scale=0.0)
    assert gap(stock, without) > 1e-2
    before = processors(pipe.controlnet)
    lf.apply(pipe, lf.Softmax())
    assert processors(pipe.controlnet) == before
    assert torch.equal(picture(pipe), stock)
    lf.apply(pipe, lf.CLEAR(100))
    assert gap(picture(pipe), stock) < 1e-4  # several steps
    for config in (c for c in CONFIGS.values() if not isinstance(c, lf.Softmax)):
        lf.apply(pipe, config)
        near, near_without = picture(pipe), picture(pipe, scale=0.0)
        assert gap(near, stock) > 1e-2 and gap(near, near_without) > 1e-2, config
    lf.restore(pipe)
    assert torch.equal(picture(pipe), stock)


@pytest.mark.parity
def test_a_controlnet_by_itself_or_with_its_unet():
    pipe = controlled()
    stock = picture(pipe)
    lf.apply(pipe.controlnet, lf.Softmax())
    assert torch.equal(picture(pipe), stock)
    lf.apply(pipe, lf.Softmax())
    assert torch.equal(picture(pipe), stock)
    lf.apply(pipe.controlnet, lf.CLEAR(2))
    assert gap(picture(pipe), stock) > 1e-3
    lf.restore(pipe)  # the UNet's; the ControlNet has its own
    assert lf.describe(pipe.controlnet).replaced == HOSTS["controlnet"].layers
    lf.restore(pipe.controlnet)
    assert torch.equal(picture(pipe), stock)
