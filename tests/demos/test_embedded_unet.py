"""The shipped UNet: it opens, it draws what was asked, and shares what it can."""

import json
import struct

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

import linfusion as lf
from linfusion.demos import embedded
from linfusion.demos.emoji.evaluate import draw, retrieved, thumbnails

from .test_embedded import OTHERS, PROMPTS, noise, references

FOLDER = embedded.MODELS / "emoji-unet"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="its weights are not here yet")


@pytest.fixture(scope="module")
def pipe():
    pipe = embedded.demo_pipeline("emoji-unet")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_whole_folder_is_a_plain_stable_diffusion(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    plain = DiffusionPipeline.from_pretrained(tmp_path)
    plain.set_progress_bar_config(disable=True)
    assert {type(p) for p in (plain, pipe)} == {StableDiffusionPipeline, embedded.EmojiUnetPipeline}
    settings = {"num_inference_steps": 2, "output_type": "np"}
    ours = pipe("rocket", generator=noise(), **settings).images
    assert np.array_equal(ours, plain("rocket", generator=noise(), guidance_scale=3.0, **settings).images)
    assert ours.shape == (1, 256, 256, 3)


def test_its_own_parts_are_all_that_is_stored():
    files = [f for f in FOLDER.rglob("*") if f.is_file()]
    assert {f.relative_to(FOLDER).parts[0] for f in files} == {"unet", "scheduler", "model_index.json"}
    [weights] = [f for f in files if f.suffix == ".safetensors"]
    with weights.open("rb") as handle:
        header = json.loads(handle.read(struct.unpack("<Q", handle.read(8))[0]))
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"BF16"}


def test_parts_of_emoji_flux(pipe):
    vae = load_file(embedded.MODELS / "emoji-flux" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, vae[name].float()) for name, value in pipe.vae.state_dict().items())
    assert pipe.unknown_words("red zorp") == ["zorp"]


def test_parts_can_be_given():
    assert embedded.demo_pipeline("emoji-unet", vae=None, unet=None).components["vae"] is None
    low = embedded.demo_pipeline("emoji-unet", dtype=torch.bfloat16)
    assert low.unet.dtype == low.vae.dtype == low.text_encoder.dtype == torch.bfloat16


def test_quality(pipe):
    drawn = draw(pipe, PROMPTS, steps=10)
    assert drawn[..., :8, :8].mean() > 0.97, "the background is white"
    assert retrieved(thumbnails(drawn), PROMPTS, thumbnails(references()), PROMPTS + OTHERS) == [True] * len(PROMPTS)


def test_attention_is_replaced_on_both_grids(pipe):
    with lf.applied(pipe, lf.CLEAR(4)):
        pipe("rocket", num_inference_steps=1, output_type="latent")
        layers = [layer for layer in lf.describe(pipe).layers if layer.mechanism is not None]
    assert sorted(layer.grid for layer in layers) == [(16, 16)] * 4 + [(32, 32)] * 3
