"""Real pictures with captions as another source of samples: encoded by the pipeline's own autoencoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..probe import denoiser

CAPTIONS = "captions.json"


def read_pictures(folder: str | Path) -> list[tuple[Path, str]]:
    """Pictures and their captions, by `captions.json` (`{"file name": "caption"}`) in the folder.

    Raises:
        ValueError: no such file, or it names a picture that is not there.
    """
    folder = Path(folder)
    try:
        captions = json.loads((folder / CAPTIONS).read_text())
        pairs = [(folder / name, str(caption)) for name, caption in sorted(captions.items())]
    except (OSError, json.JSONDecodeError, AttributeError):
        raise ValueError(f'{folder} needs a {CAPTIONS}: {{"file name": "caption", ...}}.') from None
    if not pairs:
        raise ValueError(f"{folder / CAPTIONS} names no pictures.")
    if missing := [path for path, _ in pairs if not path.is_file()]:
        raise ValueError(f"{folder / CAPTIONS} names {missing[0].name}, which is not there.")
    return pairs


@torch.no_grad()
def encode(pipe: Any, files: list[Path], arguments: dict[str, Any], shape: list[int]) -> Tensor:
    """Latents of pictures as the denoiser sees them, `[B, *shape]`.

    Raises:
        NotImplementedError: latents that this cannot bring into the denoiser's form.
    """
    name, model = denoiser(pipe)
    vae, config = pipe.vae, pipe.vae.config
    factor = getattr(pipe, "vae_scale_factor", 8)
    default = getattr(pipe, "default_sample_size", getattr(model.config, "sample_size", 64))
    size = arguments.get("height") or factor * int(default)
    pixels = torch.stack([_pixels(file, size) for file in files]).to(vae.device, vae.dtype)
    latents = vae.encode(pixels).latent_dist.mean
    latents = (latents - (getattr(config, "shift_factor", None) or 0)) * config.scaling_factor
    if hasattr(pipe, "_pack_latents") and len(shape) == 2:
        latents = pipe._pack_latents(latents, *latents.shape)
    if list(latents.shape[1:]) != shape:
        raise NotImplementedError(
            f"{type(pipe).__name__}: its {name} takes latents {shape}, and pictures of {size} pixels are encoded to "
            f"{list(latents.shape[1:])}; sample from prompts instead."
        )
    return latents


def _pixels(file: Path, size: int) -> Tensor:
    """`[3, size, size]` in [-1, 1]: the middle square, transparency on white."""
    with Image.open(file) as opened:
        picture = ImageOps.fit(opened.convert("RGBA"), (size, size), Image.Resampling.LANCZOS)
        canvas = Image.new("RGBA", picture.size, "white")
        canvas.alpha_composite(picture)
    return torch.from_numpy(np.array(canvas.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
