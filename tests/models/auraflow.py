"""AuraFlow: eight register tokens, text and picture in one sequence, double and single blocks."""

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from .base import TEXT, Run, Tiny, draw, noise, vae

REGISTERS = 8


def auraflow() -> AuraFlowTransformer2DModel:
    return AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=32, out_channels=4,
        pos_embed_max_size=1024,
    )  # fmt: skip


def auraflow_inputs(height: int, width: int) -> dict:
    return {
        "hidden_states": noise(2, 4, 2 * height, 2 * width),
        "encoder_hidden_states": noise(2, TEXT, 12, seed=2),
        "timestep": torch.tensor([0.5, 0.7]),
    }


def registers_and_text(grid: tuple[int, ...]) -> list[Run]:
    return [Run(grid, before=REGISTERS + TEXT)]


def auraflow_pipeline(transformer: nn.Module) -> AuraFlowPipeline:
    return AuraFlowPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def auraflow_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    masks = dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), torch.ones(2, TEXT))
    return draw(pipe, 12, height=24, width=40, guidance_scale=guidance, negative_prompt=None, **masks)


HOSTS = {
    "auraflow": Tiny(
        "AuraFlowTransformer2DModel", auraflow, auraflow_inputs, 4, "single_transformer_blocks.*", auraflow_pipeline,
        auraflow_draw, runs=registers_and_text,
    ),
}  # fmt: skip
