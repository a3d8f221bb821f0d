"""Stable Video Diffusion: spatial and temporal attention by turns."""

import torch
from diffusers import UNetSpatioTemporalConditionModel

from .base import Tiny, noise
from .unet import two_scales

FRAMES = 3


def svd() -> UNetSpatioTemporalConditionModel:
    return UNetSpatioTemporalConditionModel(  # its norms have 32 groups, whatever the settings
        sample_size=32, in_channels=8, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        cross_attention_dim=16, num_attention_heads=2, addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12, num_frames=FRAMES,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )  # fmt: skip


def svd_inputs(height: int, width: int) -> dict:
    return {
        "sample": noise(2, FRAMES, 8, height, width),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": noise(2, 1, 16, seed=2),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]] * 2),
    }


HOSTS = {
    "svd": Tiny(
        "UNetSpatioTemporalConditionModel", svd, svd_inputs, 4, "up_blocks.*", runs=two_scales, rows=2 * FRAMES
    ),
}
