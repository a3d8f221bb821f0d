"""AnimateDiff: a UNet whose frames are pictures of their own, with motion modules between them."""

import torch
from diffusers import UNetMotionModel

from .base import TEXT, Tiny, noise
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


HOSTS = {
    "motion": Tiny("UNetMotionModel", motion_unet, motion_inputs, 4, "up_blocks.*", runs=two_scales, rows=2 * FRAMES),
}
