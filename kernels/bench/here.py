"""`linfusion bench --here`: from which size on Triton is faster than PyTorch here, and exact attention slower.

Call after call by the host's clock, as a pipeline calls: for small sizes launches are what costs. Forward only. Triton
and PyTorch are both the library's own; Triton is checked as for the tables, at the smallest size alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import launch
from ..backend import use_backend
from ..crossovers import Crossover, own_file, write
from . import peers, timing
from .checks import Bound
from .op import Case, Op
from .ops import KERNELS
from .runner import Session, checked, release, triton_version
from .table import Shape

SIDES = (8, 16, 32, 64, 128)  # of the grid: 64 to 16384 tokens
HEADS = 16
DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float32)
AGENTS = 49
LONG = 5.0  # milliseconds, after which no launch is seen


RADIUS, TOPK = 8, 0.1


class Ladder(NamedTuple):
    """An op of the library, the benchmark that knows it, what a shape needs besides, and whether it is attention."""

    op: str
    bench: str
    settings: Callable[[int], tuple[tuple[str, Any], ...]]
    attention: bool


LADDERS = (
    Ladder("linear_attention", "linear", lambda side: (), True),
    Ladder("agent_attention", "agent", lambda side: (("a", AGENTS),), True),
    Ladder("window_attention", "window", lambda side: (("g", (side, side)), ("t", 0), ("r", RADIUS)), True),
    Ladder("sparse_linear_attention", "sla", lambda side: (("k", TOPK),), True),
    Ladder("qk_norm_rope", "prologue", lambda side: (), False),
    Ladder("depthwise_conv", "depthwise", lambda side: (("g", (side, side)), ("c", 3)), False),
)


def measure(session: Session, path: Path | None = None) -> Path:
    """Measure all ladders and write what was found, by default where the library looks; the file."""
    found = []
    for ladder in LADDERS:
        for dtype in DTYPES:
            for dim in DIMS:
                found.append(climb(ladder, dim, dtype, session))
                session.say(str(found[-1]))
    path, gpu = path or own_file(), torch.cuda.get_device_name(session.device)
    about = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "torch": torch.__version__}
    launch.forget()  # what was chosen before
    write(path, gpu, about | {"triton": triton_version(), "git": session.git}, found)
    session.say(f"{gpu}: written to {path}")
    return path


def climb(ladder: Ladder, dim: int, dtype: torch.dtype, session: Session) -> Crossover:
    """One op at growing sizes, checked at the first of them; where ours is wrong, PyTorch is always faster."""
    op = KERNELS[ladder.bench]
    assert isinstance(op, Op)
    wins: list[tuple[int, bool]] = []
    until, fine = 0, None
    for side in SIDES:
        case = Case(op.name, Shape(1, HEADS, side * side, dim, ladder.settings(side)), dtype, ("forward",))
        release(session)
        inputs = op.inputs(case, session.device)
        upstream = op.upstream(case, inputs)
        ours, exact = (Bound(op, case, p, inputs, upstream).ready("forward") for p in (op.ours(case), peers.exact()))
        with use_backend("triton"):
            if fine is None:
                fine = checked(op, case, session, inputs, upstream) is not None
            in_triton = _each(ours) if fine else math.inf
        with use_backend("torch"):
            in_torch = _each(ours)
        wins.append((case.shape.elements, in_triton <= in_torch))
        if ladder.attention and _each(exact) < min(in_triton, in_torch):
            until = case.shape.tokens
    return Crossover(
        ladder.op, str(dtype).removeprefix("torch."), dim, _start(wins), until if ladder.attention else None
    )


def _each(call: Callable[[], object]) -> float:
    """Milliseconds, from fewer calls where one takes long."""
    call()
    once = timing.loop(call, calls=1, rounds=1)[0]
    return timing.loop(call, calls=20, rounds=10)[0] if once < LONG else once


def _start(wins: list[tuple[int, bool]]) -> int | None:
    """From which size on all are won: 0 where all are, None where not even the largest is."""
    lost = [i for i, (_, won) in enumerate(wins) if not won]
    if not lost:
        return 0
    return None if lost[-1] == len(wins) - 1 else wins[lost[-1] + 1][0]
