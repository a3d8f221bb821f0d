"""Differences between what the student does and what it should do; all in fp32, means over samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def parts(output: Any) -> list[Tensor]:
    """A layer's outputs: one tensor, or picture and text."""
    return [output] if isinstance(output, Tensor) else [o for o in output if isinstance(o, Tensor)]


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean over everything."""
    return (a.float() - b.float()).square().mean()


def layer_loss(student: Any, teacher: Any, relative: bool) -> Tensor:
    """Mean square difference of a layer's outputs `[B, S, C]`; `relative` to the teacher's mean square of each sample.

    By sample rather than by batch, so that the mean over processes is the mean over their samples.
    """
    error, size, count = torch.zeros(()), torch.zeros(()), 0
    for a, b in zip(parts(student), parts(teacher), strict=True):
        a, b = a.float().flatten(1), b.detach().float().flatten(1)
        error = (a - b).square().sum(1) + (error if count else 0)
        size = b.square().sum(1) + (size if count else 0)
        count += a.shape[1]
    return (error / (size + 1e-8 * count) if relative else error / count).mean()


def split_variance(answer: Tensor, learned: bool) -> tuple[Tensor, Tensor | None]:
    """A model's answer `[B, C or 2 C, ...]` as prediction and variance."""
    if not learned:
        return answer, None
    prediction, variance = answer.chunk(2, dim=1)
    return prediction, variance


def finite(output: Any) -> Tensor:
    """Whether a layer's outputs are all finite, a bool on their device. In training half the cost of any loss."""
    return torch.stack([o.detach().sum(dtype=torch.float32).isfinite() for o in parts(output)]).all()
