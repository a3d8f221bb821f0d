"""One file per kind of host. To add a model class: a `Family`, and its name in the tuple below."""

from __future__ import annotations

from torch import nn

from .base import Family, class_names
from .flux import FLUX
from .joint_video import COGVIDEOX, HUNYUAN_VIDEO
from .packed import LUMINA2, Z_IMAGE
from .spatial import CONTROLNET, DIT, HUNYUAN_DIT, MOTION_UNET, PIXART, SPATIO_TEMPORAL_UNET, UNET
from .video import LTX, WAN, WAN_VACE

FAMILIES: dict[str, Family] = {
    f.model: f
    for f in (
        UNET, MOTION_UNET, SPATIO_TEMPORAL_UNET, CONTROLNET,
        PIXART, DIT, HUNYUAN_DIT,
        FLUX, LUMINA2, Z_IMAGE,
        WAN, WAN_VACE, LTX, COGVIDEOX, HUNYUAN_VIDEO,
    )
}  # fmt: skip

# listed so that the refusal can say why
REFUSED = {
    "SanaTransformer2DModel": "its own attention is already linear",
    "SanaVideoTransformer3DModel": "its own attention is already linear",
}


def families() -> dict[str, Family]:
    """Every supported family by its model class name."""
    return dict(FAMILIES)


def family_of(model: nn.Module) -> Family:
    """The family of a denoiser; ValueError with the list of supported classes when there is none."""
    for name in class_names(model):
        if name in FAMILIES:
            return FAMILIES[name]
        if name in REFUSED:
            raise ValueError(f"{name} is not replaced: {REFUSED[name]}.")
    raise ValueError(f"{type(model).__name__} is not supported. Supported: {', '.join(FAMILIES)}.")


__all__ = ["Family", "families", "family_of"]
