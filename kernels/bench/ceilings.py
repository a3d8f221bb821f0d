"""What the card can do at most: a large copy for memory, a large matrix product for arithmetic."""

from __future__ import annotations

import torch

from . import timing
from .runner import Session

COPY_BYTES = 2**30
SIDE = 8192


def measure(session: Session) -> None:
    """Two rows of op `ceiling`; the session keeps the bandwidth, bytes read plus bytes written."""
    session.copy_gbs = _copy(session)
    session.say(f"ceilings: copy {session.copy_gbs:.0f} GB/s, matrix product {_matmul(session):.0f} TFLOP/s")


def _copy(session: Session) -> float:
    source = torch.randint(256, (COPY_BYTES,), device=session.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = timing.each(lambda: target.copy_(source))
    session.emit("ceiling", "copy", "forward", "1GiB", source.dtype, times, 2 * COPY_BYTES / timing.MIB)
    return copy_gbs(times[0])


def _matmul(session: Session) -> float:
    a, b = (torch.randn(SIDE, SIDE, device=session.device, dtype=torch.bfloat16) for _ in range(2))
    times = timing.each(lambda: a @ b)
    held = timing.storage_bytes((a, b, a @ b)) / timing.MIB
    session.emit("ceiling", "matmul", "forward", f"{SIDE}x{SIDE}x{SIDE}", a.dtype, times, held)
    return 2 * SIDE**3 / times[0] / 1e9


def copy_gbs(ms: float) -> float:
    """GB/s of the copy that took so many milliseconds."""
    return 2 * COPY_BYTES / ms / 1e6
