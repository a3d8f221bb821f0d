"""Drop-in linear and sparse attention for diffusers: change it in one line, get the old one back in another.

import linfusion as lf

lf.apply(pipe, lf.CLEAR(radius=16))
lf.restore(pipe)
"""

import os
from typing import Any as _Any

_here = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(
    os.path.join(_here, "kernels")
):  # a source checkout: kernels/, demos/, ... stand beside this folder
    __path__.append(os.path.dirname(_here))

from .apply import applied, apply, attn_processors, restore
from .describe import describe
from .families import families
from .mechanisms import CLEAR, SLA, Agent, AgentSD, LinFusion, LiT, Softmax, mechanisms
from .version import __version__
from .weights import load, save


def demo_pipeline(name: str = "emoji-flux", **kwargs: _Any) -> _Any:
    """The embedded text-to-image model as an ordinary diffusers pipeline; needs no network.

    Args:
        name: "emoji-flux", a small FLUX that draws 256 x 256 emoji from their names.
        kwargs: passed on to `from_pretrained`, such as `torch_dtype`.

    Raises:
        ValueError: no embedded model of that name.
    """
    from .demos.embedded import demo_pipeline as build  # importing pipelines takes seconds; only who asks pays

    return build(name, **kwargs)


__all__ = [
    "CLEAR",
    "SLA",
    "Agent",
    "AgentSD",
    "LiT",
    "LinFusion",
    "Softmax",
    "__version__",
    "applied",
    "apply",
    "attn_processors",
    "demo_pipeline",
    "describe",
    "families",
    "load",
    "mechanisms",
    "restore",
    "save",
]
