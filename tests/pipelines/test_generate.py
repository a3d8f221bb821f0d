"""`linfusion.pipelines.generate`, below the command line: times, sizes, sheets, and what it refuses."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend

from linfusion.pipelines import generate as module
from linfusion.pipelines.generate import generate, psnr, side_by_side

from ..models import HOSTS


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


class Denoiser(nn.Module):
    def forward(self, clock, seconds):
        clock.now += seconds


class Scripted(Fake):
    """Its text encoder and its steps take the times that they are told, on a clock of their own."""

    def __init__(self, clock, text, steps):
        self.clock, self.text, self.times, self.transformer = clock, text, steps, Denoiser()
        self.transformer.config = SimpleNamespace(patch_size=1)

    def __call__(self, prompt, num_inference_steps=4, generator=None, callback_on_step_end=None):
        self.clock.now += self.text
        for step, seconds in enumerate(self.times):
            for half in (0.25, 0.5):  # two calls a step, as guidance without batches does, and the scheduler
                self.transformer(self.clock, seconds * half)
            self.clock.now += seconds * 0.25
            callback_on_step_end(self, step, 0, {})
        self.clock.now += 50  # the VAE
        return SimpleNamespace(images=[None])


@pytest.mark.parametrize(
    ("steps", "seconds"),
    [
        ([9, 1, 5, 2, 2.5], 2.25),  # the median of the last four, not of all, nor their mean or largest
        ([9, 1, 5, 2], 2),
        ([9, 1], 1),
        ([7], 7),  # without the text encoder's 100
    ],
)
def test_seconds_per_step(monkeypatch, steps, seconds):
    clock = SimpleNamespace(now=3.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    pipe = Scripted(clock, 100, steps)
    for _ in range(2):
        assert generate(pipe, "x").seconds_per_step == seconds
        assert not pipe.transformer._forward_pre_hooks


def test_no_hook_stays_after_a_failure():
    pipe = Scripted(SimpleNamespace(now="no number"), 1, [1])
    with pytest.raises(TypeError):
        generate(pipe, "x")
    assert not pipe.transformer._forward_pre_hooks


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_backend(monkeypatch, device):
    """cuDNN before the others while the pipeline draws, on CUDA only; all of them, so that nothing is refused."""
    events = []

    class Recorder:
        def __init__(self, backends, set_priority=False):
            self.given = (tuple(backends), set_priority)

        def __enter__(self):
            events.append(self.given)

        def __exit__(self, *error):
            events.append("end")

    class Drawing(Fake):
        def __call__(self, *arguments, callback_on_step_end=None, **settings):
            events.append("drawn")
            return super().__call__(*arguments, callback_on_step_end=callback_on_step_end, **settings)

    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", Recorder)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    pipe = Drawing()
    pipe.device = torch.device(device)
    generate(pipe, "x")
    order = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    wanted = (tuple(getattr(SDPBackend, name) for name in order), True)
    assert events == ([wanted, "drawn", "end"] if device == "cuda" else ["drawn"])


@pytest.mark.parametrize("prompt", ["", "  ", "\n"])
def test_an_empty_prompt(prompt):
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(Fake(), prompt)


@pytest.mark.parametrize(("size", "wants"), [(0, "positive"), (-8, "positive"), (60, "a multiple of 8 pixels")])
def test_sizes_that_cannot_be_drawn(size, wants):
    with pytest.raises(ValueError, match=f"^size must be {wants}.*, got {size}"):
        generate(Fake(), "x", size=size)


def test_other_refusals():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        generate(Fake(), "x", steps=0)
    for guidance in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="^guidance must be finite and not negative, got"):
            generate(Fake(), "x", guidance=guidance)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"^seed must be between .* got {seed}"):
            generate(Fake(), "x", seed=seed)
    generate(Fake(), "x", seed=2**64 - 1, guidance=0.0)
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
