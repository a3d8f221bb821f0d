"""More tokens than a model was trained on: the published rules for attention's temperature and rotary frequencies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from ..apply import denoisers
from ..families import family_of
from .facts import size_multiple, text_reader

CLEAR_NTK = 10.0
"""CLEAR multiplies the rotary base of FLUX by it above 1024 pixels."""


def log_ratio(tokens: int, trained: int) -> float:
    """What the softmax's scale is multiplied by: `sqrt(log tokens / log trained)` (arXiv 2306.08645).

    It keeps the entropy of attention. CLEAR's "proportional attention" is this with `trained = 64^2 + 512 = 4608`.
    """
    if tokens < 2 or trained < 2:
        raise ValueError(f"tokens and trained must be at least 2, got {tokens} and {trained}.")
    return math.sqrt(math.log(tokens) / math.log(trained))


def ntk_base(base: float, ratio: float, axis_dim: int) -> float:
    """The rotary base with which `axis_dim` channels reach `ratio` times the trained length: `base ratio^(d / (d-2))`.

    NTK-aware scaling: the slowest frequency slows down by `ratio`, the fastest stays (arXiv 2309.00071).
    """
    if axis_dim < 4 or axis_dim % 2:
        raise ValueError(f"axis_dim must be even and at least 4, got {axis_dim}.")
    return base * ratio ** (axis_dim / (axis_dim - 2))


def proportional(pipe: Any, shape: tuple[int, int], trained: tuple[int, int]) -> float:
    """`log_ratio` of two picture sizes in pixels, the text's tokens counted where they stand in the same sequence."""
    multiple, (model, *_) = size_multiple(pipe), denoisers(pipe)
    reader = text_reader(pipe)
    text = reader.tokens if reader is not None and family_of(model).joint else 0
    now, then = (h * w // multiple**2 + text for h, w in (shape, trained))
    return log_ratio(now, then)


@contextmanager
def temperature(pipe: Any, factor: float) -> Iterator[None]:
    """Within the block, softmax attention's scores are multiplied by `factor`, in every layer that could be replaced.

    By the norm of queries where the layer has one, else at their projection. Mechanisms with other features of queries
    than softmax's normalise by themselves, and are not what the rule was made for.
    """
    with ExitStack() as stack:
        for model in denoisers(pipe):
            for _, attn in family_of(model).layers(model):
                stack.enter_context(_scaled_queries(attn, factor))
        yield


@contextmanager
def _scaled_queries(attn: Any, factor: float) -> Iterator[None]:
    norms = [n for n in (getattr(attn, name, None) for name in ("norm_q", "norm_added_q")) if n is not None]
    if norms:
        weights = [w for n in norms for w in (getattr(n, "weight", None), getattr(n, "bias", None)) if w is not None]
        if any(getattr(n, "weight", None) is None for n in norms) or any(w.is_meta for w in weights):
            raise NotImplementedError("The queries' norm has no weight in place that could carry a temperature.")
        before: list[Tensor] = [w.data for w in weights]
        for w in weights:
            w.data = w.data * factor
        try:
            yield
        finally:
            for w, data in zip(weights, before, strict=True):
                w.data = data
        return
    hook = attn.to_q.register_forward_hook(lambda module, args, out: out * factor)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def rotary(pipe: Any, base: float = 1.0, positions: float = 1.0) -> Iterator[None]:
    """Within the block, the rotary embeddings' base and all positions are multiplied by these.

    Raises:
        NotImplementedError: a model that does not make its rotation anew from positions at each call, as FLUX does.
    """
    found = [
        module for model in denoisers(pipe) for name, module in model.named_modules()
        if name.endswith("pos_embed") and isinstance(getattr(module, "theta", None), (int, float))
    ]  # fmt: skip
    if not found:
        names = ", ".join(type(model).__name__ for model in denoisers(pipe))
        raise NotImplementedError(
            f"{names} has no rotary embedding made from positions at each call, as FLUX has; leave ntk and positions "
            "at 1."
        )
    before = [module.theta for module in found]
    hooks = [m.register_forward_pre_hook(lambda module, args: (args[0] * positions, *args[1:])) for m in found]
    for module in found:
        module.theta = module.theta * base
    try:
        yield
    finally:
        for module, theta, hook in zip(found, before, hooks, strict=True):
            module.theta = theta
            hook.remove()
