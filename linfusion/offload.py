"""accelerate's per-layer offload keeps a model's values elsewhere: what must be lifted to add or write some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def without_sequential_offload(owner: Any, models: Sequence[nn.Module], needed: bool) -> Iterator[None]:
    """Lift the offload of a pipeline for the length of the block, where its models are offloaded and it is `needed`.

    Raises:
        ValueError: `owner` is no pipeline, so that nothing here knows how to offload it again.
    """
    offloaded = any(p.device.type == "meta" for m in models for p in m.parameters())
    if not (needed and offloaded):
        yield
        return
    if not hasattr(owner, "enable_sequential_cpu_offload"):
        raise ValueError(
            "The model is offloaded layer by layer, so parameters cannot be added or put back: "
            "do this to the pipeline, or before the model is offloaded."
        )
    owner.remove_all_hooks()
    try:
        yield
    finally:
        owner.enable_sequential_cpu_offload(device=getattr(owner, "_offload_device", None))
