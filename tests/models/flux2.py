"""FLUX.2: FLUX's double blocks; single blocks with attention and MLP in one projection; places on four axes."""

from functools import partial

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from .base import TEXT, Run, Tiny, noise, two_steps


def flux2(depth: int = 2) -> torch.nn.Module:
    return diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=depth, num_single_layers=depth, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        mlp_ratio=2.0,
    )  # fmt: skip


def flux2_ids(height: int, width: int, frame: int = 0) -> Tensor:
    """`img_ids` as Flux2Pipeline makes them, for one sample."""
    zero = torch.zeros(1, dtype=torch.int64)
    return torch.cartesian_prod(zero + frame, torch.arange(height), torch.arange(width), zero)


def flux2_inputs(height: int, width: int) -> dict:
    words = torch.cartesian_prod(*[torch.zeros(1, dtype=torch.int64)] * 3, torch.arange(TEXT))
    return {
        "hidden_states": noise(2, height * width, 16),
        "encoder_hidden_states": noise(2, TEXT, 24, seed=2),
        "timestep": torch.tensor([0.5, 0.7]),
        "img_ids": flux2_ids(height, width).expand(2, -1, -1),
        "txt_ids": words.expand(2, -1, -1),
        "guidance": torch.tensor([3.0, 4.0]),
    }


def flux2_pipeline(transformer: nn.Module) -> DiffusionPipeline:
    return diffusers.Flux2Pipeline(
        vae=None, text_encoder=None, tokenizer=None, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )  # fmt: skip


def flux2_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    """Guidance is embedded: no batch of two."""
    return two_steps(
        pipe, prompt_embeds=noise(2, TEXT, 24, seed=2), guidance_scale=guidance, height=96, width=160
    )  # fmt: skip


def flux2_reference_inputs(height: int, width: int) -> dict:
    """As Flux2Pipeline with two input images: behind the picture to be drawn, 10 and 20 on the first axis."""
    ids = torch.cat((flux2_ids(height, width), flux2_ids(1, 3, frame=10), flux2_ids(1, 2, frame=20)))
    return flux2_inputs(1, len(ids)) | {"img_ids": ids.expand(2, -1, -1)}


def picture_and_references(grid: tuple[int, ...]) -> list[Run]:
    return [Run(grid, before=TEXT, references=3 + 2)]


HOSTS = {}
if hasattr(diffusers, "Flux2Transformer2DModel"):
    HOSTS["flux2"] = Tiny(
        "Flux2Transformer2DModel", flux2, flux2_inputs, 4, "single_transformer_blocks.*", flux2_pipeline, flux2_draw
    )
    HOSTS["flux2-refs"] = Tiny(
        "Flux2Transformer2DModel", partial(flux2, depth=1), flux2_reference_inputs, 2, "single_transformer_blocks.*",
        runs=picture_and_references,
    )  # fmt: skip
