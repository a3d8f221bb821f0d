"""What a picture will look like, from the latents of a step: small, and only where the latents are understood."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .latents import to_vae

SIDE = 32
"""Latents a side at most that are decoded, so that a preview costs the same for every size."""

VAES = ("AutoencoderKL", "AutoencoderTiny")


class Preview:
    """Decodes the latents of successive steps.

    Schedulers of flow matching go along straight lines, `x = (1 - sigma) x0 + sigma noise`, so two successive latents
    tell where the line ends: `x0 = x + sigma (x - x_before) / (sigma_before - sigma)`. Others show the noisy latents.

    Args:
        pipe: a pipeline with an `AutoencoderKL` or `AutoencoderTiny`; others give no previews.
        height, width: of the picture, in pixels.
    """

    def __init__(self, pipe: Any, height: int, width: int) -> None:
        self.pipe, self.height, self.width = pipe, height, width
        vae = getattr(pipe, "vae", None)
        config = getattr(vae, "config", None)
        half = getattr(vae, "dtype", None) == torch.float16 and getattr(config, "force_upcast", False)
        self.able = type(vae).__name__ in VAES and not half
        self.before: Tensor | None = None
        self.step = 0

    @torch.no_grad()
    def __call__(self, latents: Tensor, wanted: bool = True) -> Image.Image | None:
        """A small picture after one more step; None where there is none, or none is `wanted` this time."""
        self.step += 1
        before, self.before = self.before, latents
        if not self.able or not wanted:
            return None
        flows = type(self.pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
        if flows:
            if before is None or len(self.pipe.scheduler.sigmas) <= self.step:
                return None
            old, new = (float(s) for s in self.pipe.scheduler.sigmas[self.step - 1 : self.step + 1])
            latents = latents + new * (latents - before) / (old - new)
        if latents.ndim == 3:
            latents = self.pipe._unpack_latents(latents, self.height, self.width, self.pipe.vae_scale_factor)
        if latents.ndim != 4:
            self.able = False
            return None
        scale = min(1.0, SIDE / max(latents.shape[-2:]))
        if scale < 1:
            latents = F.interpolate(latents.float(), scale_factor=scale, mode="area")
        vae = self.pipe.vae
        x = to_vae(vae, latents[:1].to(vae.dtype))
        return self.pipe.image_processor.postprocess(vae.decode(x).sample, output_type="pil")[0]
