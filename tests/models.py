"""Tiny hosts, one or more for every family: diffusers' own classes, built here in milliseconds, never downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

TEXT = 7
"""Text tokens of every sample."""


@dataclass(frozen=True)
class Tiny:
    """A host to test on.

    Attributes:
        family: the class name that `linfusion.families()` lists.
        make: the model as its class initialises it.
        inputs: `(height, width) -> forward's arguments` for batch 2, in tokens of the finest attention grid.
        layers: how many self-attention layers it has.
        some: a pattern that picks some of them.
        pipeline: a pipeline around the model, without text encoders.
        draw: `(pipeline, guidance) -> latents` of two prompts; 1.0 turns the guidance batch (or second pass) off.
    """

    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict]
    layers: int
    some: str
    pipeline: Callable[[nn.Module], DiffusionPipeline]
    draw: Callable[[DiffusionPipeline, float], Tensor]

    def build(self) -> nn.Module:
        """A model in which attention matters: what each layer attends to decides much of the output."""
        torch.manual_seed(0)
        return lively(self.make()).eval()

    def build_pipeline(self) -> DiffusionPipeline:
        pipe = self.pipeline(self.build())
        pipe.set_progress_bar_config(disable=True)
        return pipe


def lively(model: nn.Module) -> nn.Module:
    """Fresh hosts attend almost evenly and add almost nothing; here scores and outputs spread widely."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                nn.init.normal_(p, float(name.endswith("weight")), 0.2)
            elif any(part in name for part in (".to_q.", ".to_k.", "add_q_proj", "add_k_proj")):
                p.mul_(6)
            elif any(part in name for part in (".to_v.", "to_out", "add_v_proj", "to_add_out")):
                p.mul_(3)
    return model


def forward(model: nn.Module, inputs: dict) -> Tensor:
    """The host's output, without gradients."""
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, against the largest value of `b`. Rounding stays under 1e-5, mistakes go over 1e-2."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def processors(model: nn.Module) -> dict[str, object]:
    """Every attention layer's processor, cross-attention included."""
    return {name: m.processor for name, m in model.named_modules() if hasattr(m, "set_processor")}


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_unet(**settings) -> UNet2DConditionModel:
    defaults = {
        "sample_size": 32, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 16,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2, "norm_num_groups": 4,
    }  # fmt: skip
    return UNet2DConditionModel(**(defaults | settings))


def unet_sd15() -> UNet2DConditionModel:
    """As Stable Diffusion 1.5: 1 x 1 convolutions around the blocks; attention at two resolutions."""
    return make_unet()


def unet_sdxl() -> UNet2DConditionModel:
    """As SDXL: linear projections, two blocks a transformer, size and pooled text added to the time embedding."""
    return make_unet(
        use_linear_projection=True, transformer_layers_per_block=2, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=8 + 6 * 4,
    )  # fmt: skip


def unet_inputs(height: int, width: int) -> dict:
    return {
        "sample": noise(2, 4, height, width),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": noise(2, TEXT, 16, seed=2),
    }


def unet_sdxl_inputs(height: int, width: int) -> dict:
    sizes = torch.tensor([[height, width, 0, 0, height, width]] * 2)
    added = {"text_embeds": noise(2, 8, seed=3), "time_ids": sizes}
    return unet_inputs(height, width) | {"added_cond_kwargs": added}


def pixart() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=32, sample_size=16, patch_size=2, caption_channels=12, norm_num_groups=1,
    )  # fmt: skip


def pixart_inputs(height: int, width: int) -> dict:
    return {
        "hidden_states": noise(2, 4, 2 * height, 2 * width),
        "encoder_hidden_states": noise(2, TEXT, 12, seed=2),
        "timestep": torch.tensor([5, 7]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=24, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip


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


def vae() -> AutoencoderKL:
    """Halves the size; four latent channels."""
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
        mid_block_add_attention=False, scaling_factor=1.0, shift_factor=0.0,
    ).eval()  # fmt: skip


def ddim() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, steps_offset=1)


def sd15_pipeline(unet: nn.Module) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, unet=unet, scheduler=ddim(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl_pipeline(unet: nn.Module) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, unet=unet, scheduler=ddim()
    )


def pixart_pipeline(transformer: nn.Module) -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(vae=vae(), text_encoder=None, tokenizer=None, transformer=transformer, scheduler=ddim())


def flux_pipeline(transformer: nn.Module) -> FluxPipeline:
    return FluxPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def _draw(pipe: DiffusionPipeline, channels: int, **arguments) -> Tensor:
    """Two steps on a grid that is not square, for two prompts given as embeddings."""
    return pipe(
        prompt_embeds=noise(2, TEXT, channels, seed=2), negative_prompt_embeds=noise(2, TEXT, channels, seed=3),
        num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent", **arguments,
    ).images  # fmt: skip


def sd15_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    return _draw(pipe, 16, height=16, width=24, guidance_scale=guidance)


def sdxl_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    pooled = {"pooled_prompt_embeds": noise(2, 8, seed=4), "negative_pooled_prompt_embeds": noise(2, 8, seed=5)}
    return _draw(pipe, 16, height=16, width=24, guidance_scale=guidance, **pooled)


def pixart_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    mask = torch.ones(2, TEXT)
    mask[1, 3:] = 0
    return _draw(
        pipe, 12, height=24, width=40, guidance_scale=guidance, use_resolution_binning=False, negative_prompt=None,
        prompt_attention_mask=mask, negative_prompt_attention_mask=mask,
    )  # fmt: skip


def flux_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    pooled = {"pooled_prompt_embeds": noise(2, 24, seed=4), "negative_pooled_prompt_embeds": noise(2, 24, seed=5)}
    return _draw(pipe, 32, height=24, width=40, guidance_scale=3.0, true_cfg_scale=guidance, **pooled)


TINY = {
    "unet-sd15": Tiny("UNet2DConditionModel", unet_sd15, unet_inputs, 4, "up_blocks.*", sd15_pipeline, sd15_draw),
    "unet-sdxl": Tiny("UNet2DConditionModel", unet_sdxl, unet_sdxl_inputs, 8, "up_blocks.*", sdxl_pipeline, sdxl_draw),
    "pixart": Tiny(
        "PixArtTransformer2DModel", pixart, pixart_inputs, 2, "transformer_blocks.1.*", pixart_pipeline, pixart_draw
    ),
    "flux": Tiny(
        "FluxTransformer2DModel", flux, flux_inputs, 4, "single_transformer_blocks.*", flux_pipeline, flux_draw
    ),
}
