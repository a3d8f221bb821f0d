"""FLUX and its ControlNet: text then picture in one sequence, double and single blocks."""

import math

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor, nn

from .base import TEXT, Run, Tiny, draw, noise, vae

SIZES = {
    "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 24, "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
}  # fmt: skip


REFERENCE = (2, 2)
"""Tokens of a reference picture."""


def flux_shallow() -> FluxTransformer2DModel:
    """One block of each kind."""
    return FluxTransformer2DModel(**SIZES | {"num_layers": 1, "num_single_layers": 1})


def flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(**SIZES)


def flux_controlnet() -> FluxControlNetModel:
    return FluxControlNetModel(**SIZES)


def flux_union_controlnet() -> FluxControlNetModel:
    """For several kinds of condition: one more token before the text says which."""
    return FluxControlNetModel(**SIZES, num_mode=3)


def flux_ids(height: int, width: int, frame: int = 0) -> Tensor:
    """`img_ids` as FluxPipeline makes them."""
    ids = torch.zeros(height, width, 3)
    ids[..., 0] = frame
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    return ids.reshape(-1, 3)


def flux_inputs(height: int, width: int) -> dict:
    return {
        "hidden_states": noise(2, height * width, 16),
        "encoder_hidden_states": noise(2, TEXT, 32, seed=2),
        "pooled_projections": noise(2, 24, seed=3),
        "timestep": torch.tensor([0.5, 0.7]),
        "img_ids": flux_ids(height, width),
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": torch.tensor([3.0, 4.0]),
    }


def flux_controlnet_inputs(height: int, width: int) -> dict:
    return flux_inputs(height, width) | {"controlnet_cond": noise(2, height * width, 16, seed=4)}


def flux_union_inputs(height: int, width: int) -> dict:
    return flux_controlnet_inputs(height, width) | {"controlnet_mode": torch.tensor([[0], [2]])}


def flux_kontext_inputs(height: int, width: int) -> dict:
    """As FluxKontextPipeline: the picture to be changed behind the one to be drawn."""
    ids = torch.cat((flux_ids(height, width), flux_ids(*REFERENCE, frame=1)))
    return flux_inputs(1, len(ids)) | {"img_ids": ids}


def picture_and_reference(grid: tuple[int, ...]) -> list[Run]:
    return [Run(grid, before=TEXT, references=math.prod(REFERENCE))]


def mode_and_text(grid: tuple[int, ...]) -> list[Run]:
    return [Run(grid, before=1 + TEXT)]


def flux_pipeline(transformer: nn.Module) -> FluxPipeline:
    return FluxPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def flux_kontext_pipeline(transformer: nn.Module) -> FluxKontextPipeline:
    return FluxKontextPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def flux_kontext_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    """The picture to be changed comes as latents, and is not as large as the one to be drawn."""
    pooled = {"pooled_prompt_embeds": noise(2, 24, seed=4), "negative_pooled_prompt_embeds": noise(2, 24, seed=5)}
    return draw(
        pipe, 32, image=noise(2, 4, 4, 6, seed=6), height=24, width=40, max_area=24 * 40, true_cfg_scale=guidance,
        _auto_resize=False, **pooled,
    )  # fmt: skip


def flux_draw(pipe: DiffusionPipeline, guidance: float, **settings) -> Tensor:
    pooled = {"pooled_prompt_embeds": noise(2, 24, seed=4), "negative_pooled_prompt_embeds": noise(2, 24, seed=5)}
    return draw(pipe, 32, height=24, width=40, guidance_scale=3.0, true_cfg_scale=guidance, **pooled, **settings)


HOSTS = {
    "flux": Tiny(
        "FluxTransformer2DModel", flux, flux_inputs, 4, "single_transformer_blocks.*", flux_pipeline, flux_draw
    ),
    "flux-kontext": Tiny(
        "FluxTransformer2DModel", flux_shallow, flux_kontext_inputs, 2, "single_transformer_blocks.*",
        flux_kontext_pipeline, flux_kontext_draw, runs=picture_and_reference,
    ),
    "flux-controlnet": Tiny(
        "FluxControlNetModel", flux_controlnet, flux_controlnet_inputs, 4, "single_transformer_blocks.*"
    ),
    "flux-controlnet-union": Tiny(
        "FluxControlNetModel", flux_union_controlnet, flux_union_inputs, 4, "single_transformer_blocks.*",
        runs=mode_and_text,
    ),
}  # fmt: skip
