"""Chroma: FLUX's layers, and a mask of the prompt's padding."""

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from .base import TEXT, Tiny, draw, noise, padded_text, vae
from .flux import flux_ids


def chroma() -> ChromaTransformer2DModel:
    return ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_num_channels=16, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip


def chroma_inputs(height: int, width: int) -> dict:
    return {
        "hidden_states": noise(2, height * width, 16),
        "encoder_hidden_states": noise(2, TEXT, 32, seed=2),
        "timestep": torch.tensor([0.5, 0.7]),
        "img_ids": flux_ids(height, width),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def chroma_padded(height: int, width: int) -> dict:
    """The mask as `ChromaPipeline` makes it where the prompt's mask is bool."""
    mask = torch.cat((padded_text(), torch.ones(2, height * width, dtype=torch.bool)), dim=1)
    return chroma_inputs(height, width) | {"attention_mask": mask}


def chroma_pipeline(transformer: nn.Module) -> ChromaPipeline:
    return ChromaPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def chroma_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    masks = dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), padded_text().float())
    return draw(pipe, 32, height=24, width=40, guidance_scale=guidance, **masks)


HOSTS = {
    "chroma": Tiny(
        "ChromaTransformer2DModel", chroma, chroma_inputs, 4, "single_transformer_blocks.*", chroma_pipeline,
        chroma_draw,
    ),
    "chroma-padded": Tiny(
        "ChromaTransformer2DModel", chroma, chroma_padded, 4, "single_transformer_blocks.*",
    ),
}  # fmt: skip
