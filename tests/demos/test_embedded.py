"""The shipped weights: they open, they draw, and they draw what was asked."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from linfusion.demos import embedded
from linfusion.demos.emoji.evaluate import draw, retrieved, thumbnails

FOLDER = Path(embedded.__file__).parent / "models" / "emoji-flux"
# the pictures of references.png, row by row: the four that are drawn, then others that are easily taken for them
PROMPTS = ["red apple", "man cook dark skin tone", "rocket", "cat with tears of joy"]
OTHERS = [
    "green apple",
    "cherries",
    "tomato",
    "strawberry",
    "man cook medium dark skin tone",
    "woman cook dark skin tone",
    "cook dark skin tone",
    "man farmer dark skin tone",
    "airplane",
    "firecracker",
    "grinning cat with smiling eyes",
    "crying cat",
]


@pytest.fixture(scope="module")
def pipe():
    pipe = embedded.demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise():
    return torch.Generator().manual_seed(0)


def test_plain_flux_pipeline_opens_it_and_draws_the_same(pipe):
    plain = FluxPipeline.from_pretrained(FOLDER)
    plain.set_progress_bar_config(disable=True)
    assert {type(p) for p in (plain, pipe)} == {FluxPipeline, embedded.EmojiFluxPipeline}
    settings = {"num_inference_steps": 2, "output_type": "np"}
    ours = pipe("rocket", generator=noise(), **settings).images
    settings |= {"height": 256, "width": 256, "guidance_scale": 3.0, "max_sequence_length": 16}
    assert np.array_equal(ours, plain("rocket", generator=noise(), **settings).images)
    assert ours.shape == (1, 256, 256, 3)


def test_guidance_changes_the_picture(pipe):
    drawn = [
        pipe("rocket", generator=noise(), guidance_scale=g, num_inference_steps=4, output_type="np").images
        for g in (1.0, 5.0)
    ]
    assert np.abs(drawn[0] - drawn[1]).mean() > 1e-3


def test_bf16_draws_nearly_the_same(pipe):
    low = embedded.demo_pipeline(dtype=torch.bfloat16)
    low.set_progress_bar_config(disable=True)
    assert low.transformer.dtype == low.vae.dtype == low.text_encoder.dtype == torch.bfloat16
    settings = {"num_inference_steps": 4, "output_type": "pt"}
    latents = torch.randn(1, 256, 32, generator=noise())
    pictures = [p("red apple", latents=latents, **settings).images.float() for p in (pipe, low)]
    assert (pictures[0] - pictures[1]).square().mean() < 0.01


def references():
    sheet = np.array(Image.open(Path(__file__).parent / "references.png").convert("RGB"))
    tiles = torch.from_numpy(sheet.reshape(4, 32, 4, 32, 3)).permute(0, 2, 4, 1, 3).reshape(16, 3, 32, 32)
    return tiles.float() / 127.5 - 1


def test_quality(pipe):
    drawn = draw(pipe, PROMPTS, steps=10)
    corners = drawn[..., :8, :8]
    assert corners.mean() > 0.97, "the background is white"
    assert retrieved(thumbnails(drawn), PROMPTS, thumbnails(references()), PROMPTS + OTHERS) == [True] * len(PROMPTS)


def test_other_sizes(pipe):
    picture = pipe("red apple", height=192, width=320, num_inference_steps=1).images[0]
    assert picture.size == (320, 192)


def test_unknown_words(pipe):
    assert pipe.unknown_words("Red-apple, with zorp!") == ["zorp"]


def test_unknown_model():
    with pytest.raises(ValueError, match="unknown embedded model 'sdxl'; available: emoji-flux"):
        embedded.demo_pipeline("sdxl")


def test_files():
    files = [f for f in FOLDER.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 32e6
    assert json.loads((FOLDER / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    weights = [f for f in files if f.suffix == ".safetensors"]
    assert len(weights) == 4
    assert not [f for f in files if f.suffix not in (".safetensors", ".json")]
    for file in weights:
        with file.open("rb") as handle:
            header = json.loads(handle.read(struct.unpack("<Q", handle.read(8))[0]))
        assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"BF16"}


def test_everything_that_is_no_text_is_small():
    """Weights, adapters and pictures of the repository together."""
    binary = {".safetensors", ".png", ".webp", ".jpg", ".pt", ".bin"}
    folders = ("demos", "distill", "docs", "kernels", "linfusion", "pipelines", "tests")
    files = [f for folder in folders for f in (Path(__file__).parents[2] / folder).rglob("*") if f.suffix in binary]
    assert sum(f.stat().st_size for f in files) <= 44e6
