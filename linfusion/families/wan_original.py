"""Wan's parameters by the names of the authors' own code, which derived models keep in their published weights."""

from __future__ import annotations

import re

from torch import Tensor

PATCH = (1, 2, 2)  # of every Wan; the original keeps the patches' projection as a matrix in some releases

# one after the other; the second norm of diffusers is the authors' third, theirs have no parameters
RENAMED = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^(?:model\.|net\.)", ""),
        (r"\.self_attn(?=\.|$)", ".attn1"),
        (r"\.cross_attn(?=\.|$)", ".attn2"),
        (r"(\.attn[12])\.([qkv])\.", r"\1.to_\2."),
        (r"(\.attn[12])\.o\.", r"\1.to_out.0."),
        (r"(\.attn2)\.([kv])_img\.", r"\1.add_\2_proj."),
        (r"(\.attn2)\.norm_k_img\.", r"\1.norm_added_k."),
        (r"^(blocks\.\d+)\.norm3\.", r"\1.norm2."),
        (r"\.ffn\.0\.", ".ffn.net.0.proj."),
        (r"\.ffn\.2\.", ".ffn.net.2."),
        (r"^(blocks\.\d+\.|head\.)modulation$", r"\1scale_shift_table"),
        (r"^head\.(scale_shift_table)$", r"\1"),
        (r"^head\.head\.", "proj_out."),
        (r"^(time|text)_embedding\.0\.", r"condition_embedder.\1_embedder.linear_1."),
        (r"^(time|text)_embedding\.2\.", r"condition_embedder.\1_embedder.linear_2."),
        (r"^time_projection\.1\.", "condition_embedder.time_proj."),
        (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
        (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
        (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
        (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
        (r"^img_emb\.emb_pos$", "condition_embedder.image_embedder.pos_embed"),
    )
]


def name_here(original: str) -> str:
    """The name in diffusers' `WanTransformer3DModel` of a parameter or module of the original."""
    for pattern, name in RENAMED:
        original = pattern.sub(name, original)
    return original


def parameter_here(original: str, value: Tensor) -> tuple[str, Tensor]:
    """Name and value in diffusers."""
    if value.ndim == 2 and original.endswith("patch_embedding.weight"):
        value = value.unflatten(1, (-1, *PATCH))
    return name_here(original), value
