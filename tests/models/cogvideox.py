"""CogVideoX: text then video in one sequence, with the same projections."""

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel, DiffusionPipeline
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

from .base import TEXT, Tiny, noise

FRAMES = 2


def make_cogvideox(**settings) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=12, num_layers=2, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=TEXT,
        **settings,
    )  # fmt: skip


def cogvideox() -> CogVideoXTransformer3DModel:
    """As CogVideoX-2B: positions are added to the tokens, nothing is rotated."""
    return make_cogvideox()


def cogvideox15() -> CogVideoXTransformer3DModel:
    """As CogVideoX 1.5: rotation, two latent frames a token."""
    return make_cogvideox(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False)


def cogvideox_inputs(height: int, width: int, frames: int = FRAMES) -> dict:
    return {
        "hidden_states": noise(2, frames, 4, 2 * height, 2 * width),
        "encoder_hidden_states": noise(2, TEXT, 12, seed=2),
        "timestep": torch.tensor([500, 700]),
    }


def cogvideox15_inputs(height: int, width: int) -> dict:
    tables = get_3d_rotary_pos_embed(
        16, None, (height, width), FRAMES, grid_type="slice", max_size=(max(height, 32), max(width, 32))
    )
    return cogvideox_inputs(height, width, 2 * FRAMES) | {"image_rotary_emb": tables}


def cogvideox_pipeline(transformer: nn.Module) -> CogVideoXPipeline:
    return CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=CogVideoXDDIMScheduler()
    )


def cogvideox_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    return pipe(
        prompt_embeds=noise(2, TEXT, 12, seed=2), negative_prompt_embeds=noise(2, TEXT, 12, seed=3), height=48,
        width=80, num_frames=5, guidance_scale=guidance, num_inference_steps=2, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip


def host(make, inputs, **more) -> Tiny:
    return Tiny("CogVideoXTransformer3DModel", make, inputs, 2, "transformer_blocks.1.*", frames=FRAMES, **more)


HOSTS = {
    "cogvideox": host(cogvideox, cogvideox_inputs, pipeline=cogvideox_pipeline, draw=cogvideox_draw),
    "cogvideox-1.5": host(cogvideox15, cogvideox15_inputs),
}
