"""LTX-Video: video tokens alone, each head with angles of its own."""

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from torch import Tensor, nn

from .base import TEXT, Tiny, noise

FRAMES = 2


def ltx() -> LTXVideoTransformer3DModel:
    """32 channels leave two over after the three axes' sixths, which are not rotated."""
    return LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=12,
    )  # fmt: skip


def ltx_inputs(height: int, width: int) -> dict:
    mask = torch.ones(2, TEXT)
    mask[1, 3:] = 0
    return {
        "hidden_states": noise(2, FRAMES * height * width, 4),
        "encoder_hidden_states": noise(2, TEXT, 12, seed=2),
        "timestep": torch.tensor([500.0, 700.0]),
        "encoder_attention_mask": mask,
        "num_frames": FRAMES,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def ltx_coords(frames: int, height: int, width: int, start: int = 0) -> Tensor:
    """`video_coords` as LTXConditionPipeline makes them: seconds and pixels; `start` puts a later frame first."""
    axes = (torch.arange(n, dtype=torch.float32) for n in (frames, height, width))
    time, y, x = (c.flatten() for c in torch.meshgrid(*axes, indexing="ij"))
    time = ((8 * time - 7).clamp(min=0) + start) / 25
    return torch.stack((time, 32 * y, 32 * x)).repeat(2, 1, 1)


def ltx_coords_inputs(height: int, width: int) -> dict:
    """The numbers are not given, or, by the pipeline for long videos, wrongly as 1."""
    coords = {"num_frames": 1, "height": 1, "width": 1, "video_coords": ltx_coords(FRAMES, height, width)}
    return ltx_inputs(height, width) | coords


def ltx_pipeline(transformer: nn.Module) -> LTXPipeline:
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=None, text_encoder=None,
        tokenizer=None, transformer=transformer,
    )  # fmt: skip


def ltx_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    mask = torch.ones(2, TEXT)
    mask[1, 3:] = 0
    return pipe(
        prompt_embeds=noise(2, TEXT, 12, seed=2), prompt_attention_mask=mask,
        negative_prompt_embeds=noise(2, TEXT, 12, seed=3), negative_prompt_attention_mask=mask, height=96, width=160,
        num_frames=9, guidance_scale=guidance, num_inference_steps=2, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip


HOSTS = {
    "ltx": Tiny(
        "LTXVideoTransformer3DModel", ltx, ltx_inputs, 2, "transformer_blocks.1.*", ltx_pipeline, ltx_draw,
        frames=FRAMES,
    ),
    "ltx-coords": Tiny(
        "LTXVideoTransformer3DModel", ltx, ltx_coords_inputs, 2, "transformer_blocks.1.*", frames=FRAMES
    ),
}  # fmt: skip
