"""Z-Image: `[picture, filling, caption, filling, padding]` of each sample in one sequence."""

import math
from functools import partial

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .base import Run, Tiny, noise, two_steps


def z_image(**settings) -> nn.Module:
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
        axes_dims=[4, 6, 6], axes_lens=[256, 64, 64], **settings,
    )  # fmt: skip
    for token in (model.x_pad_token, model.cap_pad_token):  # zero in fresh ones
        nn.init.normal_(token)
    return model


def z_image_inputs(height: int, width: int, lengths: tuple[int, ...] = (7, 12)) -> dict:
    return {
        "x": list(noise(2, 4, 1, 2 * height, 2 * width)),
        "t": torch.tensor([0.5, 0.7]),
        "cap_feats": [noise(length, 12, seed=2 + i) for i, length in enumerate(lengths)],
    }


def z_image_runs(grid: tuple[int, ...], caption: int = 32) -> list[Run]:
    filling = -math.prod(grid) % 32
    return [Run(grid, after=filling), Run(grid, after=filling + caption)]


def z_image_pipeline(transformer: nn.Module) -> DiffusionPipeline:
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        transformer=transformer,
    )  # fmt: skip


def z_image_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    """Z-Image counts guidance from 0."""
    return two_steps(
        pipe, prompt_embeds=[noise(7, 12, seed=2), noise(40, 12, seed=3)], guidance_scale=guidance - 1, height=96,
        negative_prompt_embeds=[noise(5, 12, seed=4)] * 2, width=160,
    )  # fmt: skip


FAMILY = "ZImageTransformer2DModel"
padded_inputs = partial(z_image_inputs, lengths=(7, 70))
padded_runs = partial(z_image_runs, caption=96)

HOSTS = {
    "z-image": Tiny(FAMILY, z_image, z_image_inputs, 3, "layers.*", runs=z_image_runs),
    "z-image-padded": Tiny(
        FAMILY, z_image, padded_inputs, 3, "layers.*", z_image_pipeline, z_image_draw, runs=padded_runs
    ),
} if hasattr(diffusers, FAMILY) else {}  # fmt: skip
