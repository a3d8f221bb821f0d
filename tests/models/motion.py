"""AnimateDiff: a UNet whose frames are pictures of their own, with motion modules between them."""

import torch
from diffusers import AnimateDiffPipeline, DiffusionPipeline, UNetMotionModel
from torch import Tensor, nn

from .base import TEXT, Tiny, ddim, noise, two_steps, vae
from .unet import two_scales

FRAMES = 3


def motion_unet() -> UNetMotionModel:
    return UNetMotionModel(
        sample_size=32, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        cross_attention_dim=16, num_attention_heads=2, norm_num_groups=4, motion_num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )  # fmt: skip


def motion_inputs(height: int, width: int) -> dict:
    return {
        "sample": noise(2, 4, FRAMES, height, width),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": noise(2, TEXT, 16, seed=2).repeat_interleave(FRAMES, dim=0),  # as pipelines do
    }


def motion_pipeline(unet: nn.Module) -> AnimateDiffPipeline:
    return AnimateDiffPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, unet=unet, motion_adapter=None, scheduler=ddim()
    )  # fmt: skip


def motion_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    return two_steps(
        pipe, prompt_embeds=noise(1, TEXT, 16, seed=2), negative_prompt_embeds=noise(1, TEXT, 16, seed=3),
        guidance_scale=guidance, num_frames=FRAMES, height=24, width=40,
    )  # fmt: skip


HOSTS = {
    "motion": Tiny(
        "UNetMotionModel", motion_unet, motion_inputs, 4, "up_blocks.*", motion_pipeline, motion_draw, 2 * FRAMES,
        runs=two_scales,
    ),
}  # fmt: skip
