"""Gradients without an operator: torch's custom operators cost the host more time than a small kernel takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def differentiable(
    forward: Callable[..., Any], setup: Callable[[Any, tuple, Any], None], backward: Callable[..., tuple]
) -> Callable[..., Any]:
    """`forward` with gradients; `setup` and `backward` as `register_autograd` of a custom operator takes them.

    Not for torch.compile, which traces operators only.
    """

    once = once_differentiable(backward)

    class Differentiable(torch.autograd.Function):
        # one method rather than `setup_context`, for which torch inspects the signature at every call
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple:
            # a graph of gradients is refused when it is used; without one there is nothing to refuse
            return (once if torch.is_grad_enabled() else backward)(ctx, *grads)

    return Differentiable.apply
