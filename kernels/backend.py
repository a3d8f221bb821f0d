"""Where an op runs: the one answer to "can this run in Triton here", and why not."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256

_enabled = True
_interpreted = False


@contextmanager
def interpreted() -> Iterator[None]:
    """Tensors on the CPU run Triton's kernels too, in its interpreter: for tests, far slower than PyTorch.

    The environment must have had TRITON_INTERPRET=1 before this package was imported.
    """
    global _interpreted
    before, _interpreted = _interpreted, True
    try:
        yield
    finally:
        _interpreted = before


@contextmanager
def without_triton() -> Iterator[None]:
    """Every op takes its PyTorch path: to compare, and to look for the cause of a difference."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def why_not_triton(op: str, head_dim: int | None, *tensors: Tensor, lacking: str | None = None) -> str | None:
    """Why `op` cannot run in Triton on these tensors; None where it can. The fallback is logged, once for a reason.

    `head_dim` is None where channels are not grouped; `lacking` is what the op itself knows to stand in the way.
    """
    reason = _reason(head_dim, tensors) or lacking
    if reason is not None and tensors[0].device.type == "cuda" and _enabled:
        _log_once(op, reason)
    return reason


def _reason(head_dim: int | None, tensors: tuple[Tensor, ...]) -> str | None:
    if not HAS_TRITON:
        return "triton is not installed"
    if not _enabled:
        return "Triton is switched off here"
    if head_dim is not None and not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        return f"head dim {head_dim} is outside {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    for x in tensors:
        if x.device.type != "cuda" and not (_interpreted and x.device.type == "cpu"):
            return f"tensors on {x.device.type} are computed by PyTorch"
        if x.dtype not in TRITON_DTYPES:
            return f"{x.dtype} is computed by PyTorch"
        if x.device.type == "cpu" and x.dtype is torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 matrices wrongly (3.6 to 3.9)"
        if x.stride(-1) != 1 and x.shape[-1] != 1:
            return "the last dimension is not contiguous"
    return None


@functools.cache
def _log_once(op: str, reason: str) -> None:
    logger.warning("%s runs in PyTorch, not in Triton: %s.", op, reason)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side; 1 in the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes on the chip that one program may take; no limit in the interpreter."""
    if device.type != "cuda":
        return 1 << 30
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 1 << 16)
