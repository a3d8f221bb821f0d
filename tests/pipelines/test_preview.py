"""Previews: what the line of flow matching leads to, and no harm where latents are not understood."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from linfusion.demos.embedded import demo_pipeline
from linfusion.pipelines.generate import generate, psnr
from linfusion.pipelines.preview import Preview

from ..models.parts import stable_diffusion


def test_an_early_preview_is_nearer_to_the_picture_than_its_latents():
    """After 2 of 8 steps; a preview of the last step is the picture itself."""
    pipe = demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    preview, shown = Preview(pipe, 256, 256), []
    picture = generate(pipe, "red apple", steps=8, on_latents=lambda latents: shown.append(preview(latents))).image
    assert shown[0] is None and {p.size for p in shown[1:]} == {(256, 256)}
    assert np.array_equal(shown[-1], picture)
    late = Preview(pipe, 256, 256)
    late.pipe = SimpleNamespace(**{n: getattr(pipe, n) for n in ("vae", "_unpack_latents", "vae_scale_factor")})
    late.pipe.scheduler, late.pipe.image_processor = object(), pipe.image_processor
    noisy = []
    generate(pipe, "red apple", steps=8, on_latents=lambda latents: noisy.append(late(latents)))
    assert psnr(shown[1], picture) > psnr(noisy[1], picture) + 3


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_other_schedulers(scheduler):
    pipe = stable_diffusion()
    pipe.scheduler = scheduler()
    pipe.set_progress_bar_config(disable=True)
    preview, shown = Preview(pipe, 64, 64), []
    generate(pipe, "x", size=64, steps=2, on_latents=lambda latents: shown.append(preview(latents)))
    assert len(shown) == 2 and all(p is not None for p in shown)
    assert preview(torch.zeros(1, 4, 8, 8), wanted=False) is None
    assert preview(torch.zeros(1, 4, 2, 8, 8)) is None, "latents of a video"
    pipe.vae = None
    assert Preview(pipe, 64, 64)(torch.zeros(1, 4, 8, 8)) is None
