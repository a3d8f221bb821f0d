"""Wan: video tokens alone, text and a first picture in cross-attention."""

import torch
from diffusers import (
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from torch import Tensor, nn

from .base import TEXT, Tiny, noise

FRAMES = 2
SETTINGS = {
    "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
}  # fmt: skip


def wan() -> WanTransformer3DModel:
    return WanTransformer3DModel(**SETTINGS)


def wan_i2v() -> WanTransformer3DModel:
    """As Wan 2.1 image-to-video: cross-attention also to features of the first picture."""
    return WanTransformer3DModel(**SETTINGS, image_dim=20, added_kv_proj_dim=48)


def wan_vace() -> WanVACETransformer3DModel:
    """Control blocks beside the main ones, with self-attention of their own."""
    return WanVACETransformer3DModel(**SETTINGS, vace_layers=[0], vace_in_channels=6)


def wan_inputs(height: int, width: int) -> dict:
    return {
        "hidden_states": noise(2, 4, FRAMES, 2 * height, 2 * width),
        "timestep": torch.tensor([500, 700]),
        "encoder_hidden_states": noise(2, TEXT, 16, seed=2),
    }


def wan_i2v_inputs(height: int, width: int) -> dict:
    """The host takes the last 512 tokens for text, whatever there is."""
    text = {"encoder_hidden_states": noise(2, 512, 16, seed=2)}
    return wan_inputs(height, width) | text | {"encoder_hidden_states_image": noise(2, 3, 20, seed=3)}


def wan_ti2v_inputs(height: int, width: int) -> dict:
    """As Wan 2.2 5B: one timestep a token, zero in the first frame, which is given."""
    timestep = torch.tensor([[500.0], [700.0]]).repeat(1, FRAMES * height * width)
    timestep[:, : height * width] = 0
    return wan_inputs(height, width) | {"timestep": timestep}


def wan_vace_inputs(height: int, width: int) -> dict:
    return wan_inputs(height, width) | {"control_hidden_states": noise(2, 6, FRAMES, 2 * height, 2 * width, seed=3)}


def wan_pipeline(transformer: nn.Module, second: nn.Module | None = None) -> WanPipeline:
    """With a second model, as Wan 2.2 has one for the late, less noisy steps."""
    return WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, transformer_2=second,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        boundary_ratio=None if second is None else 0.875,
    )  # fmt: skip


def wan_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    return pipe(
        prompt_embeds=noise(2, TEXT, 16, seed=2), negative_prompt_embeds=noise(2, TEXT, 16, seed=3), height=48,
        width=80, num_frames=5, guidance_scale=guidance, num_inference_steps=2, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip


def host(make, inputs, layers: int = 2, **more) -> Tiny:
    family = "WanVACETransformer3DModel" if make is wan_vace else "WanTransformer3DModel"
    return Tiny(family, make, inputs, layers, "blocks.1.*", frames=FRAMES, **more)


HOSTS = {
    "wan": host(wan, wan_inputs, pipeline=wan_pipeline, draw=wan_draw),
    "wan-i2v": host(wan_i2v, wan_i2v_inputs),
    "wan-ti2v": host(wan, wan_ti2v_inputs),
    "wan-vace": host(wan_vace, wan_vace_inputs, layers=3),
}
