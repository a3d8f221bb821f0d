"""SD3 (picture, then text), SD3.5 (dual attention: `attn2` sees the picture alone), and their ControlNets."""

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

from .base import TEXT, Run, Tiny, draw, noise, vae

SIZES = {
    "sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "caption_projection_dim": 32, "pooled_projection_dim": 24, "out_channels": 4,
    "pos_embed_max_size": 32,
}  # fmt: skip


def sd3() -> SD3Transformer2DModel:
    """The last block drops the text: no output projection for it."""
    return SD3Transformer2DModel(**SIZES, joint_attention_dim=12)


def sd35() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(**SIZES, joint_attention_dim=12, qk_norm="rms_norm", dual_attention_layers=(0, 1))


def sd3_controlnet() -> SD3ControlNetModel:
    return SD3ControlNetModel(**SIZES, joint_attention_dim=12, extra_conditioning_channels=1)


def sd35_controlnet() -> SD3ControlNetModel:
    """As SD3.5 large has them: hidden states that the transformer has embedded, and no text."""
    return SD3ControlNetModel(**SIZES, joint_attention_dim=None, use_pos_embed=False)


def sd3_inputs(height: int, width: int) -> dict:
    return {
        "hidden_states": noise(2, 4, 2 * height, 2 * width),
        "encoder_hidden_states": noise(2, TEXT, 12, seed=2),
        "pooled_projections": noise(2, 24, seed=3),
        "timestep": torch.tensor([500.0, 700.0]),
    }


def sd3_controlnet_inputs(height: int, width: int) -> dict:
    return sd3_inputs(height, width) | {"controlnet_cond": noise(2, 5, 2 * height, 2 * width, seed=4)}


def sd35_controlnet_inputs(height: int, width: int) -> dict:
    inputs = sd3_inputs(height, width) | {"controlnet_cond": noise(2, 4, 2 * height, 2 * width, seed=4)}
    del inputs["encoder_hidden_states"]
    return inputs | {"hidden_states": noise(2, height * width, 32)}


def text_after(grid: tuple[int, ...]) -> list[Run]:
    return [Run(grid, after=TEXT)]


def and_alone(grid: tuple[int, ...]) -> list[Run]:
    return [Run(grid, after=TEXT), Run(grid)]


def alone(grid: tuple[int, ...]) -> list[Run]:
    return [Run(grid)]


def sd3_pipeline(transformer: nn.Module) -> StableDiffusion3Pipeline:
    empty = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(), **empty
    )


def sd3_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    pooled = {"pooled_prompt_embeds": noise(2, 24, seed=4), "negative_pooled_prompt_embeds": noise(2, 24, seed=5)}
    return draw(pipe, 12, height=24, width=40, guidance_scale=guidance, **pooled)


HOSTS = {
    "sd3": Tiny(
        "SD3Transformer2DModel", sd3, sd3_inputs, 2, "transformer_blocks.1.*", sd3_pipeline, sd3_draw, runs=text_after
    ),
    "sd3.5": Tiny("SD3Transformer2DModel", sd35, sd3_inputs, 4, "*.attn2", sd3_pipeline, sd3_draw, runs=and_alone),
    "sd3-controlnet": Tiny(
        "SD3ControlNetModel", sd3_controlnet, sd3_controlnet_inputs, 2, "transformer_blocks.1.*", runs=text_after
    ),
    "sd3.5-controlnet": Tiny(
        "SD3ControlNetModel", sd35_controlnet, sd35_controlnet_inputs, 2, "transformer_blocks.1.*", runs=alone
    ),
}
