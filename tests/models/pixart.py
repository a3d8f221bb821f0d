"""PixArt: a transformer over picture tokens, text in cross-attention."""

import torch
from diffusers import DiffusionPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import Tensor, nn

from .base import TEXT, Tiny, ddim, draw, noise, vae


def pixart() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=32, sample_size=16, patch_size=2, caption_channels=12, norm_num_groups=1,
    )  # fmt: skip


def pixart_inputs(height: int, width: int) -> dict:
    return {
        "hidden_states": noise(2, 4, 2 * height, 2 * width),
        "encoder_hidden_states": noise(2, TEXT, 12, seed=2),
        "timestep": torch.tensor([5, 7]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def pixart_pipeline(transformer: nn.Module) -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(vae=vae(), text_encoder=None, tokenizer=None, transformer=transformer, scheduler=ddim())


def pixart_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    mask = torch.ones(2, TEXT)
    mask[1, 3:] = 0
    return draw(
        pipe, 12, height=24, width=40, guidance_scale=guidance, use_resolution_binning=False, negative_prompt=None,
        prompt_attention_mask=mask, negative_prompt_attention_mask=mask,
    )  # fmt: skip


HOSTS = {
    "pixart": Tiny(
        "PixArtTransformer2DModel", pixart, pixart_inputs, 2, "transformer_blocks.1.*", pixart_pipeline, pixart_draw
    ),
}
