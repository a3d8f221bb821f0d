"""What an op's file must tell the runner: its cases, its inputs, this package's kernel, the formula, the others."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from .table import Shape

if TYPE_CHECKING:
    from .runner import Session

DIRECTIONS = ("forward", "backward")

Call = Callable[..., "Tensor | tuple[Tensor, ...]"]
"""Takes an op's inputs by name."""


class Missing(Exception):
    """A provider that is not installed here; the message says what would help."""


@dataclass(frozen=True)
class Case:
    """One shape of one op.

    Attributes:
        directions: which are timed.
        small: whether launches cost as much as the work: then also timed as a CUDA graph and call after call.
        skip: providers that are left out here.
    """

    op: str
    shape: Shape
    dtype: torch.dtype = torch.bfloat16
    directions: tuple[str, ...] = DIRECTIONS
    small: bool = False
    skip: tuple[str, ...] = ()


def _same(name: str, x: Tensor) -> Tensor:
    return x


class Provider(NamedTuple):
    """Somebody's way to compute an op, in the memory layout that suits it best.

    Attributes:
        call: takes the inputs by name.
        prepare: `(name, tensor)` from this package's layout to the call's, for inputs, outputs and their gradients.
        restore: the way back.
        other: whether it computes something else for the same end; then its error says nothing, and inputs that it
            does not use have no gradients.
    """

    call: Call
    prepare: Callable[[str, Tensor], Tensor] = _same
    restore: Callable[[str, Tensor], Tensor] = _same
    other: bool = False


class View(NamedTuple):
    """A part of the outputs that depends on a part of the inputs alone: what float64 can check at full size.

    Attributes:
        name: for people.
        take: `(name, tensor)` to the part, of an input, an output or the gradient of one.
        shared: inputs whose gradients sum over more than the part, and cannot be checked by it.
    """

    name: str
    take: Callable[[str, Tensor], Tensor]
    shared: frozenset[str] = frozenset()


WHOLE = View("", _same)


class Bench(ABC):
    """Something to measure: a name and cases."""

    name: ClassVar[str]
    cases: ClassVar[tuple[Case, ...]]

    @abstractmethod
    def run(self, cases: list[Case], session: Session) -> None:
        """Check and time these cases."""


class Op(Bench):
    """One op; a later one is one more such class and its name in `ops.py`."""

    def run(self, cases: list[Case], session: Session) -> None:
        from .runner import measure

        for case in cases:
            measure(self, case, session)

    def outputs(self, shape: Shape) -> tuple[str, ...]:
        """Names of what a call returns."""
        return ("out",)

    @abstractmethod
    def passes(self, shape: Shape, direction: str) -> int:
        """How often `[B, S, H, D]` must be read or written at least: times its bytes, the floor of the bandwidth."""

    @abstractmethod
    def inputs(self, case: Case, device: torch.device) -> dict[str, Tensor]:
        """New random inputs by name; those that require gradients are differentiated."""

    def upstream(self, case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """New random gradients of the outputs by name."""
        return {"out": torch.randn_like(inputs["v"], requires_grad=False)}

    @abstractmethod
    def ours(self, case: Case) -> Provider:
        """This package's kernel."""

    @abstractmethod
    def oracle(self, case: Case) -> Call:
        """`kernels/reference.py`, in this package's layout, called in float64."""

    @abstractmethod
    def formula(self, case: Case) -> Provider:
        """The same maths in PyTorch: its error in the dtype of the case is what ours is held to."""

    @abstractmethod
    def peers(self, case: Case) -> dict[str, Callable[[], list[Provider]]]:
        """Others by name; of several ways the fastest counts. Made when needed: `Missing` where not installed."""

    @abstractmethod
    def views(self, case: Case) -> list[View]:
        """Parts to check at full size, the last of the memory among them (indices beyond 32 bits)."""

    @abstractmethod
    def cut(self, case: Case, tokens: int) -> Case:
        """The same with about so many tokens and few heads, small enough for float64 as a whole."""

    def floor_bytes(self, shape: Shape, direction: str, dtype: torch.dtype) -> int:
        """The least that must move through memory."""
        return self.passes(shape, direction) * shape.elements * dtype.itemsize


def shrunk(case: Case, tokens: int, heads: int = 2, **settings: object) -> Case:
    """The case with another length, at most so many heads, and other values of the settings named."""
    changed = tuple((key, settings.get(key, value)) for key, value in case.shape.settings)
    shape = case.shape._replace(tokens=tokens, heads=min(heads, case.shape.heads), settings=changed)
    return replace(case, shape=shape)


def small_grid(tokens: int) -> tuple[int, int]:
    """Not square, so that rows and columns cannot be mistaken for each other."""
    rows = max(2, math.isqrt(tokens))
    return rows, rows + 3


def head_views(shape: Shape, shared: frozenset[str] = frozenset()) -> list[View]:
    """The first head of the first sample and the last of the last; weights per channel are cut along."""

    def view(sample: int, head: int) -> View:
        def take(name: str, x: Tensor) -> Tensor:
            if x.ndim == 4:
                return x[sample : sample + 1, :, head : head + 1]
            every = x.shape[0] == shape.heads * shape.dim and shape.heads > 1
            return x[head * shape.dim : (head + 1) * shape.dim] if every else x

        return View(f"head {head} of sample {sample}", take, shared)

    return [view(*place) for place in dict.fromkeys([(0, 0), (shape.batch - 1, shape.heads - 1)])]
