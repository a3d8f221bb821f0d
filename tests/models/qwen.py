"""Qwen-Image and its ControlNet: text and picture rotated apart, prompts padded to one length."""

import inspect
import math

import diffusers
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor, nn

from .base import TEXT, Run, Tiny, noise, padded_text, two_steps

SIZES = {
    "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def qwen() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(**SIZES)


def qwen_inputs(height: int, width: int) -> dict:
    inputs = {
        "hidden_states": noise(2, height * width, 16),
        "encoder_hidden_states": noise(2, TEXT, 24, seed=2),
        "encoder_hidden_states_mask": None,
        "timestep": torch.tensor([0.5, 0.7]),
        "img_shapes": [[(1, height, width)]] * 2,
    }
    if "txt_seq_lens" in inspect.signature(QwenImageTransformer2DModel.forward).parameters:
        inputs["txt_seq_lens"] = [TEXT] * 2  # the oldest diffusers asks for them
    return inputs


def qwen_padded(height: int, width: int) -> dict:
    return qwen_inputs(height, width) | {"encoder_hidden_states_mask": padded_text()}


def qwen_pipeline(transformer: nn.Module) -> QwenImagePipeline:
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        transformer=transformer,
    )  # fmt: skip


def qwen_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    keep = padded_text().long()
    return two_steps(
        pipe, prompt_embeds=noise(2, TEXT, 24, seed=2), prompt_embeds_mask=keep, true_cfg_scale=guidance, height=48,
        negative_prompt_embeds=noise(2, TEXT, 24, seed=3), negative_prompt_embeds_mask=keep, width=80,
    )  # fmt: skip


def qwen_edit(height: int, width: int) -> dict:
    """As QwenImageEditPlusPipeline with two pictures, behind the one to be drawn; prompts are padded."""
    shapes = [(1, height, width), (1, 1, 3), (1, 1, 2)]
    return qwen_padded(1, sum(math.prod(shape) for shape in shapes)) | {"img_shapes": [shapes] * 2}


def picture_and_references(grid: tuple[int, ...]) -> list[Run]:
    return [Run(grid, before=TEXT, references=3 + 2)]


def qwen_controlnet() -> torch.nn.Module:
    return diffusers.QwenImageControlNetModel(**SIZES)


def qwen_controlnet_inputs(height: int, width: int) -> dict:
    return qwen_padded(height, width) | {"controlnet_cond": noise(2, height * width, 16, seed=4)}


HOSTS = {
    "qwen": Tiny("QwenImageTransformer2DModel", qwen, qwen_inputs, 2, "transformer_blocks.1.*"),
    "qwen-padded": Tiny(
        "QwenImageTransformer2DModel", qwen, qwen_padded, 2, "transformer_blocks.1.*", qwen_pipeline, qwen_draw
    ),
    "qwen-edit": Tiny(
        "QwenImageTransformer2DModel", qwen, qwen_edit, 2, "transformer_blocks.1.*", runs=picture_and_references
    ),
}
if hasattr(diffusers, "QwenImageControlNetModel"):
    HOSTS["qwen-controlnet"] = Tiny(
        "QwenImageControlNetModel", qwen_controlnet, qwen_controlnet_inputs, 2, "transformer_blocks.1.*"
    )
