"""Adapters on disk: a folder with `config.json` and `model.safetensors`, never pickle.

Tensors are named `mechanism.<layer>.<parameter>` for the mechanism's own, `host.<parameter>` for projections of the
host that were trained with it, and `low_rank.<parameter>.down`, `.up` for what was added to such a projection `W`:
`W + up @ down`. Loading keeps the host's originals, and `restore` puts them back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .families.base import class_names
from .mechanisms import Mechanism, MechanismConfig, config_from_dict
from .version import __version__

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Factors(NamedTuple):
    """An addition of low rank to a matrix `[out, in]`: `down` `[r, in]`, then `up` `[out, r]`."""

    down: Tensor
    up: Tensor

    def added_to(self, base: Tensor) -> Tensor:
        """The sum, made in fp32 at least."""
        wide = torch.promote_types(base.dtype, torch.float32)
        up, down = (x.to(base.device, wide) for x in (self.up, self.down))
        return (base.to(wide) + up @ down).to(base.dtype)


@dataclass(frozen=True)
class Adapter:
    """A saved mechanism: which layers, which settings, which tensors."""

    source: str
    model: str
    layers: dict[str, MechanismConfig]
    tensors: dict[str, Tensor]

    @property
    def host(self) -> dict[str, Tensor]:
        """The host parameters by their names in the model."""
        return {k.removeprefix("host."): t for k, t in self.tensors.items() if k.startswith("host.")}

    @property
    def low_rank(self) -> dict[str, Factors]:
        """Additions to host parameters by their names: `down` `[r, in]` and `up` `[out, r]`."""
        prefix, found = "low_rank.", {}
        for key, up in self.tensors.items():
            if key.startswith(prefix) and key.endswith(".up"):
                name = key.removeprefix(prefix).removesuffix(".up")
                if (down := self.tensors.get(f"{prefix}{name}.down")) is not None:
                    found[name] = Factors(down, up)
        return found

    def host_values(self, model: nn.Module) -> dict[str, Tensor]:
        """What the host's parameters are to be: whole ones as they stand here, or the model's plus what was added."""
        values = self.host
        for name, factors in self.low_rank.items():
            base = values.get(name, host_parameter(model, name))
            if base is None:
                raise ValueError(f"{self.source}: the {type(model).__name__} has no parameter {name!r}.")
            values[name] = factors.added_to(base)
        return values

    def of_layer(self, layer: str) -> dict[str, Tensor]:
        """The state dict of one layer's mechanism."""
        prefix = f"mechanism.{layer}."
        return {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}

    def check(self, model: nn.Module, mechanisms: Mapping[str, Mechanism]) -> None:
        """ValueError unless every tensor has its place in `model` and every place its tensor."""
        if self.model not in class_names(model):
            raise ValueError(f"{self.source} was saved for a {self.model}, not for a {type(model).__name__}.")
        expected = {
            f"mechanism.{layer}.{name}": tuple(p.shape)
            for layer, mechanism in mechanisms.items()
            for name, p in mechanism.state_dict().items()
        }
        for name in self.host:
            parameter = host_parameter(model, name)
            if parameter is None:
                raise ValueError(f"{self.source}: the {type(model).__name__} has no parameter {name!r}.")
            expected[f"host.{name}"] = tuple(parameter.shape)
        for name, factors in self.low_rank.items():
            parameter = host_parameter(model, name)
            if parameter is None or parameter.ndim != 2:
                raise ValueError(f"{self.source}: the {type(model).__name__} has no matrix {name!r}.")
            rank, (rows, columns) = factors.up.shape[-1], parameter.shape
            expected |= {f"low_rank.{name}.up": (rows, rank), f"low_rank.{name}.down": (rank, columns)}
        missing, extra = sorted(set(expected) - set(self.tensors)), sorted(set(self.tensors) - set(expected))
        if missing or extra:
            raise ValueError(
                f"{self.source} does not fit these layers: {len(missing)} tensors missing{_first(missing)}, "
                f"{len(extra)} left over{_first(extra)}."
            )
        for key, shape in expected.items():
            if tuple(self.tensors[key].shape) != shape:
                raise ValueError(f"{self.source}: {key} is {tuple(self.tensors[key].shape)}, the model has {shape}.")


