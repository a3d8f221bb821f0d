"""Tiny hosts, one or more for every family: diffusers' own classes, built here in milliseconds, never downloaded."""

from . import auraflow as _auraflow
from . import chroma as _chroma
from . import flux as _flux
from . import flux2 as _flux2
from . import pixart as _pixart
from . import qwen as _qwen
from . import sd3 as _sd3
from . import unet as _unet
from .base import TEXT, Run, Tiny, ddim, forward, gap, grids_for, lively, noise, output, padded_text, processors
from .flux import flux, flux_ids
from .flux2 import flux2_ids
from .pixart import pixart
from .unet import make_unet, unet_inputs

HOSTS = (
    _unet.HOSTS | _pixart.HOSTS | _sd3.HOSTS | _auraflow.HOSTS | _flux.HOSTS | _chroma.HOSTS | _flux2.HOSTS
    | _qwen.HOSTS
)  # fmt: skip
"""Every tiny host; what must hold for each family is tested on all of them."""

TINY = {name: HOSTS[name] for name in ("unet-sd15", "unet-sdxl", "pixart", "flux")}
"""One of each kind of sequence, for what does not depend on the family: files, copies, offload, training."""

__all__ = [
    "HOSTS", "TEXT", "TINY", "Run", "Tiny", "ddim", "flux", "flux2_ids", "flux_ids", "forward", "gap", "grids_for",
    "lively", "make_unet", "noise", "output", "padded_text", "pixart", "processors", "unet_inputs",
]  # fmt: skip
