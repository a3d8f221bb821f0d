"""UNets: attention at two resolutions, as Stable Diffusion 1.5 and SDXL have it."""

import math

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn

from .base import TEXT, Run, Tiny, ddim, draw, noise, vae


def make_unet(**settings) -> UNet2DConditionModel:
    defaults = {
        "sample_size": 32, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 16,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2, "norm_num_groups": 4,
    }  # fmt: skip
    return UNet2DConditionModel(**(defaults | settings))


def unet_sd15() -> UNet2DConditionModel:
    """As Stable Diffusion 1.5: 1 x 1 convolutions around the blocks; attention at two resolutions."""
    return make_unet()


def unet_sdxl() -> UNet2DConditionModel:
    """As SDXL: linear projections, two blocks a transformer, size and pooled text added to the time embedding."""
    return make_unet(
        use_linear_projection=True, transformer_layers_per_block=2, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=8 + 6 * 4,
    )  # fmt: skip


def unet_inputs(height: int, width: int) -> dict:
    return {
        "sample": noise(2, 4, height, width),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": noise(2, TEXT, 16, seed=2),
    }


def unet_sdxl_inputs(height: int, width: int) -> dict:
    sizes = torch.tensor([[height, width, 0, 0, height, width]] * 2)
    added = {"text_embeds": noise(2, 8, seed=3), "time_ids": sizes}
    return unet_inputs(height, width) | {"added_cond_kwargs": added}


def two_scales(grid: tuple[int, ...]) -> list[Run]:
    return [Run(grid), Run(tuple(math.ceil(n / 2) for n in grid))]


def sd15_pipeline(unet: nn.Module) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, unet=unet, scheduler=ddim(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl_pipeline(unet: nn.Module) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, unet=unet, scheduler=ddim()
    )


def sd15_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    return draw(pipe, 16, height=16, width=24, guidance_scale=guidance)


def sdxl_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    pooled = {"pooled_prompt_embeds": noise(2, 8, seed=4), "negative_pooled_prompt_embeds": noise(2, 8, seed=5)}
    return draw(pipe, 16, height=16, width=24, guidance_scale=guidance, **pooled)


HOSTS = {
    "unet-sd15": Tiny(
        "UNet2DConditionModel", unet_sd15, unet_inputs, 4, "up_blocks.*", sd15_pipeline, sd15_draw, runs=two_scales
    ),
    "unet-sdxl": Tiny(
        "UNet2DConditionModel", unet_sdxl, unet_sdxl_inputs, 8, "up_blocks.*", sdxl_pipeline, sdxl_draw, runs=two_scales
    ),
}