def _first(keys: list[str]) -> str:
    return f" (first: {keys[0]})" if keys else ""


def read_adapter(source: str | Path) -> Adapter:
    """The adapter in a folder or on the Hub; ValueError with one clear line when there is none."""
    folder = _folder(source)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise ValueError(f"{source} is not an adapter folder: it lacks {CONFIG} or {WEIGHTS}.")
    try:
        config = json.loads((folder / CONFIG).read_text())
        model, layers = config["model"], {k: config_from_dict(v) for k, v in config["layers"].items()}
    except ValueError as error:  # no JSON, or a mechanism's own words
        raise ValueError(f"{folder / CONFIG} is not an adapter's config: {error}") from None
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} is not an adapter's config: {type(error).__name__} {error}.") from None
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or incomplete: {error}.") from None
    return Adapter(str(source), model, layers, tensors)


def write_adapter(
    folder: str | Path, model: str, layers: Mapping[str, MechanismConfig], tensors: dict[str, Tensor]
) -> None:
    """Write what `read_adapter` reads; ValueError where there is no such place, OSError where the disk is full."""
    config = {
        "linfusion_version": __version__,
        "model": model,
        "layers": {layer: mechanism.to_dict() for layer, mechanism in layers.items()},
    }
    folder = Path(folder)
    try:
        folder.mkdir(exist_ok=True)
    except (FileNotFoundError, FileExistsError, NotADirectoryError):
        raise ValueError(f"Cannot save to {folder}: it must be a folder, or new in a folder that exists.") from None
    # a temporary name first: a killed save leaves no half file under the real one
    try:
        save_file(tensors, folder / f"{WEIGHTS}.tmp", metadata={"format": "pt"})
        (folder / f"{CONFIG}.tmp").write_text(json.dumps(config, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        for name in (WEIGHTS, CONFIG):
            (folder / f"{name}.tmp").unlink(missing_ok=True)
        raise OSError(f"{folder} could not be written ({error}); nothing there was changed.") from None
    os.replace(folder / f"{WEIGHTS}.tmp", folder / WEIGHTS)
    os.replace(folder / f"{CONFIG}.tmp", folder / CONFIG)


def _folder(source: str | Path) -> Path:
    if Path(source).exists():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the Hub client raises many kinds, all meaning: not to be had
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{source} is no folder here, and the Hub does not give it: {reason}") from None


def host_names(model: nn.Module) -> list[str]:
    """The host's own parameters, by the names that they have without PEFT, which adds some beside its `base_layer`."""
    wrapped = {name for name, module in model.named_modules() if hasattr(module, "base_layer")}
    names = []
    for name, _ in model.named_parameters():
        parts = name.split(".")
        below = [parts[i] for i in range(1, len(parts)) if ".".join(parts[:i]) in wrapped]
        if "linfusion" not in parts and all(child == "base_layer" for child in below):
            names.append(".".join(p for p in parts if p != "base_layer"))
    return names


def host_parameter(model: nn.Module, name: str) -> Tensor | None:
    """A host's parameter by the name that it has without PEFT, which moves it into `base_layer`."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    module = getattr(module, "base_layer", module)
    return module._parameters.get(leaf)


@torch.no_grad()
def swap_host(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write host parameters; returns what stood there."""
    places = {}
    for name in values:
        parameter = host_parameter(model, name)
        if parameter is None:
            raise ValueError(f"The {type(model).__name__} has no parameter {name!r} any more.")
        places[name] = parameter
        if parameter.device.type == "meta":
            raise NotImplementedError(f"{name} is offloaded layer by layer; load weights before enabling that.")
    before = {}
    for name, parameter in places.items():
        before[name] = parameter.detach().clone()
        parameter.copy_(values[name])
    return before
