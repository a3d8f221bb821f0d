"""What is trained: the mechanism alone, with the host's q, k, v and out, or with low-rank additions to those."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..adapter import Adapter

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
LORA = "distilled"


def projections(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of the replaced layers' q, k, v and out projections of the picture, as far as the host has them apart."""
    modules = dict(model.named_modules())
    names = [f"{layer}.{p}" for layer in layers for p in PROJECTIONS]
    return [n for n in names if isinstance(modules.get(n), nn.Linear)]


def frozen_copy(model: nn.Module, trained: Iterable[str], share: bool) -> nn.Module:
    """The teacher: the model's modules again, on the very same parameters but for those that will be `trained`.

    So a teacher costs no memory where the host is not trained. Without `share` it is a plain copy (sharded training
    takes the student's parameters apart).
    """
    prefixes = tuple(f"{name}." for name in trained)
    memo = {}
    if share:
        kept = [(n, p) for n, p in (*model.named_parameters(), *model.named_buffers()) if not n.startswith(prefixes)]
        memo = {id(p): p for _, p in (kept if prefixes else (*model.named_parameters(), *model.named_buffers()))}
    return copy.deepcopy(model, memo).requires_grad_(False).eval()


def add_lora(model: nn.Module, targets: list[str], rank: int, alpha: float | None) -> None:
    """Low-rank additions, at zero, on `targets`; ImportError without peft."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError("trainable mechanism+lora needs peft: pip install linfusion[train]") from None
    lora = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=targets)  # type: ignore[arg-type]
    inject_adapter_in_model(lora, model, LORA)


@torch.no_grad()
def load_lora(model: nn.Module, adapter: Adapter) -> None:
    """Continue an adapter's low-rank additions; ValueError where they do not fit."""
    for name, factors in adapter.low_rank.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        if LORA not in getattr(module, "lora_A", {}):
            raise ValueError(f"{adapter.source} has low-rank additions to {name}, which are not trained here.")
        down, up, scale = module.lora_A[LORA].weight, module.lora_B[LORA].weight, module.scaling[LORA]  # type: ignore
        if down.shape != factors.down.shape:
            raise ValueError(f"{adapter.source} is of rank {len(factors.down)}, this run of rank {len(down)}.")
        down.copy_(factors.down)
        up.copy_(factors.up / scale)


def choose(model: nn.Module, layers: list[str], trainable: str, targets: list[str]) -> dict[str, nn.Parameter]:
    """Freeze all but what is trained, which is made fp32; by name, the mechanism's first.

    Raises:
        ValueError: there is nothing to train.
    """
    model.requires_grad_(False)
    inside = [f"{layer}.linfusion." for layer in layers]
    if trainable == "mechanism+qkvo":
        inside += [f"{t}." for t in targets]
    if trainable == "mechanism+lora":
        inside += [f"{t}.lora_{part}." for t in targets for part in "AB"]
    chosen = {n: p for n, p in model.named_parameters() if n.startswith(tuple(inside))}
    if not chosen:
        config = type(model.get_submodule(layers[0]).linfusion.config).__name__  # type: ignore[union-attr]
        raise ValueError(
            f"{config} has no parameters of its own in these layers: train mechanism+lora or mechanism+qkvo."
            if trainable == "mechanism" else f"Nothing to train: these layers have no {', '.join(PROJECTIONS)}."
        )  # fmt: skip
    for p in chosen.values():
        p.data = p.data.float()
        p.requires_grad_(True)
    return dict(sorted(chosen.items(), key=lambda item: ".linfusion." not in item[0]))


def is_own(name: str) -> bool:
    """Whether a parameter is the mechanism's rather than the host's."""
    return ".linfusion." in name


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
