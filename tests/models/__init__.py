"""Tiny hosts, one or more for every family: diffusers' own classes, built here in milliseconds, never downloaded."""

import importlib
import pkgutil

from .base import (
    TEXT,
    Quantised,
    Run,
    Tiny,
    cast,
    ddim,
    forward,
    gap,
    grids_for,
    lively,
    noise,
    padded_text,
    processors,
    whole,
)
from .flux import flux, flux_ids
from .flux2 import flux2_ids
from .pixart import pixart
from .unet import make_unet, unet_inputs

HOSTS: dict[str, Tiny] = {}
"""Every tiny host, from every file here; what must hold for each family is tested on all of them."""
for _file in pkgutil.iter_modules(__path__):
    HOSTS |= getattr(importlib.import_module(f".{_file.name}", __name__), "HOSTS", {})

TINY = {name: HOSTS[name] for name in ("unet-sd15", "unet-sdxl", "pixart", "flux")}
"""One of each kind of sequence, for what does not depend on the family: files, copies, offload, training."""

__all__ = [
    "HOSTS",
    "TEXT",
    "TINY",
    "Quantised",
    "Run",
    "Tiny",
    "cast",
    "ddim",
    "flux",
    "flux2_ids",
    "flux_ids",
    "forward",
    "gap",
    "grids_for",
    "lively",
    "make_unet",
    "noise",
    "padded_text",
    "pixart",
    "processors",
    "unet_inputs",
    "whole",
]
