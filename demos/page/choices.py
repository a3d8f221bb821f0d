"""The mechanisms as the page offers them: what each is in a sentence, and the one or two settings that matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import linfusion as lf
from linfusion.mechanisms import MechanismConfig

ORIGINAL = "original"


@dataclass(frozen=True)
class Control:
    """A slider: a setting's name, its words, its range and where it stands at first."""

    name: str
    label: str
    info: str
    low: float
    high: float
    step: float
    value: float

    def check(self, value: Any) -> float | int:
        """`value` as the mechanism takes it.

        Raises:
            ValueError: no number, or out of the range that the page offers.
        """
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            raise ValueError(f"{self.label} must be between {self.low:g} and {self.high:g}, got {value!r}.")
        return int(value) if isinstance(self.step, int) else float(value)


RADIUS = Control("radius", "Radius", "how far a patch looks, in patches", 2, 64, 1, 8)
TOPK = Control("topk", "Share of blocks", "how much of the picture a patch sees exactly", 0.05, 1.0, 0.05, 0.3)
BLOCK = Control("block", "Block", "patches that are chosen together", 16, 128, 16, 16)
AGENTS = Control("agents", "Agents", "how many tokens stand for all", 4, 256, 1, 49)
MERGE = Control("merge", "Share merged", "patches that are merged away", 0.0, 0.8, 0.05, 0.4)
CONTROLS = {c.name: c for c in (RADIUS, TOPK, BLOCK, AGENTS, MERGE)}


@dataclass(frozen=True)
class Choice:
    """A mechanism on the page; `make` builds its config from the checked values of its controls."""

    label: str
    about: str
    controls: tuple[Control, ...]
    make: Callable[..., MechanismConfig | None]


CHOICES = {
    ORIGINAL: Choice("Original", "Every patch attends to every other: the model as it was made.", (), lambda: None),
    "clear": Choice("CLEAR", "Each patch attends to a disc of neighbours and to all text.", (RADIUS,), lf.CLEAR),
    "sla": Choice(
        "SLA", "Each block of patches attends to the blocks that matter most to it, and to all text.", (TOPK, BLOCK),
        lambda topk, block: lf.SLA(topk, block_q=block, block_k=block),
    ),
    "agent-sd": Choice(
        "AgentSD", "Patches that are alike are merged; early steps go through a few agents.", (MERGE,), lf.AgentSD,
    ),
    "linfusion": Choice(
        "LinFusion", "Linear attention over everything. Not trained here: pictures fall apart.", (), lf.LinFusion,
    ),
    "lit": Choice(
        "LiT", "Linear attention and a convolution. Not trained here: pictures fall apart.", (), lf.LiT,
    ),
    "agent": Choice(
        "Agent", "Everything goes through a few agents. Not trained here: pictures fall apart.", (AGENTS,), lf.Agent,
    ),
}  # fmt: skip


def choices_for(pipe: Any) -> dict[str, Choice]:
    """What this pipeline can do, the original first; each was tried by applying it."""
    possible = {}
    for name, choice in CHOICES.items():
        config = mechanism(name, {c.name: c.value for c in choice.controls})
        if config is not None:
            try:
                lf.apply(pipe, config)
            except (ValueError, NotImplementedError):
                continue
            lf.restore(pipe)
        possible[name] = choice
    return possible


def mechanism(name: Any, values: Mapping[str, Any]) -> MechanismConfig | None:
    """The config that a visitor chose; None for the model's own attention.

    Args:
        name: a key of `CHOICES`.
        values: of at least the controls that this mechanism has; others are left aside.

    Raises:
        ValueError: there is no such mechanism, or a value is out of range.
    """
    if not isinstance(name, str) or name not in CHOICES:
        raise ValueError(f"There is no mechanism {name!r}; there are {', '.join(CHOICES)}.")
    choice = CHOICES[name]
    return choice.make(**{c.name: c.check(values.get(c.name)) for c in choice.controls})


def chosen(config: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """The way back, from `MechanismConfig.to_dict()`: the choice and the values of its controls.

    Raises:
        ValueError: the page cannot set that mechanism so.
    """
    if config is None:
        return ORIGINAL, {}
    name = config.get("name")
    values = {c: config.get({"block": "block_q"}.get(c, c)) for c in CONTROLS}
    again = mechanism(name, values)
    if again is None or again.to_dict() != dict(config):
        raise ValueError(f"This page has no controls for {lf.mechanisms()[name]}: {dict(config)}.")
    return str(name), {c.name: values[c.name] for c in CHOICES[str(name)].controls}
