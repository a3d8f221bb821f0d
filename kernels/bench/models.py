"""Whole denoisers of full size with random weights, on which speed does not depend: one forward, seconds and memory.

Checked first with few blocks: this package's kernels in bf16 against the same mechanism in PyTorch, in fp32.
"""

from __future__ import annotations

import copy
import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..backend import without_triton
from . import timing
from .checks import relative_error
from .op import Bench, Case, Missing
from .report import OURS
from .runner import Session, one_line, release

ENOUGH = 2.0  # seconds of repeats, five of them at most
CHECK_PX = 256


class Model(Bench):
    """One denoiser: stock, then with each mechanism."""

    stock: tuple[str, str | None]
    """Name of the stock row and diffusers' attention backend for it."""

    def run(self, cases: list[Case], session: Session) -> None:
        release(session)
        right = {n: c for n, c in self.mechanisms().items() if session.wants(OURS) and self._right(n, c, session)}
        if not session.timed:
            return
        model = self.build(session.device)
        for case in cases:
            inputs = self.inputs(case.shape.get("px"), session.device)
            name, backend = self.stock
            if session.wants(name):
                with _Backend(model, backend):
                    self._time(model, inputs, case, name, session)
            for name, core in self.cores().items():
                if session.wants(name):
                    try:
                        with core():
                            self._time(model, inputs, case, name, session)
                    except Missing as error:
                        session.say(f"{self.name} {case.shape}: {name} left out, {error}")
            for mechanism, config in right.items():
                # the backend is the host's business, and only its own attention uses it
                with _Backend(model, backend if mechanism == "softmax" else None), _applied(model, config):
                    self._time(model, inputs, case, f"{OURS}+{mechanism}", session)

    @abstractmethod
    def build(self, device: torch.device, few: bool = False) -> nn.Module:
        """The model in bf16; `few` blocks for the check."""

    @abstractmethod
    def inputs(self, px: int, device: torch.device) -> dict[str, Any]:
        """Arguments of a forward at px x px pixels, batch 1."""

    @abstractmethod
    def mechanisms(self) -> dict[str, Any]:
        """What `linfusion.apply` takes, by name."""

    def checked(self, config: Any) -> Any:
        """With which settings a mechanism is checked, if others than those that are timed."""
        return config

    def cores(self) -> dict[str, Callable[[], AbstractContextManager[None]]]:
        """Others by name: what puts theirs in the place of the host's self-attention, after norms and rotation."""
        return {}

    def _right(self, mechanism: str, config: Any, session: Session) -> bool:
        name = f"{self.name} {mechanism}"
        try:
            error, allowed = self.check(config, session.device)
        except Exception as broken:
            session.refuse(name, f"the check broke: {one_line(broken)}")
            return False
        if not error <= allowed:
            session.refuse(name, f"error {error:.2e} > {allowed:.2e}")
            return False
        session.say(f"{name}: checked, error {error:.2e} of {allowed:.2e}")
        return True

    @torch.no_grad()
    def check(self, config: Any, device: torch.device) -> tuple[float, float]:
        """Relative error of the model's output with our kernels, and twice that without, plus one rounding."""
        model = self.build(device, few=True)
        inputs = self.inputs(CHECK_PX, device)
        with _applied(model, self.checked(config)):
            for name, p in model.named_parameters():
                if ".linfusion." in name:  # last layers start at zero and would hide what is before them
                    fill(name, p)
            with without_triton(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                exact = copy.deepcopy(model).float()(**_in_float(inputs), return_dict=False)[0].double()
                same = model(**inputs, return_dict=False)[0]
            got = model(**inputs, return_dict=False)[0]
        return relative_error(got, exact), 2 * relative_error(same, exact) + torch.finfo(got.dtype).eps / 2

    def _time(self, model: nn.Module, inputs: dict[str, Any], case: Case, provider: str, session: Session) -> None:
        try:
            with torch.inference_mode():
                forward = lambda: model(**inputs, return_dict=False)  # noqa: E731
                times = repeated(forward)
                # weights are held too, so that the peak is what must fit on the card
                held = [*model.parameters(), *model.buffers(), *(x for x in inputs.values() if isinstance(x, Tensor))]
                peak = timing.peak_mib(forward, held)
        except Exception as error:
            session.say(f"{self.name} {case.shape}: {provider} failed, {one_line(error)}")
        else:
            session.emit(self.name, provider, "forward", case.shape, case.dtype, times, peak)
            session.say(f"{self.name} {case.shape} {provider}: {times[0] / 1000:.3f} s, peak {peak / 1024:.1f} GiB")
        torch.cuda.empty_cache()


def repeated(forward: Callable[[], object]) -> timing.Times:
    """Quantiles of forwards after a first one, by the host's clock."""
    taken: list[float] = []
    forward()
    while not taken or (len(taken) < 5 and sum(taken) < ENOUGH * 1000):
        torch.cuda.synchronize()
        start = time.perf_counter()
        forward()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - start) * 1000)
    return timing.quantiles(taken)


def random_model(cls: Any, device: torch.device, **config: Any) -> nn.Module:
    """A model of any size without files of weights: made without memory, then filled with random numbers."""
    with torch.device("meta"):
        model = cls(**config)
    model = model.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        fill(name, p)
    return model


def fill(name: str, p: Tensor) -> None:
    """Random weights that keep sizes as they are at any width; biases zero, norms one."""
    if p.ndim > 1:
        p.normal_(0, p[0].numel() ** -0.5)
    else:
        p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def _in_float(inputs: dict[str, Any]) -> dict[str, Any]:
    def wide(x: Any) -> Any:
        if isinstance(x, dict):
            return _in_float(x)
        return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x

    return {n: wide(x) for n, x in inputs.items()}


def _applied(model: nn.Module, config: Any) -> Any:
    import linfusion

    return linfusion.applied(model, config)


class _Backend:
    """diffusers' attention backend by name, None for its default, while the block runs."""

    def __init__(self, model: Any, name: str | None) -> None:
        self.model, self.name = model, name

    def __enter__(self) -> None:
        if self.name is not None:
            self.model.set_attention_backend(self.name)

    def __exit__(self, *_: object) -> None:
        if self.name is not None:
            self.model.reset_attention_backend()
