"""A student ready to train: mechanism applied, teacher set aside, parameters chosen, an earlier stage continued."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from ..adapter import Adapter, read_adapter, swap_host
from ..apply import apply, record_of, restore
from ..mechanisms import MechanismConfig, config_from_dict
from .config import TrainConfig
from .data.store import Store
from .probe import denoiser
from .stages import STAGES, Stage
from .stages.base import Inputs
from .trainable import add_lora, choose, frozen_copy, load_lora, projections

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build(
    pipe: Any, config: TrainConfig, store: Store, accelerator: Accelerator
) -> tuple[Stage, dict[str, nn.Parameter], list[str]]:
    """The stage with its student and teacher, what is trained by name, and the trained projections."""
    _, student = denoiser(pipe)
    dtype = DTYPES[accelerator.mixed_precision]
    student.requires_grad_(False).eval().to(accelerator.device)
    if any(p.dtype != dtype for p in student.parameters()):
        student.to(dtype)
    adapter = read_adapter(config.init_adapter) if config.init_adapter else None
    mechanism = _mechanism(config, adapter)
    apply(student, mechanism, layers=config.layers or None)
    layers = _layers(student)
    targets = projections(student, layers) if config.trainable != "mechanism" else []
    restore(student)
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    in_place = targets if config.trainable == "mechanism+qkvo" else []
    teacher = frozen_copy(student, in_place, share=not sharded).to(accelerator.device)
    apply(student, mechanism, layers=config.layers or None)
    if adapter is not None:
        _continue(student, adapter, config)
    if config.trainable == "mechanism+lora":
        add_lora(student, targets, config.rank, config.lora_alpha)
        if adapter is not None:
            load_lora(student, adapter)
    trained = choose(student, layers, config.trainable, targets)
    if config.gradient_checkpointing:
        student.enable_gradient_checkpointing()  # type: ignore[operator]
    inputs = Inputs(store, config, accelerator.device, dtype)
    return STAGES[config.stage](student, teacher, layers, inputs, config), trained, targets


def _layers(student: nn.Module) -> list[str]:
    record = record_of(student)
    assert record is not None
    return list(record.entries)


def asked_for(mechanism: dict[str, Any]) -> dict[str, MechanismConfig]:
    """Mechanisms by pattern of layers, from a setting that names one for all of them or one for each pattern."""
    by_pattern = mechanism if all(isinstance(value, dict) for value in mechanism.values()) else {"*": mechanism}
    return {pattern: config_from_dict(settings) for pattern, settings in by_pattern.items()}


def _mechanism(config: TrainConfig, adapter: Adapter | None) -> dict[str, MechanismConfig]:
    """What to apply, by pattern or name; an adapter to start from must be of the same, and may stand for it."""
    asked = asked_for(config.mechanism)
    if adapter is None:
        if not asked:
            raise ValueError("Which mechanism? Add --mechanism NAME, or --init_adapter.")
        return asked
    for name, found in adapter.layers.items() if asked else ():
        wanted = next((c for pattern, c in asked.items() if fnmatchcase(name, pattern)), None)
        if found != wanted:
            raise ValueError(f"{adapter.source} is of {found}, {wanted} was asked for.")
    return adapter.layers


@torch.no_grad()
def _continue(student: nn.Module, adapter: Adapter, config: TrainConfig) -> None:
    """An earlier stage's values; low-rank additions come later, where they are trained on."""
    record = record_of(student)
    assert record is not None
    adapter.check(student, {name: e.mechanism for name, e in record.entries.items()})
    for name, entry in record.entries.items():
        entry.mechanism.load_state_dict(adapter.of_layer(name))
    if config.trainable == "mechanism+qkvo":
        swap_host(student, adapter.host_values(student))
    elif adapter.host or (adapter.low_rank and config.trainable == "mechanism"):
        raise ValueError(
            f"{adapter.source} changes the host's projections, which trainable {config.trainable!r} would leave out."
        )
