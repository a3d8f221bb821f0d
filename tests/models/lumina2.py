"""Lumina 2: `[caption, picture, padding]` of each sample in one sequence, after a refiner for each of the two."""

import math
from functools import partial

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from torch import Tensor, nn

from .base import TEXT, Run, Tiny, noise, padded_text, two_steps

SHORT = 3


def lumina2() -> Lumina2Transformer2DModel:
    return Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=64, num_layers=2, num_refiner_layers=1,
        num_attention_heads=4, num_kv_heads=2, multiple_of=8, axes_dim_rope=(8, 4, 4), axes_lens=(64, 64, 64),
        cap_feat_dim=12,
    )  # fmt: skip


def lumina2_inputs(height: int, width: int, lengths: tuple[int, ...] = (TEXT, TEXT)) -> dict:
    keep = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {
        "hidden_states": noise(2, 4, 2 * height, 2 * width),
        "timestep": torch.tensor([0.5, 0.7]),
        "encoder_hidden_states": noise(2, max(lengths), 12, seed=2),
        "encoder_attention_mask": keep,
    }


def lumina2_runs(grid: tuple[int, ...]) -> list[Run]:
    return [Run(grid), Run(grid, before=TEXT)]


def padded_masks(grid: tuple[int, ...], inside) -> dict[int, Tensor]:
    tokens = math.prod(grid)
    window = inside(grid)
    joint = torch.ones(2, 1, tokens + TEXT, tokens + TEXT, dtype=torch.bool)
    for sample, start in enumerate((TEXT, SHORT)):
        joint[sample, 0, start : start + tokens, start : start + tokens] = window
    return {tokens: window, tokens + TEXT: joint}


def lumina2_pipeline(transformer: nn.Module) -> Lumina2Pipeline:
    return Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        transformer=transformer,
    )  # fmt: skip


def lumina2_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    keep = padded_text()
    return two_steps(
        pipe, prompt_embeds=noise(2, TEXT, 12, seed=2), prompt_attention_mask=keep, guidance_scale=guidance, height=96,
        negative_prompt_embeds=noise(2, TEXT, 12, seed=3), negative_prompt_attention_mask=keep, width=160,
    )  # fmt: skip


FAMILY = "Lumina2Transformer2DModel"
padded_inputs = partial(lumina2_inputs, lengths=(TEXT, SHORT))

HOSTS = {
    "lumina2": Tiny(FAMILY, lumina2, lumina2_inputs, 3, "layers.*", runs=lumina2_runs),
    "lumina2-padded": Tiny(
        FAMILY, lumina2, padded_inputs, 3, "layers.*", lumina2_pipeline, lumina2_draw, runs=lumina2_runs,
        masks=padded_masks,
    ),
}  # fmt: skip
