"""One paper a file. To add one: its file, and its config in the list below."""

from __future__ import annotations

import dataclasses
from typing import Any

from .agent import Agent
from .agent_sd import AgentSD
from .base import Mechanism, MechanismConfig
from .clear import CLEAR
from .linfusion import LinFusion
from .lit import LiT
from .softmax import Softmax

MECHANISMS: dict[str, type[MechanismConfig]] = {c.name: c for c in (Softmax, LinFusion, CLEAR, LiT, Agent, AgentSD)}


def mechanisms() -> dict[str, type[MechanismConfig]]:
    """Every mechanism's config class by its name."""
    return dict(MECHANISMS)


def config_from_dict(settings: dict[str, Any]) -> MechanismConfig:
    """The config that `MechanismConfig.to_dict` wrote; ValueError for an unknown name or setting."""
    settings = dict(settings)
    name = settings.pop("name", None)
    if name not in MECHANISMS:
        raise ValueError(f"Unknown mechanism {name!r}. Available: {', '.join(MECHANISMS)}.")
    fields = dataclasses.fields(MECHANISMS[name])
    known = {f.name for f in fields}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"{name} has no setting {', '.join(unknown)}. Settings: {', '.join(sorted(known)) or 'none'}.")
    if missing := [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in settings]:
        raise ValueError(f"{name} needs {', '.join(missing)}.")
    return MECHANISMS[name](**settings)


__all__ = [
    "CLEAR",
    "Agent",
    "AgentSD",
    "LiT",
    "LinFusion",
    "Mechanism",
    "MechanismConfig",
    "Softmax",
    "config_from_dict",
    "mechanisms",
]
