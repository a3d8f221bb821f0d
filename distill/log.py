"""What a run tells: losses in `log.jsonl` and in trackers, and what it needs of memory and time."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .config import TrainConfig
from .data.store import write_text
from .trainable import bytes_of

logger = logging.getLogger(__name__)

FILE = "log.jsonl"
WARM_UP, TIMED = 3, 10


class Meter:
    """Means of losses between two lines of the log, kept on the device; part of every checkpoint."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, losses: dict[str, Tensor], norm: Tensor | float | None) -> None:
        found = losses if norm is None else losses | {"grad_norm": torch.as_tensor(norm)}
        for name, value in found.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name].to(value.device) + value if name in self.sums else value.clone()
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """Means over steps and processes, on the CPU; begins anew."""
        means = {name: value / self.counts[name] for name, value in self.sums.items()}
        means = accelerator.reduce(means, reduction="mean")
        self.sums, self.counts = {}, {}
        return {name: value.cpu() for name, value in means.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {k: v.cpu() for k, v in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


class Log:
    """`log.jsonl` of the run's folder, and the trackers that were asked for.

    Args:
        step: that the run goes on from: later lines, of a run that was killed, are dropped.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, step: int) -> None:
        self.accelerator, self.path, self.words = accelerator, Path(config.output_dir) / FILE, ""
        self.rows: list[dict[str, Any]] = []
        if self.path.is_file():
            lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
            self.rows = [row for row in map(json.loads, lines) if row["step"] <= step]
        if accelerator.is_main_process:
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        if config.report_to is not None:
            plain = {k: v for k, v in vars(config).items() if isinstance(v, (bool, int, float, str))}
            try:
                accelerator.init_trackers(config.tracker_project_name, plain)
            except ImportError as error:
                raise ImportError(f"report_to {config.report_to}: {error}; pip install linfusion[train]") from None

    def write(self, step: int, meter: Meter, rate: float, layers: list[str]) -> None:
        """One line; every process takes part."""
        means = meter.take(self.accelerator)
        each = means.pop("layers", None)
        row: dict[str, Any] = {"step": step} | {name: float(value) for name, value in means.items()} | {"lr": rate}
        numbers = {k: v for k, v in row.items() if k != "step"}
        if each is not None:
            row["layers"] = dict(zip(layers, each.tolist(), strict=True))
            numbers |= {f"layer/{name}": value for name, value in row["layers"].items()}
        self.words = f"loss {row['loss']:.4g}"
        self.rows.append(row)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        self.accelerator.log(numbers, step=step)

    def pictures(self, step: int, path: Path, images: Tensor) -> None:
        """Into the trackers that take pictures."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_images("validation", images, step)
            elif tracker.name == "wandb":
                import wandb

                tracker.log({"validation": wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """Not `end_training`, which ends the group of processes that the next stage goes on in."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def planned(stage: nn.Module, parameters: list[nn.Parameter], ema: bool) -> str:
    """What memory is needed for, before anything ran; activations come on top."""
    student, teacher = stage.student, stage.teacher  # type: ignore[attr-defined]
    own = {id(p) for p in parameters}
    shared = {id(p) for p in student.parameters()}  # type: ignore[union-attr, operator]
    trained = bytes_of(parameters)
    frozen = bytes_of(p for p in student.parameters() if id(p) not in own)  # type: ignore[union-attr, operator]
    extra = bytes_of(p for p in teacher.parameters() if id(p) not in shared)  # type: ignore[union-attr, operator]
    state = trained * (3 + ema)  # gradients, two moments of AdamW, the average
    return (
        f"{sum(p.numel() for p in parameters):,} parameters are trained. Memory without activations: model "
        f"{_mib(frozen + trained)}, of the teacher's own {_mib(extra)}, gradients and optimiser {_mib(state)}."
    )


@contextmanager
def measured(first: int, last: int | None, accelerator: Accelerator) -> Iterator[Callable[[int], None]]:
    """Gives a function to call after each step, which tells time and memory once, after the first ones."""
    mark = 0.0

    def after(step: int) -> None:
        nonlocal mark
        done = step - first
        if done not in (WARM_UP, WARM_UP + TIMED):
            return
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if done == WARM_UP + TIMED and accelerator.is_main_process:
            each = (now - mark) / TIMED
            rest = ""
            if last is not None:
                rest = f"; the remaining {last - step} steps take about {(last - step) * each / 60:.1f} minutes"
            logger.info("%.3f s a step, peak memory %s%s.", each, _mib(_peak(accelerator.device)), rest)
        mark = now

    yield after


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
