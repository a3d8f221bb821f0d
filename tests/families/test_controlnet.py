"""ControlNets beside a replaced transformer, and ControlNets that are replaced themselves."""

import diffusers
import pytest
import torch
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

import linfusion as lf

from ..models import HOSTS, TEXT, Tiny, forward, gap, lively, noise, whole
from ..models.base import vae
from ..models.sd3 import SIZES
from .matrix import CONFIGS

PAIRS = {"flux": "flux-controlnet", "sd3": "sd3-controlnet", "qwen-padded": "qwen-controlnet"}
pairs = pytest.mark.parametrize("name", [n for n in PAIRS if PAIRS[n] in HOSTS])


def samples(controlnet, tiny: Tiny) -> dict:
    """The residuals as the transformer takes them."""
    with torch.no_grad():
        given = controlnet(**tiny.inputs(6, 9), return_dict=True)
    name = "block_controlnet_hidden_states" if "SD3" in tiny.family else "controlnet_block_samples"
    found = {name: given.controlnet_block_samples}
    if "Flux" in tiny.family:
        found["controlnet_single_block_samples"] = given.controlnet_single_block_samples
    return found


@pairs
def test_residuals_reach_a_replaced_transformer(name):
    tiny, control = HOSTS[name], HOSTS[PAIRS[name]]
    model, inputs, residuals = tiny.build(), tiny.inputs(6, 9), samples(control.build(), control)
    plain, stock = forward(model, inputs), forward(model, inputs | residuals)
    assert gap(plain, stock) > 1e-2
    assert torch.equal(forward(lf.apply(model, lf.Softmax()), inputs | residuals), stock)
    assert gap(forward(lf.apply(model, lf.CLEAR(1000)), inputs | residuals), stock) < 1e-5
    for config in (c for c in CONFIGS.values() if not isinstance(c, (lf.Softmax, lf.AgentSD))):
        near = forward(lf.apply(model, config), inputs | residuals)
        assert gap(near, stock) > 1e-2 and gap(near, forward(model, inputs)) > 1e-2, config


@pairs
def test_residuals_of_a_replaced_controlnet(name):
    """Its own attention is replaced by itself, and the transformer notices."""
    tiny, control = HOSTS[name], HOSTS[PAIRS[name]]
    model, inputs, controlnet = tiny.build(), tiny.inputs(6, 9), control.build()
    stock = forward(model, inputs | samples(controlnet, control))
    lf.apply(controlnet, lf.Softmax())
    assert torch.equal(forward(model, inputs | samples(controlnet, control)), stock)
    for config in (c for c in CONFIGS.values() if not isinstance(c, (lf.Softmax, lf.AgentSD))):
        lf.apply(controlnet, config)
        assert gap(forward(model, inputs | samples(controlnet, control)), stock) > 1e-3, config
    lf.restore(controlnet)
    assert torch.equal(forward(model, inputs | samples(controlnet, control)), stock)


@pytest.mark.parametrize("name", ["controlnet", "flux-controlnet"])
def test_several_controlnets_in_one_module(name):
    """As `pipe.controlnet` is when a pipeline was given a list; one that stands there twice is one model."""
    tiny, make = HOSTS[name], diffusers.FluxMultiControlNetModel if "flux" in name else MultiControlNetModel
    first, second = tiny.build(), lively(tiny.make()).eval()
    several = make([first, first, second])
    inputs = tiny.inputs(6, 9)
    more = {"conditioning_scale": [1.0, 0.5, 0.7], "controlnet_cond": [inputs["controlnet_cond"]] * 3}
    more |= {"controlnet_mode": [torch.zeros(2)] * 3} if "Flux" in tiny.family else {}

    def run():
        with torch.no_grad():
            return whole(several(**inputs | more, return_dict=False))

    stock = run()
    assert torch.equal((lf.apply(several, lf.Softmax()), run())[1], stock)
    lf.apply(several, lf.CLEAR(2))
    layers = [r.layer for r in lf.describe(several).layers if r.mechanism]
    assert len(layers) == 2 * tiny.layers and {name[:7] for name in layers} == {"nets.0.", "nets.2."}
    assert gap(run(), stock) > 1e-3
    assert lf.describe(lf.apply(several, lf.CLEAR(2), layers="nets.2.*")).replaced == tiny.layers
    lf.restore(several)
    assert torch.equal(run(), stock) and not any(hasattr(m, "linfusion") for m in several.modules())


def flux_pipeline() -> tuple[diffusers.DiffusionPipeline, dict]:
    pipe = diffusers.FluxControlNetPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=HOSTS["flux"].build(), controlnet=HOSTS["flux-controlnet"].build(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    given = {"prompt_embeds": noise(2, TEXT, 32, seed=2), "pooled_prompt_embeds": noise(2, 24, seed=4)}
    return pipe, given | {"guidance_scale": 3.0}


def sd3_pipeline() -> tuple[diffusers.DiffusionPipeline, dict]:
    empty = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
    controlnet = lively(diffusers.SD3ControlNetModel(**SIZES, joint_attention_dim=12)).eval()
    pipe = diffusers.StableDiffusion3ControlNetPipeline(
        vae=vae(), transformer=HOSTS["sd3"].build(), controlnet=controlnet,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **empty,
    )  # fmt: skip
    given = {"prompt_embeds": noise(2, TEXT, 12, seed=2), "pooled_prompt_embeds": noise(2, 24, seed=4)}
    given |= {"negative_prompt_embeds": noise(2, TEXT, 12, seed=3)}
    return pipe, given | {"negative_pooled_prompt_embeds": noise(2, 24, seed=5), "guidance_scale": 4.0}


@pytest.mark.parametrize("make", [flux_pipeline, sd3_pipeline])
def test_pipelines_with_a_controlnet(make):
    """`apply` on the pipeline replaces the transformer; its ControlNet is a model to apply to by itself."""
    pipe, given = make()
    pipe.set_progress_bar_config(disable=True)

    def draw():
        generator, image = torch.Generator().manual_seed(0), noise(2, 3, 24, 40, seed=6).clamp(-1, 1)
        return pipe(
            **given, control_image=image, height=24, width=40, num_inference_steps=2, generator=generator,
            output_type="latent",
        ).images  # fmt: skip

    stock = draw()
    lf.apply(pipe, lf.Softmax())
    lf.apply(pipe.controlnet, lf.Softmax())
    assert torch.equal(draw(), stock)
    lf.apply(pipe, lf.CLEAR(2))
    one = draw()
    lf.apply(pipe.controlnet, lf.CLEAR(2))
    both = draw()
    assert gap(one, stock) > 1e-2 and gap(both, one) > 1e-3
    for model in (pipe.transformer, pipe.controlnet):
        assert {r.grid for r in lf.describe(model).layers} == {(6, 10)}
    lf.restore(pipe)
    lf.restore(pipe.controlnet)
    assert torch.equal(draw(), stock)
