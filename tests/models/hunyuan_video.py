"""HunyuanVideo: video then padded text in one sequence, double and single blocks."""

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from torch import Tensor, nn

from .base import TEXT, Run, Tiny, noise

FRAMES = 2
REAL = (TEXT, 3)
"""Text tokens of each sample that are not padding."""


def make_hunyuan_video(**settings) -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=12, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
        **settings,
    )  # fmt: skip


def hunyuan_video() -> HunyuanVideoTransformer3DModel:
    return make_hunyuan_video()


def hunyuan_video_i2v() -> HunyuanVideoTransformer3DModel:
    """The first frame's tokens are given, and modulated apart from the others; two latent frames a token."""
    return make_hunyuan_video(image_condition_type="token_replace", guidance_embeds=False, patch_size_t=2)


def text_mask() -> Tensor:
    return (torch.arange(TEXT) < torch.tensor(REAL)[:, None]).long()


def hunyuan_video_inputs(height: int, width: int) -> dict:
    return {
        "hidden_states": noise(2, 4, FRAMES, 2 * height, 2 * width),
        "timestep": torch.tensor([500, 700]),
        "encoder_hidden_states": noise(2, TEXT, 12, seed=2),
        "encoder_attention_mask": text_mask(),
        "pooled_projections": noise(2, 8, seed=3),
        "guidance": torch.tensor([3000.0, 4000.0]),
    }


def hunyuan_video_i2v_inputs(height: int, width: int) -> dict:
    return hunyuan_video_inputs(height, width) | {"hidden_states": noise(2, 4, 2 * FRAMES, 2 * height, 2 * width)}


def text_behind(grid: tuple[int, ...]) -> list[Run]:
    return [Run(grid, after=TEXT)]


def hunyuan_video_pipeline(transformer: nn.Module) -> HunyuanVideoPipeline:
    return HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, transformer=transformer, vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip


def hunyuan_video_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    def embeds(prefix: str, seed: int) -> dict:
        return {
            f"{prefix}prompt_embeds": noise(2, TEXT, 12, seed=seed),
            f"{prefix}pooled_prompt_embeds": noise(2, 8, seed=seed + 1),
            f"{prefix}prompt_attention_mask": text_mask(),
        }

    return pipe(
        **embeds("", 2), **embeds("negative_", 4), height=48, width=80, num_frames=5, true_cfg_scale=guidance,
        num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip


def host(make, inputs, **more) -> Tiny:
    return Tiny(
        "HunyuanVideoTransformer3DModel", make, inputs, 4, "single_transformer_blocks.*", frames=FRAMES,
        runs=text_behind, **more,
    )  # fmt: skip


HOSTS = {
    "hunyuan-video": host(
        hunyuan_video, hunyuan_video_inputs, pipeline=hunyuan_video_pipeline, draw=hunyuan_video_draw
    ),
    "hunyuan-video-i2v": host(hunyuan_video_i2v, hunyuan_video_i2v_inputs),
}
