"""All that can be measured, by name; a new op is one more file and one more entry."""

from __future__ import annotations

from .agent import Agent, Pool
from .denoisers import SD15, SDXL, Flux, Wan
from .depthwise import Depthwise, LiT
from .linear import Linear
from .op import Bench, Case
from .prologue import Prologue
from .sla import SLA
from .window import Window

KERNELS: dict[str, Bench] = {
    op.name: op for op in (Linear(), Depthwise(), LiT(), Prologue(), Window(), SLA(), Agent(), Pool())
}
MODELS: dict[str, Bench] = {op.name: op for op in (Flux(), SDXL(), SD15(), Wan())}
OPS = KERNELS | MODELS


def chosen(ops: list[str] | None, shapes: list[str] | None) -> tuple[list[Bench], list[Case]]:
    """The ops by name, all kernels for None, and their cases whose shape contains one of the texts.

    Raises:
        ValueError: no op of that name, or no case left.
    """
    for name in ops or ():
        if name not in OPS:
            raise ValueError(f"--op {name} is unknown; there are {', '.join(OPS)}.")
    found = [OPS[name] for name in dict.fromkeys(ops or KERNELS)]
    cases = [c for op in found for c in op.cases if not shapes or any(text in str(c.shape) for text in shapes)]
    if not cases:
        raise ValueError(f"--shape {', '.join(shapes or [])} fits no case; --list shows them.")
    return found, cases
