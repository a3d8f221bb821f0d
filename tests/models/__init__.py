"""Tiny hosts, one or more for every family: diffusers' own classes, built here in milliseconds, never downloaded."""

from . import cogvideox as _cogvideox
from . import flux as _flux
from . import hunyuan_video as _hunyuan_video
from . import ltx as _ltx
from . import pixart as _pixart
from . import unet as _unet
from . import wan as _wan
from .base import TEXT, Run, Tiny, ddim, forward, gap, grids_for, lively, noise, processors
from .flux import flux, flux_ids
from .pixart import pixart
from .unet import make_unet, unet_inputs

HOSTS = (
    _unet.HOSTS | _pixart.HOSTS | _flux.HOSTS
    | _wan.HOSTS | _ltx.HOSTS | _cogvideox.HOSTS | _hunyuan_video.HOSTS
)  # fmt: skip
"""Every tiny host; what must hold for each family is tested on all of them."""

TINY = {name: HOSTS[name] for name in ("unet-sd15", "unet-sdxl", "pixart", "flux")}
"""One of each kind of sequence, for what does not depend on the family: files, copies, offload, training."""

__all__ = [
    "HOSTS", "TEXT", "TINY", "Run", "Tiny", "ddim", "flux", "flux_ids", "forward", "gap", "grids_for", "lively",
    "make_unet", "noise", "pixart", "processors", "unet_inputs",
]  # fmt: skip
