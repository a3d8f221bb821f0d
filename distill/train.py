"""Train a mechanism to stand in for a pipeline's attention, and write the adapter that `linfusion.load` applies."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, PartialState
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from ..apply import record_of
from ..weights import save
from . import card
from .checkpoint import Checkpoints, identity
from .config import TrainConfig
from .data.store import Store, write_json
from .data.stream import Positions, Stream, batches
from .health import Health
from .log import Log, Meter, measured, planned
from .pictures import component, draw, sheet
from .probe import denoiser
from .stages import Stage
from .student import build
from .trainable import LORA, is_own

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
STORED = {"fp32": None, "bf16": torch.bfloat16}


def train(
    pipe: Any, config: TrainConfig, *, model: str = "", on_progress: Callable[[int, int, str], None] | None = None
) -> Path:
    """One stage, from the data set to the adapter's folder.

    Args:
        pipe: the teacher's pipeline; used up: load another one afterwards.
        model: its name or folder, for the model card.
        on_progress: called with the step, of how many (0 where time decides), and a few words.

    Returns:
        `<output_dir>/adapter`.

    Raises:
        ValueError: settings, data or folders that do not fit; nothing was written.
        NotImplementedError: a mechanism that the model cannot take.
        Diverged: something was not finite; the message names the first layer where that was so.
        OSError: the disk is full; earlier checkpoints are whole.
    """
    _check(config)
    store = Store(config.data_dir)
    accelerator = _accelerator(config)
    if torch.cuda.is_available():
        # torch 2.11 on an H100: the cuDNN backend of attention crashes in the backward pass at 272 tokens
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    set_seed(config.seed)
    stage, trained, targets = build(pipe, config, store, accelerator)
    run = Run(pipe, config, store, accelerator, stage, trained)
    run.go(on_progress)
    return run.finish(model, targets)


def finished(config: TrainConfig) -> Path | None:
    """The adapter of a run with just these settings, if it came to its end."""
    folder = Path(config.output_dir) / ADAPTER
    same = card.read(folder / card.FACTS).get("settings") == dataclasses.asdict(config)
    return folder if same else None


class Run:
    """A stage on its way: the loop, and what is written along it."""

    def __init__(
        self, pipe: Any, config: TrainConfig, store: Store, accelerator: Accelerator, stage: Stage,
        trained: dict[str, nn.Parameter],
    ) -> None:  # fmt: skip
        self.pipe, self.config, self.store, self.accelerator, self.stage = pipe, config, store, accelerator, stage
        self.parameters = list(trained.values())
        average: dict[str, Any] = {"decay": config.ema_decay, "use_ema_warmup": True, "foreach": True}
        self.ema = EMAModel(self.parameters, **average) if config.use_ema else None
        optimizer = _optimizer(trained, config, accelerator.device)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it asks the loader, which is not prepared
            accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = (
                config.train_batch_size
            )
        self.module, self.optimizer = accelerator.prepare(stage, optimizer)
        self.scheduler = get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )  # fmt: skip
        self.limit = Limit(config.max_train_minutes)
        if config.max_train_minutes is not None:
            self.scheduler.lr_lambdas = [self.limit.shortened(rate) for rate in self.scheduler.lr_lambdas]
        self.meter = Meter()
        accelerator.register_for_checkpointing(self.scheduler, self.meter, *([self.ema] if self.ema else []))
        self.checkpoints = Checkpoints(accelerator, config, trained)
        self.step = self.checkpoints.begin(identity(config, store.meta, accelerator.num_processes))
        if self.ema is not None:
            self.ema.to(accelerator.device)
        self.log = Log(accelerator, config, self.step)
        self.health = Health(stage.layers, accelerator.device, fp16=accelerator.mixed_precision == "fp16")
        if accelerator.is_main_process:
            logger.info("%s", planned(stage, self.parameters, self.ema is not None))

    def go(self, on_progress: Callable[[int, int, str], None] | None) -> None:
        """Every remaining step. The host waits for the device only where it logs, saves or draws."""
        c, accelerator = self.config, self.accelerator
        stream = Stream(self.store, c.seed, c.caption_dropout)
        first = self.step * c.gradient_accumulation_steps
        positions = Positions(first, c.train_batch_size, accelerator.process_index, accelerator.num_processes)
        cuda = accelerator.device.type == "cuda"
        total = c.max_train_steps if c.max_train_minutes is None else None
        with measured(self.step, total, accelerator) as after_step:
            if self.step < c.max_train_steps:
                for batch in batches(stream, positions, c.dataloader_num_workers, pin=cuda):
                    batch = {k: v.to(accelerator.device, non_blocking=True) for k, v in batch.items()}
                    if not self._one(batch):
                        continue
                    self.step += 1
                    self.limit.tick()
                    self._now_and_then()
                    after_step(self.step)
                    if on_progress is not None:
                        on_progress(self.step, total or 0, self.log.words)
                    if self.last:
                        break

    @property
    def last(self) -> bool:
        """Whether this step is the end, by number or by time."""
        return self.step >= self.config.max_train_steps or self.limit.over

    def _one(self, batch: dict[str, torch.Tensor]) -> bool:
        """Forward and backward; whether that made an optimiser step."""
        with self.accelerator.accumulate(self.module):
            losses = self.module(batch)
            self.accelerator.backward(losses["loss"])
            synced, norm = self.accelerator.sync_gradients, None
            if synced:
                norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
            self.health.update(losses.pop("finite"), losses["loss"].detach(), norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.meter.add(losses, norm)
        if synced:
            self.scheduler.step()
            if self.ema is not None:
                self.ema.step(self.parameters)
        return synced

    def _now_and_then(self) -> None:
        c, step = self.config, self.step
        last = self.last
        saves, draws = step % c.checkpointing_steps == 0 or last, bool(c.validation_prompts)
        if saves or last or step % c.logging_steps == 0:
            self.health.check(step, self.checkpoints.last())
        if step % c.logging_steps == 0 or last:
            self.log.write(step, self.meter, float(self.scheduler.get_last_lr()[0]), self.stage.layers)
        if saves:
            self.checkpoints.save(step)
        if draws and (step % c.validation_steps == 0 or last):
            self._validate()

    @torch.no_grad()
    def _validate(self) -> None:
        """Pictures of the validation prompts by teacher and student."""
        if self.accelerator.is_main_process:
            c, name = self.config, denoiser(self.pipe)[0]
            self.pipe.to(self.accelerator.device)
            self.pipe.set_progress_bar_config(disable=True)
            settings: dict[str, Any] = {"seed": c.seed, "steps": c.num_inference_steps}
            settings["size"] = self.store.meta["arguments"].get("height")
            with self.averaged(), self.stage.paused(), self.accelerator.autocast():
                student = draw(self.pipe, c.validation_prompts, **settings)
                with component(self.pipe, name, self.stage.teacher):
                    teacher = draw(self.pipe, c.validation_prompts, **settings)
            folder = Path(c.output_dir) / "validation"
            folder.mkdir(exist_ok=True)
            path = folder / f"step-{self.step:06d}.png"
            sheet([("teacher", teacher), (f"step {self.step}", student)], c.validation_prompts, path)
            self.log.pictures(self.step, path, student)
        self.accelerator.wait_for_everyone()

    def averaged(self) -> Any:
        """A block in which the student has the averaged weights, where they are kept."""
        return _Averaged(self.ema, self.parameters)

    def finish(self, model: str, targets: list[str]) -> Path:
        """Write the adapter: a folder that is there whole or not at all."""
        c, final = self.config, Path(self.config.output_dir) / ADAPTER
        student = self.stage.student
        if self.accelerator.is_main_process:
            part = final.with_name(f".{ADAPTER}")
            shutil.rmtree(part, ignore_errors=True)
            with self.averaged():
                save(
                    student, part, host=[f"{t}.*" for t in targets] if c.trainable == "mechanism+qkvo" else None,
                    lora=LORA if c.trainable == "mechanism+lora" else None, dtype=STORED[c.adapter_dtype],
                )  # fmt: skip
            record = record_of(student)
            assert record is not None
            names = dict.fromkeys(str(entry.mechanism.config) for entry in record.entries.values())
            facts = {
                "mechanism": ", ".join(names), "layers": len(record.entries),
                "base_model": model or type(student).__name__, "pipeline": self.store.meta["pipeline"],
                "samples": len(self.store), "source": self.store.meta["source"],
                "teacher_arguments": self.store.meta["arguments"], "steps": self.step,
                "batch": c.train_batch_size * self.accelerator.num_processes * c.gradient_accumulation_steps,
                "parameters": sum(p.numel() for p in self.parameters), "losses": self.log.rows[-1:],
                "settings": dataclasses.asdict(c),
            }  # fmt: skip
            write_json(part / card.FACTS, facts)
            pictures = sorted((Path(c.output_dir) / "validation").glob("step-*.png"))
            if pictures:
                shutil.copy(pictures[-1], part / card.SHEET)
            card.write(part)
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
        self.log.close()
        self.accelerator.wait_for_everyone()
        self.stage.close()
        self.accelerator.free_memory()
        return final


class Limit:
    """A time that training may take, from its first step on, which compiles; without one it is never over."""

    decay = 0.4

    def __init__(self, minutes: float | None) -> None:
        self.seconds = math.inf if minutes is None else 60 * minutes
        self.begun, self.passed = 0.0, 0.0

    def tick(self) -> None:
        """After a step."""
        now = time.monotonic()
        self.begun = self.begun or now
        self.passed = (now - self.begun) / self.seconds

    @property
    def over(self) -> bool:
        return self.passed >= 1

    def shortened(self, rate: Callable[[int], float]) -> Callable[[int], float]:
        """A schedule of learning rates that comes down to zero in time."""
        return lambda step: rate(step) * min(1.0, max(0.0, 1 - self.passed) / self.decay)


class _Averaged:
    def __init__(self, ema: EMAModel | None, parameters: list[nn.Parameter]) -> None:
        self.ema, self.parameters = ema, parameters

    def __enter__(self) -> None:
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)

    def __exit__(self, *error: object) -> None:
        if self.ema is not None:
            self.ema.restore(self.parameters)


def _accelerator(config: TrainConfig) -> Accelerator:
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be made: {error.strerror}.") from None
    return Accelerator(
        mixed_precision=config.mixed_precision, log_with=config.report_to,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )  # fmt: skip


def _optimizer(trained: dict[str, nn.Parameter], c: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """The mechanism's parameters, then the host's, each at their own rate."""
    groups = [
        {"params": [p for n, p in trained.items() if is_own(n)], "lr": c.learning_rate},
        {"params": [p for n, p in trained.items() if not is_own(n)], "lr": c.host_learning_rate or c.learning_rate},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], betas=(c.adam_beta1, c.adam_beta2), weight_decay=c.adam_weight_decay,
        eps=c.adam_epsilon, fused=device.type == "cuda",
    )  # fmt: skip


def _check(c: TrainConfig) -> None:
    if c.max_train_minutes is not None:
        if not 0 < c.max_train_minutes < math.inf:
            raise ValueError(f"max_train_minutes must be a positive number, got {c.max_train_minutes}.")
        if PartialState().num_processes > 1:  # whose clocks would part
            raise NotImplementedError("max_train_minutes is for one process; give max_train_steps.")
    for name in (
        "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "checkpointing_steps", "logging_steps",
        "validation_steps", "rank",
    ):  # fmt: skip
        if getattr(c, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(c, name)}.")
    if c.stage == "end_to_end" and not (c.task_weight or c.output_weight or c.attention_weight):
        raise ValueError("All weights of the losses are 0: there is nothing to learn from.")
    if not 0 <= c.caption_dropout <= 1:
        raise ValueError(f"caption_dropout must be between 0 and 1, got {c.caption_dropout}.")
