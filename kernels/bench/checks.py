"""Whether ours computes the op: its error against float64, next to that of the plain formula in the same dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .op import WHOLE, Call, Case, Op, Provider, View

CUT = 1000  # tokens of the check as a whole


class Finding(NamedTuple):
    """One compared tensor: relative L2 errors, that of ours and the most that it may be."""

    what: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # false for NaN


class Expected(NamedTuple):
    """Part of the outputs in float64."""

    view: View
    outputs: dict[str, Tensor]


class Bound:
    """A provider with an op's tensors, in the layout that it wants."""

    def __init__(
        self, op: Op, case: Case, provider: Provider, inputs: dict[str, Tensor], upstream: dict[str, Tensor]
    ) -> None:
        self.provider, self.outputs = provider, op.outputs(case.shape)
        self.inputs = {n: provider.prepare(n, x.detach()).requires_grad_(x.requires_grad) for n, x in inputs.items()}
        self.leaves = [n for n, x in inputs.items() if x.requires_grad]
        self.upstream = [provider.prepare(n, upstream[n]) for n in self.outputs]

    def forward(self) -> tuple[Tensor, ...]:
        out = self.provider.call(**self.inputs)
        return out if isinstance(out, tuple) else (out,)

    def backward(self, outputs: tuple[Tensor, ...], again: bool = True) -> tuple[Tensor, ...]:
        """Gradients of the inputs, None of those that a peer ignores; `again` keeps the graph for another time."""
        leaves = [self.inputs[n] for n in self.leaves]
        grads = torch.autograd.grad(
            outputs, leaves, self.upstream, retain_graph=again, allow_unused=self.provider.other
        )
        return tuple(g for g in grads if g is not None)

    def both(self) -> tuple[Tensor, ...]:
        outputs = self.forward()
        return (*outputs, *self.backward(outputs, again=False))

    def ready(self, direction: str) -> Callable[[], tuple[Tensor, ...]]:
        """What is timed."""
        if direction == "forward":
            return torch.no_grad()(self.forward)
        outputs = self.forward()
        return lambda: self.backward(outputs)

    def results(self, gradients: bool) -> dict[str, Tensor]:
        """Outputs by name, gradients as `d_` and the input's name, in this package's layout."""
        with torch.set_grad_enabled(gradients):
            tensors = self.both() if gradients else self.forward()
        names = [*self.outputs, *(f"d_{n}" for n in self.leaves)]
        pairs = zip(names, tensors, strict=False)  # gradients may be missing
        return {n: self.provider.restore(n.removeprefix("d_"), x.detach()) for n, x in pairs}


def check(
    op: Op, case: Case, inputs: dict[str, Tensor], upstream: dict[str, Tensor]
) -> tuple[list[Finding], list[Expected]]:
    """Ours as a whole on a cut of the shape, and in parts at full size; and what was expected of those."""
    small = op.cut(case, CUT)
    little = op.inputs(small, next(iter(inputs.values())).device)
    whole, _ = compare(op, small, little, op.upstream(small, little), [WHOLE])
    parts, expected = compare(op, case, inputs, upstream, op.views(case))
    return whole + parts, expected


def compare(
    op: Op, case: Case, inputs: dict[str, Tensor], upstream: dict[str, Tensor], views: list[View]
) -> tuple[list[Finding], list[Expected]]:
    """Ours, at most twice as wrong as the formula in the same dtype, plus one rounding."""
    gradients, rounding = "backward" in case.directions, torch.finfo(case.dtype).eps / 2
    poison(inputs)
    got = Bound(op, case, op.ours(case), inputs, upstream).results(gradients)
    findings, expected = [], []
    for view in views:
        part = {n: view.take(n, x.detach()).requires_grad_(x.requires_grad) for n, x in inputs.items()}
        grads = {n: view.take(n, x) for n, x in upstream.items()}
        want = in_float64(op, case, op.oracle(case), part, grads).results(gradients)
        same = Bound(op, case, op.formula(case), part, grads).results(gradients)
        for name, exact in want.items():
            source = name.removeprefix("d_")
            if name != source and source in view.shared:
                continue
            allowed = 2 * relative_error(same[name], exact) + rounding
            error = relative_error(view.take(source, got[name]), exact)
            findings.append(Finding(" of ".join(filter(None, (name, view.name))), error, allowed))
        expected.append(Expected(view, {n: want[n] for n in op.outputs(case.shape)}))
    return findings, expected


def in_float64(op: Op, case: Case, call: Call, inputs: dict[str, Tensor], upstream: dict[str, Tensor]) -> Bound:
    inputs = {n: x.detach().double().requires_grad_(x.requires_grad) for n, x in inputs.items()}
    return Bound(op, case, Provider(call), inputs, {n: x.double() for n, x in upstream.items()})


def largest_error(bound: Bound, expected: list[Expected]) -> float:
    """How wrong a provider's outputs are where float64 knows them; NaN where they are."""
    got = bound.results(gradients=False)
    errors = [relative_error(e.view.take(n, got[n]), exact) for e in expected for n, exact in e.outputs.items()]
    return max(errors, key=lambda e: (e != e, e))


def relative_error(got: Tensor, want: Tensor) -> float:
    """`|got - want| / |want|` in L2, in float64; absolute where `want` is zero."""
    size = want.norm().item()
    return (got.double() - want).norm().item() / (size or 1.0)


def poison(inputs: dict[str, Tensor]) -> None:
    """NaN in the memory that is handed out next: an element that nobody writes shows up."""
    poisoned = [torch.full_like(x, float("nan")) for x in inputs.values() for _ in range(2)]
    del poisoned
