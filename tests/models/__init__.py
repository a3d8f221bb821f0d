"""Tiny hosts, one or more for every family: diffusers' own classes, built here in milliseconds, never downloaded."""

from . import controlnet as _controlnet
from . import dit as _dit
from . import flux as _flux
from . import hunyuan_dit as _hunyuan_dit
from . import lumina2 as _lumina2
from . import motion as _motion
from . import pixart as _pixart
from . import svd as _svd
from . import unet as _unet
from . import z_image as _z_image
from .base import TEXT, Run, Tiny, ddim, forward, gap, grids_for, lively, noise, processors, whole
from .flux import flux, flux_ids
from .pixart import pixart
from .unet import make_unet, unet_inputs

HOSTS = (
    _unet.HOSTS | _motion.HOSTS | _svd.HOSTS | _controlnet.HOSTS | _pixart.HOSTS | _dit.HOSTS | _hunyuan_dit.HOSTS
    | _flux.HOSTS | _lumina2.HOSTS | _z_image.HOSTS
)  # fmt: skip
"""Every tiny host; what must hold for each family is tested on all of them."""

TINY = {name: HOSTS[name] for name in ("unet-sd15", "unet-sdxl", "pixart", "flux")}
"""One of each kind of sequence, for what does not depend on the family: files, copies, offload, training."""

__all__ = [
    "HOSTS", "TEXT", "TINY", "Run", "Tiny", "ddim", "flux", "flux_ids", "forward", "gap", "grids_for", "lively",
    "make_unet", "noise", "pixart", "processors", "unet_inputs", "whole",
]  # fmt: skip
