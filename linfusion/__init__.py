"""Drop-in linear and sparse attention for diffusers."""

import os

_here = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_here, "kernels")):  # a source checkout: kernels/, demos/, ... stand beside this folder
    __path__.append(os.path.dirname(_here))

__version__ = "0.1.0"
