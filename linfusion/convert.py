"""Weights that a mechanism's authors published, as an adapter of this package."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .adapter import write_adapter
from .families import families
from .mechanisms import MechanismConfig


def convert(source: str | Path, folder: str | Path, mechanism: MechanismConfig, model: str) -> dict[str, int]:
    """Write published weights as an adapter for `load`: the mechanism's parameters and those of its host.

    Args:
        source: a file, safetensors or a state dict of `torch.save`, of which only tensors are read, never code.
        folder: made if it does not exist; its parent must.
        mechanism: with the settings that the weights were trained with; files do not tell them.
        model: class name in diffusers of the model that they are for.

    Returns:
        How many "layers" and how many "host" parameters were found.

    Raises:
        ValueError: no such file or model, a damaged file, or one without the mechanism's parameters.
    """
    if model not in families():
        raise ValueError(f"{model} is not supported. Supported: {', '.join(families())}.")
    rename = families()[model].original or (lambda name, value: (name, value))
    if not mechanism.published:
        raise ValueError(f"No published weights of {mechanism.name} are known.")
    tensors: dict[str, Tensor] = {}
    layers, hosts, nothing = set(), 0, torch.empty(0)
    for name, value in _read(Path(source)).items():
        end = next((e for e in mechanism.published if name.endswith("." + e)), None)
        if end is None:
            host, value = rename(name, value)
            tensors[f"host.{host}"], hosts = value.contiguous(), hosts + 1
        else:
            layer, _ = rename(name.removesuffix("." + end), nothing)
            tensors[f"mechanism.{layer}.{mechanism.published[end]}"] = value.contiguous()
            layers.add(layer)
    if not layers:
        raise ValueError(f"{source} has no parameter that ends in {' or '.join(mechanism.published)}.")
    write_adapter(folder, model, {layer: mechanism for layer in sorted(layers)}, tensors)
    return {"layers": len(layers), "host": hosts}


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file.")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ValueError(f"{file} is no file of tensors, or damaged: {str(error).splitlines()[0]}") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    tensors = {name: x for name, x in found.items() if isinstance(x, Tensor)}
    if not tensors:
        raise ValueError(f"{file} holds no state dict.")
    return tensors
