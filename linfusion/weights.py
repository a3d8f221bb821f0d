"""Save what was applied, and apply what was saved."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapter import Factors, host_names, host_parameter, read_adapter, write_adapter
from .apply import apply_adapter, denoisers, record_of
from .families import family_of
from .families.base import class_names


def save(
    pipe_or_model: Any,
    folder: str | Path,
    *,
    host: Sequence[str] | None = None,
    lora: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write what `apply` put in, to be read by `load`.

    Args:
        pipe_or_model: with one changed model.
        folder: made if it does not exist; its parent must.
        host: patterns of host parameters that were trained with the mechanism; default those that came with loaded
            weights.
        lora: name of a PEFT adapter on the host that was trained with the mechanism; its factors are written, and
            loading adds their product to the host's matrices, so that PEFT is not needed then.
        dtype: of the numbers on disk; default as they are.

    Raises:
        ValueError: nothing is applied, more than one model is changed, a pattern matches nothing, no layer has that
            PEFT adapter, or there is no such place.
        NotImplementedError: the model is offloaded layer by layer.
        OSError: the disk is full.
    """
    changed = [(m, r) for m in denoisers(pipe_or_model) if (r := record_of(m)) is not None]
    if len(changed) != 1:
        raise ValueError(f"save needs exactly one changed model, got {len(changed)}; apply first, or pass the model.")
    model, record = changed[0]
    low_rank = dict(record.low_rank) if lora is None else _lora_factors(model, lora)
    if host is None:
        names = [] if lora is not None else [n for n in record.originals if n not in low_rank]
    else:
        known = host_names(model)
        for pattern in host:
            if not any(fnmatchcase(n, pattern) for n in known):
                raise ValueError(f"host={pattern!r} matches no parameter of the {type(model).__name__}.")
        names = [n for n in known if any(fnmatchcase(n, p) for p in host)]
    tensors = {}
    for name in names:
        value = host_parameter(model, name)
        if value is None:
            raise ValueError(f"The {type(model).__name__} has no parameter {name!r} any more.")
        tensors[f"host.{name}"] = value.detach().contiguous()
    for name, factors in low_rank.items():
        tensors |= {f"low_rank.{name}.{key}": t.detach().contiguous() for key, t in factors._asdict().items()}
    for layer, entry in record.entries.items():
        for name, value in entry.mechanism.state_dict().items():
            tensors[f"mechanism.{layer}.{name}"] = value.contiguous()
    if any(value.device.type == "meta" for value in tensors.values()):
        raise NotImplementedError(
            "The model is offloaded layer by layer, its values are elsewhere: save first, or after remove_all_hooks()."
        )
    if dtype is not None:
        tensors = {key: value.to(dtype) for key, value in tensors.items()}
    layers = {layer: entry.mechanism.config for layer, entry in record.entries.items()}
    write_adapter(folder, family_of(model).model, layers, tensors)


def _lora_factors(model: nn.Module, lora: str) -> dict[str, Factors]:
    """A PEFT adapter's factors by the host parameter that they add to, PEFT's scale in `up`."""
    found = {}
    for name, module in model.named_modules():
        if lora in getattr(module, "lora_A", {}):
            wrapped: Any = module
            if getattr(wrapped, "lora_variant", {}).get(lora) or getattr(wrapped, "lora_bias", {}).get(lora):
                raise NotImplementedError(f"{name}: {lora} is no plain LoRA, whose two factors could be saved.")
            up = wrapped.lora_B[lora].weight * wrapped.scaling[lora]
            found[f"{name}.weight"] = Factors(wrapped.lora_A[lora].weight, up)
    if not found:
        raise ValueError(f"lora={lora!r} is no LoRA on the {type(model).__name__}; add one with PEFT first.")
    return found


def load(pipe_or_model: Any, source: str | Path, *, fuse_prologue: bool = True) -> Any:
    """Apply a saved adapter: rebuilds its mechanism from `config.json`, loads its tensors.

    Args:
        pipe_or_model: of the class that it was saved for.
        source: a folder, or a Hub id.
        fuse_prologue: as in `apply`.

    Returns:
        `pipe_or_model`, changed in place.

    Raises:
        ValueError: no adapter there, a damaged file, or one for another model; nothing was changed.
    """
    adapter = read_adapter(source)
    models = [m for m in denoisers(pipe_or_model) if adapter.model in class_names(m)]
    if not models:
        have = ", ".join(type(m).__name__ for m in denoisers(pipe_or_model))
        raise ValueError(f"{adapter.source} was saved for a {adapter.model}, not for a {have}.")
    known = {name for name, _ in family_of(models[0]).layers(models[0])}
    if unknown := sorted(set(adapter.layers) - known):
        raise ValueError(
            f"{adapter.source} was saved for a {adapter.model} with a layer {unknown[0]!r}, which this one lacks."
        )
    if len(models) > 1:
        raise ValueError(
            f"{adapter.source} was saved for one {adapter.model}, and here are {len(models)}. Load it into one: "
            "linfusion.load(pipe.transformer, ...)."
        )
    target = pipe_or_model if len(denoisers(pipe_or_model)) == 1 else models[0]
    apply_adapter(target, adapter.layers, None, adapter, fuse_prologue)
    return pipe_or_model
