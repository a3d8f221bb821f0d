"""DiT: class labels, no text, square grids only (the host takes the root of the tokens)."""

import torch
from diffusers import DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from .base import Tiny, ddim, noise, vae


def dit() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=16,
        patch_size=2,
    )  # fmt: skip


def dit_inputs(height: int, width: int) -> dict:
    return {
        "hidden_states": noise(2, 4, 2 * height, 2 * width),
        "timestep": torch.tensor([5, 7]),
        "class_labels": torch.tensor([1, 2]),
    }


def dit_pipeline(transformer: nn.Module) -> DiTPipeline:
    return DiTPipeline(transformer=transformer, vae=vae(), scheduler=ddim())


def dit_draw(pipe: DiffusionPipeline, guidance: float) -> Tensor:
    """Pictures, since this pipeline decodes in any case."""
    generator = torch.Generator().manual_seed(0)
    out = pipe([1, 2], guidance_scale=guidance, generator=generator, num_inference_steps=2, output_type="np")
    return torch.from_numpy(out.images)


HOSTS = {
    "dit": Tiny(
        "DiTTransformer2DModel", dit, dit_inputs, 2, "transformer_blocks.1.*", dit_pipeline, dit_draw, square=True
    ),
}
