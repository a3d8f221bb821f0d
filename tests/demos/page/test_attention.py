"""Where layers look: weights read off a mechanism are those that its formula says."""

import math

import pytest
import torch

import linfusion as lf
from linfusion.demos.page.attention import Step, layers
from linfusion.pipelines.generate import generate

from ...models.parts import stable_diffusion


@pytest.fixture(scope="module")
def pipe():
    pipe = lf.demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def arguments(pipe):
    with Step(pipe, 1) as step:
        generate(pipe, "red apple", steps=3, on_step=step.on_step)
    assert not pipe.transformer._forward_pre_hooks and step.arguments is not None
    assert float(step.arguments[1]["timestep"]) == pytest.approx(float(pipe.scheduler.sigmas[1]))
    return step.arguments


def softmax(layer):
    """A `[H, N, S]` of the image's queries by the formula."""
    q, k = (x[0].transpose(0, 1) for x in layer.call.rotated())
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return weights[:, layer.call.text :]


def test_the_original(pipe, arguments):
    found, report = layers(pipe, lf.Softmax(), *arguments)
    assert len(found) == report.replaced == 8 and report.attention_work_left == 1
    for layer in (found[0], found[-1]):
        assert layer.grid == (16, 16)
        weights = softmax(layer)
        image, text = layer.row(37)
        torch.testing.assert_close(image, weights[:, 37, layer.call.text :], atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(text, weights[:, 37, : layer.call.text].sum(-1), atol=1e-5, rtol=1e-3)
        places = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0))
        inside = weights[..., layer.call.text :]
        wanted = (inside * torch.cdist(places, places)).sum((1, 2)) / inside.sum((1, 2))
        torch.testing.assert_close(layer.distance(), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("config", [lf.CLEAR(3), lf.SLA(0.2, 16, 16), lf.LinFusion(), lf.Agent(16)], ids=str)
def test_mechanisms(pipe, arguments, config):
    """Gradients tell what unit vectors tell; shares add to one; a window ends where it ends, and only there."""
    layer = layers(pipe, config, *arguments)[0][3]
    assert not hasattr(pipe.transformer.single_transformer_blocks[0].attn, "linfusion")
    image, text = layer.row(37)
    v = torch.zeros_like(layer.call.v)
    v[0, layer.call.text + torch.arange(64), :, torch.arange(64)] = 1
    torch.testing.assert_close(layer.run(v)[37], image[:, :64], atol=1e-6, rtol=1e-3)
    assert image.shape == (4, 256)
    if not isinstance(config, lf.LinFusion):  # rotated in the numerator alone: neither positive nor one in all
        assert image.min() >= 0
        torch.testing.assert_close(image.sum(-1) + text, torch.ones(4), atol=1e-4, rtol=0)
    if isinstance(config, lf.CLEAR):
        rows, columns = torch.arange(256) // 16 - 37 // 16, torch.arange(256) % 16 - 37 % 16
        inside = rows**2 + columns**2 < 9
        assert (image[:, inside] > 0).all() and (image[:, ~inside] == 0).all()
        assert (layer.distance() < 3).all()


def test_unets():
    """Grids of several sizes, guidance in one batch, and a mechanism that has no map."""
    pipe = stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    with Step(pipe, 1) as step:
        generate(pipe, "red apple", size=64, steps=3, guidance=3.0, on_step=step.on_step)
    found, _ = layers(pipe, lf.Softmax(), *step.arguments)
    assert len({layer.grid for layer in found}) > 1 and found[0].call.q.shape[0] == 2
    image, text = found[0].row(5)
    torch.testing.assert_close(image.sum(-1), torch.ones(len(image)))
    assert (text == 0).all()
    with pytest.raises(NotImplementedError, match="merges patches"):
        layers(pipe, lf.AgentSD(), *step.arguments)
