"""`linfusion.pipelines.generate`, below the command line: times, sizes, sheets, and what it refuses."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from linfusion.pipelines.generate import call_defaults, generate, psnr, side_by_side, size_multiple

from ..models import HOSTS, TINY


class Fake:
    """A pipeline's surface: records its arguments, takes its steps."""

    vae_scale_factor = 8
    device = torch.device("cpu")

    def __call__(
        self, prompt, height=32, width=32, num_inference_steps=4, guidance_scale=1.0, generator=None,
        callback_on_step_end=None,
    ):  # fmt: skip
        self.given = {k: v for k, v in locals().items() if k != "self"}
        for step in range(num_inference_steps):
            callback_on_step_end(self, step, 0, {})
        return SimpleNamespace(images=[Image.new("RGB", (width, height))])


class Wrapped(Fake):
    """As a subclass with its own defaults is written."""

    def __call__(self, prompt=None, **kwargs):
        return super().__call__(prompt, **({"num_inference_steps": 3} | kwargs))


@pytest.mark.parametrize("cls", [Fake, Wrapped])
def test_arguments_arrive_and_defaults_stay(cls):
    pipe, steps = cls(), []
    picture = generate(pipe, "x", size=64, steps=2, guidance=3.0, seed=7, on_step=steps.append)
    given = pipe.given
    assert (given["prompt"], given["height"], given["width"]) == ("x", 64, 64)
    assert (given["num_inference_steps"], given["guidance_scale"]) == (2, 3.0)
    assert given["generator"].initial_seed() == 7 and given["generator"].device.type == "cpu"
    assert steps == [1, 2] and picture.image.size == (64, 64) and picture.seconds_per_step >= 0
    generate(pipe, "x")
    assert pipe.given["height"] == 32 and pipe.given["num_inference_steps"] == (4 if cls is Fake else 3)


def test_call_defaults_look_through_keyword_arguments():
    assert call_defaults(Wrapped())["num_inference_steps"] == 4
    assert call_defaults(TINY["flux"].build_pipeline())["num_inference_steps"] == 28
    assert "callback_on_step_end" in call_defaults(type("Mine", (FluxPipeline,), {})(**parts()))


def parts() -> dict:
    return dict(TINY["flux"].build_pipeline().components)


@pytest.mark.parametrize("prompt", ["", "  ", "\n"])
def test_an_empty_prompt(prompt):
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(Fake(), prompt)


@pytest.mark.parametrize("size", [0, -8, 60, 65])
def test_sizes_that_the_vae_cannot_divide(size):
    with pytest.raises(ValueError, match=f"multiple of 8 pixels for this model, got {size}"):
        generate(Fake(), "x", size=size)


def test_other_refusals():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        generate(Fake(), "x", steps=0)
    old = type("Old", (Fake,), {"__call__": lambda self, prompt: None})()
    with pytest.raises(ValueError, match="Old has no callback_on_step_end"):
        generate(old, "x")
    plain = type("Plain", (Fake,), {"__call__": lambda self, prompt, callback_on_step_end=None: None})()
    with pytest.raises(ValueError, match="Plain does not take height"):
        generate(plain, "x", size=64)
    with pytest.raises(ValueError, match="Plain does not take guidance_scale"):
        generate(plain, "x", guidance=2.0)


@pytest.mark.parametrize("name", [name for name, tiny in HOSTS.items() if tiny.frames and tiny.pipeline])
def test_videos(name):
    with pytest.raises(NotImplementedError, match=r"Pipeline makes videos.*linfusion\.apply.*export_to_video"):
        generate(HOSTS[name].build_pipeline(), "x", size=64)


def test_size_multiples():
    """The VAE halves here; PixArt's and FLUX's tokens are 2 x 2 latents."""
    multiples = {name: size_multiple(tiny.build_pipeline()) for name, tiny in TINY.items()}
    assert multiples == {"unet-sd15": 2, "unet-sdxl": 2, "pixart": 4, "flux": 4}


def test_psnr():
    a = Image.fromarray(np.full((4, 6, 3), 100, np.uint8))
    b = Image.fromarray(np.full((4, 6, 3), 110, np.uint8))
    assert psnr(a, a) == math.inf
    assert psnr(a, b) == psnr(b, a) == pytest.approx(20 * math.log10(255 / 10))
    with pytest.raises(ValueError, match="differ in size"):
        psnr(a, a.resize((5, 5)))


def test_side_by_side():
    pictures = [("one", Image.new("RGB", (40, 30), "red")), ("two", Image.new("L", (40, 30), 255))]
    sheet = np.asarray(side_by_side(pictures))
    assert sheet.shape[1] == 80 and sheet.shape[0] > 30
    assert (sheet[:30, :40] == (255, 0, 0)).all() and (sheet[:30, 40:] == 255).all()
    labels = sheet[30:]
    assert (labels[:, :40] < 128).any() and (labels[:, 40:] < 128).any()
