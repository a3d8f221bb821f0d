"""The ControlNet of UNets: half a UNet, whose output are the residuals at every resolution."""

import torch
from diffusers import ControlNetModel
from torch import nn

from .base import Tiny, noise
from .unet import two_scales, unet_inputs


def controlnet(**settings) -> ControlNetModel:
    model = ControlNetModel(
        in_channels=4, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(4, 8), **settings,
    )  # fmt: skip
    for block in (*model.controlnet_down_blocks, model.controlnet_mid_block):  # zero in fresh ones
        nn.init.normal_(block.weight)
    return model


def controlnet_inputs(height: int, width: int) -> dict:
    condition = noise(2, 3, 2 * height, 2 * width, seed=4)  # the embedding of this tiny one halves it once
    return unet_inputs(height, width) | {"controlnet_cond": condition, "conditioning_scale": torch.tensor(0.8)}


HOSTS = {
    "controlnet": Tiny("ControlNetModel", controlnet, controlnet_inputs, 2, "mid_block.*", runs=two_scales),
}
