"""Where an op runs: the one answer to "can this run in Triton here", and why not."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from .crossovers import crossover

logger = logging.getLogger(__name__)

HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256

BACKENDS = ("auto", "triton", "torch")

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
def use_backend(backend: str) -> Iterator[None]:
    """What ops run in; `LINFUSION_BACKEND` says it for a whole process. None of these changes the maths.

    Args:
        backend: "auto": Triton where it can run, unless this GPU was measured to be faster with PyTorch at the size;
            "triton": wherever it can run; "torch": nowhere.

    Raises:
        ValueError: another backend.
    """
    global _enabled
    before, _enabled = _enabled, _checked(backend)
    try:
        yield
    finally:
        _enabled = before


def _checked(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}. Available: {', '.join(BACKENDS)}.")
    return "" if backend == "torch" else backend


def without_triton() -> AbstractContextManager[None]:
    """Every op takes its PyTorch path: to compare, and to look for the cause of a difference."""
    return use_backend("torch")


def why_not_triton(op: str, head_dim: int | None, *tensors: Tensor, lacking: str | None = None) -> str | None:
    """Why `op` does not run in Triton on these tensors; None where it does. What cannot is logged, once for a reason.

    `head_dim` is None where channels are not grouped; `lacking` is what the op itself knows to stand in the way. The
    size that counts is that of the first tensor.
    """
    reason = _reason(head_dim, tensors) or lacking
    if reason is not None:
        if (tensors[0].device.type == "cuda" or _interpreted) and _enabled:
            _log_once(op, reason)
        return reason
    first = tensors[0]
    # a compiled graph is for all sizes, and its PyTorch would be the compiler's
    if _enabled != "auto" or torch.compiler.is_compiling():
        return None
    return slower(op, head_dim, first.dtype, first.device, first.numel())


def slower(op: str, head_dim: int | None, dtype: torch.dtype, device: torch.device, elements: int) -> str | None:
    """Why Triton is not worth it at this size, as measured on this GPU; None where it is, or nobody has measured."""
    found = crossover(op, head_dim, dtype, device)
    if found is None or (found.triton_from is not None and elements >= found.triton_from):
        return None
    beyond = "at all sizes" if found.triton_from is None else f"below {found.triton_from} elements"
    return f"PyTorch was measured to be faster {beyond} on this GPU"


def explain(op: str, head_dim: int | None, dtype: torch.dtype, device: torch.device, elements: int) -> str | None:
    """As `why_not_triton` for tensors that are not there, and without a log."""
    reason = _reason(head_dim, (torch.empty((1, head_dim or 1), dtype=dtype, device=device),))
    return reason or (slower(op, head_dim, dtype, device, elements) if _enabled == "auto" else None)


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


# "" where all is PyTorch's
_enabled = _checked(os.environ.get("LINFUSION_BACKEND", "auto"))


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
