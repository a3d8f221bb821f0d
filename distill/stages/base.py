"""What both stages share: calling the denoiser on a batch, and watching the replaced layers of student and teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..data.store import LATENTS, Store
from ..data.stream import DROPPED, NOISE, QUANTILE
from ..losses import finite
from ..noise import Noised, Schedule
from ..probe import unflatten


class Inputs:
    """Turns a batch into the denoiser's arguments, as the pipeline gives them; nothing here waits for the device."""

    def __init__(self, store: Store, config: TrainConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype, meta = dtype, store.meta
        c: dict[str, Any] = meta["convention"]
        self.convention = c
        self.schedule = Schedule(
            meta, device, config.weighting_scheme, config.logit_mean, config.logit_std, config.mode_scale
        )
        tensors = {k: self._cast(t.to(device)) for k, t in store.shared.items()}
        self.shared = {k.removeprefix("shared/"): t for k, t in tensors.items() if k.startswith("shared/")}
        self.empty = {k.removeprefix("empty/"): t for k, t in tensors.items() if k.startswith("empty/")}
        self.values: dict[str, Any] = meta["values"]

    def __call__(self, batch: dict[str, Tensor]) -> tuple[dict[str, Any], Noised]:
        clean = batch[LATENTS].float()
        noised = self.schedule(clean, batch[NOISE], batch[QUANTILE])
        leaves: dict[str, Any] = dict(self.shared)
        for path, value in self.values.items():
            repeated = path in self.convention["repeated"]
            leaves[path] = list(value) * len(clean) if repeated else value
        for path in self.convention["rows"]:
            rows = self._cast(batch[path])
            if path in self.empty:
                drop = batch[DROPPED].view(-1, *[1] * (rows.ndim - 1))
                rows = torch.where(drop, self.empty[path], rows)
            leaves[path] = rows
        leaves[self.convention["sample"]] = noised.sample.to(self.dtype)
        leaves[self.convention["time"]] = noised.time
        return unflatten(leaves) | {"return_dict": False}, noised

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if x.is_floating_point() else x


class Stage(nn.Module):
    """A student in training.

    Args:
        student: the denoiser with the mechanism applied.
        teacher: `frozen_copy` of it from before; no child, so that nothing saves, moves or wraps it.
        layers: names of the replaced layers; brought into the order in which they run.

    Forward takes a batch and returns scalars by name, `loss` among them; `layers` `[L]`, one loss each; and `finite`
    `[L + 1]`, whether each layer's output and the answer were.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, layers: list[str], inputs: Inputs, config: TrainConfig
    ) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)
        self.layers, self.inputs, self.config = layers, inputs, config
        self.seen: dict[str, Any] = {}
        self._watching = self._forwarding = False
        self._hooks = [
            student.get_submodule(name).register_forward_hook(self._hook(name), with_kwargs=True) for name in layers
        ]

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    def on_layer(self, name: str, args: tuple, kwargs: dict[str, Any], output: Any) -> tuple[Any, Any]:
        """What to keep of a student's layer, and what it hands on instead of `output` (None: `output`)."""
        raise NotImplementedError

    def answer(self, arguments: dict[str, Any]) -> Tensor:
        """The student's answer, its layers watched."""
        self.seen, self._watching, self._forwarding = {}, True, True
        try:
            answer = self.student(**arguments)[0]
        finally:
            self._forwarding = False  # backward may run layers again (gradient checkpointing), hooks and all
        self.layers[:] = self.seen  # in the order in which they ran
        return answer

    def all_finite(self, outputs: list[Any], answer: Tensor) -> Tensor:
        return torch.stack([finite(o) for o in (*outputs, answer)])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The student as it is by itself, to draw pictures with."""
        before, self._watching = self._watching, False
        try:
            yield
        finally:
            self._watching = before

    def close(self) -> None:
        """Take the hooks off the student."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            if not self._watching:
                return None
            kept, instead = self.on_layer(name, args, kwargs, output)
            if self._forwarding:
                self.seen[name] = kept
            return instead

        return hook
