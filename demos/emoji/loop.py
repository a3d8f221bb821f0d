"""One restartable training loop, used by every stage."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Length:
    """How long a stage trains, and the shape of its learning rate: warm-up, constant, linear decay to zero.

    Args:
        steps: optimiser steps; None for as many as fit into `minutes`, at the speed of the first steps.
        minutes: wall time, read only where `steps` is None.
        warmup: steps until the full learning rate.
        decay: share of the steps, at the end, over which it falls to zero.
    """

    steps: int | None = None
    minutes: float | None = None
    warmup: int = 200
    decay: float = 0.4

    def factor(self, step: int, steps: int | None) -> float:
        """Learning rate at `step`, as a share of the full one. `steps` is None while the total is not known."""
        left = 1.0 if steps is None else (steps - step) / max(1.0, self.decay * steps)
        return min(1.0, (step + 1) / self.warmup, left)


class Run:
    """Parameters, their running average, optimisers and the step count of one stage, kept in `folder/name.pt`.

    The random numbers of a step depend on `seed` and the step alone, so a run that was stopped goes on exactly as if
    it had not been.

    Args:
        module: trained in place.
        averaging: decay of the running average, which is what later stages and the export use.
    """

    # the speed is measured over these steps: the first ones compile
    _timed = (40, 100)

    def __init__(
        self,
        name: str,
        module: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        folder: Path,
        length: Length,
        averaging: float = 0.999,
        seed: int = 0,
    ):
        self.name, self.module, self.optimizers, self.length = name, module, optimizers, length
        self.path, self.averaging, self.seed = folder / f"{name}.pt", averaging, seed
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
        self.device = self.parameters[0].device
        self.generator = torch.Generator(self.device)
        self.step, self.steps = 0, length.steps
        if self.path.exists():
            self._restore()

    @property
    def finished(self) -> bool:
        """Whether every step was taken."""
        return self.steps is not None and self.step >= self.steps

    def train(
        self,
        loss: Callable[[torch.Generator], torch.Tensor],
        deadline: float | None = None,
        stop_at: int | None = None,
        report: Callable[[], str] | None = None,
        reports: int = 6,
        work: float = 0.0,
    ) -> bool:
        """Train to the end, or until `deadline` (`time.monotonic()`) or `stop_at` steps, and write a checkpoint.

        Args:
            loss: one step's loss; draws everything random from the generator it is given.
            report: measured now and then on the averaged weights, for the log.
            reports: how often in a whole run. Checkpoints are written four times as often.
            work: floating-point operations a step, for the log.

        Returns:
            Whether the run is finished.
        """
        started, first = time.monotonic(), self.step
        mark, mark_step, running = started, self.step, torch.zeros((), device=self.device)
        with tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=1.0, miniters=1) as bar:
            while not self.finished and self.step != stop_at:
                if deadline is not None and self.step % 10 == 0 and time.monotonic() > deadline:
                    break
                value = self._update(loss)
                running.lerp_(value, 1.0 if self.step == first + 1 else 0.02)
                bar.update()
                if self.steps is None:
                    mark = self._set_length(first, mark, deadline)
                    bar.total = self.steps
                    continue
                every = max(1, self.steps // (4 * reports))
                if self.step % every == 0 or self.finished:
                    line = f"{self.name} {self.step}/{self.steps} loss {running.item():.4f}"
                    speed = (self.step - mark_step) / max(1e-9, time.monotonic() - mark)
                    line += f" {speed:.1f} steps/s"
                    if work:
                        line += f" {speed * work / 1e12:.0f} TFLOP/s"
                    line += f" {time.monotonic() - started:.0f} s"
                    if report is not None and (self.step % (4 * every) == 0 or self.finished):
                        with self.averaged():
                            line += f" {report()}"
                    logger.info(line)
                    self.save()
                    mark, mark_step = time.monotonic(), self.step
        self.save()
        return self.finished

    def _update(self, loss: Callable[[torch.Generator], torch.Tensor]) -> torch.Tensor:
        factor = self.length.factor(self.step, self.steps)
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        self.generator.manual_seed(self.seed * 1_000_003 + self.step)
        value = loss(self.generator)
        value.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(self.averaging, self.step / (self.step + 9))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - keep)
        return value.detach()

    def _set_length(self, first: int, mark: float, deadline: float | None) -> float:
        # no step may be waited for except at the two ends of the measurement
        begin, end = self._timed
        if self.step - first not in (begin, end):
            return mark
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.monotonic()
        if self.step - first == end:
            rate = (end - begin) / (now - mark)
            steps = rate * 60 * self.length.minutes
            if deadline is not None:  # the decay of the learning rate should come to its end; reports take time too
                steps = min(steps, self.step + 0.9 * rate * (deadline - now))
            self.steps = max(self.step + 1, round(steps))
            logger.info("%s: %.1f steps/s, so %d steps", self.name, rate, self.steps)
        return now

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the module holds the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def finish(self) -> bool:
        """Leave the averaged weights in the module, as far as they came; returns whether every step was taken."""
        self._swap()
        return self.finished

    @torch.no_grad()
    def _swap(self) -> None:
        for p, average in zip(self.parameters, self.average, strict=True):
            kept = p.clone()
            p.copy_(average)
            average.copy_(kept)

    def save(self) -> None:
        """Write the checkpoint; one that was cut short never replaces a good one."""
        state = {
            "step": self.step,
            "steps": self.steps,
            "module": self.module.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.path)

    def _restore(self) -> None:
        state = torch.load(self.path, map_location=self.device, weights_only=True)
        self.module.load_state_dict(state["module"])
        for p, saved in zip(self.average, state["average"], strict=True):
            p.copy_(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.steps = state["step"], self.length.steps or state["steps"]
        logger.info("%s: going on from step %d of %s", self.name, self.step, self.steps)


def operations(forward: Callable[[], object], batch: int) -> float:
    """Floating-point operations of one training step; `forward` runs one example."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return 3.0 * batch * counter.get_total_flops()  # the backward pass costs two forward passes


def write_json(path: Path, content: dict) -> None:
    """Write `content` so that a reader never sees half of it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(part, path)
