"""HunyuanDiT: picture tokens with norms and a rotation, two kinds of text in cross-attention, long skips."""

import torch
from diffusers import HunyuanDiT2DModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed

from .base import TEXT, Tiny, noise


def hunyuan_dit() -> HunyuanDiT2DModel:
    return HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=16, hidden_size=32,
        num_layers=4, mlp_ratio=2.0, cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=8,
        text_len=TEXT, text_len_t5=3, use_style_cond_and_image_meta_size=False,
    )  # fmt: skip


def hunyuan_dit_inputs(height: int, width: int) -> dict:
    keep = torch.tensor([[1] * TEXT, [1] * 3 + [0] * (TEXT - 3)])
    return {
        "hidden_states": noise(2, 4, 2 * height, 2 * width),
        "timestep": torch.tensor([5.0, 7.0]),
        "encoder_hidden_states": noise(2, TEXT, 16, seed=2),
        "text_embedding_mask": keep,
        "encoder_hidden_states_t5": noise(2, 3, 16, seed=3),
        "text_embedding_mask_t5": torch.ones(2, 3, dtype=torch.long),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, ((0, 0), (height, width)), (height, width), output_type="pt"),
    }


HOSTS = {
    "hunyuan-dit": Tiny("HunyuanDiT2DModel", hunyuan_dit, hunyuan_dit_inputs, 4, "blocks.3.*"),
}
