"""Tensors as Hopper's copy engine (TMA) wants them: it fetches whole tiles without registers or address arithmetic."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from .backend import HAS_TRITON

TensorDescriptor: Any = None
if HAS_TRITON:
    with contextlib.suppress(ImportError):  # before 3.4
        from triton.tools import tensor_descriptor

        TensorDescriptor = tensor_descriptor.TensorDescriptor


def readable(*tensors: Tensor) -> bool:
    """Whether the engine can read these: 16 bits an element, channels side by side, all else aligned to 16 bytes."""
    return TensorDescriptor is not None and all(
        x.element_size() == 2 and x.stride(-1) == 1 and x.data_ptr() % 16 == 0
        and all(n % 8 == 0 for n in x.stride()[:-1]) and has_engine(x.device)
        for x in tensors
    )  # fmt: skip


def tiles(x: Tensor, shape: list[int]) -> Any:
    """Tiles of `shape` of x, zeros past its end."""
    return TensorDescriptor(x, x.shape, x.stride(), shape)


@functools.cache
def has_engine(device: torch.device) -> bool:
    """Whether there is one; the interpreter has what stands for it."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
