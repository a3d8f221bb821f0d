"""Checkpoints by accelerate, written under a temporary name and then renamed; and which run a folder belongs to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..adapter import WEIGHTS
from .config import TrainConfig
from .data.store import first_difference, write_json, write_tensors

RUN, TRAINED = "run.json", "trained.safetensors"
# settings that may change between a checkpoint and its continuation without changing what is computed
FREE = {
    "output_dir", "max_train_steps", "max_train_minutes", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "logging_steps", "report_to", "tracker_project_name", "validation_prompts",
    "validation_steps", "num_inference_steps", "adapter_dtype", "dataloader_num_workers", "gradient_checkpointing",
    "stages", "data_dir",
}  # fmt: skip


class Checkpoints:
    """Those of one run.

    Args:
        trained: parameters that change, by name; the frozen host is not written, where the user's accelerate config
            does not shard it (FSDP and DeepSpeed write the model their own way).
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, trained: Mapping[str, nn.Parameter]) -> None:
        self.accelerator, self.config = accelerator, config
        self.folder = Path(config.output_dir)
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            return

        def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
            if accelerator.is_main_process:
                write_tensors(Path(folder) / TRAINED, {name: p.detach() for name, p in trained.items()})
            weights.clear()  # so that accelerate writes no model

        def load(models: list[nn.Module], folder: str) -> None:
            values = load_file(Path(folder) / TRAINED)
            with torch.no_grad():
                for name, p in trained.items():
                    p.copy_(values[name])
            models.clear()

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)

    def begin(self, identity: Mapping[str, Any]) -> int:
        """The step to go on from, its state loaded; 0 for a new run.

        Raises:
            ValueError: the folder belongs to another run, or holds checkpoints and nothing was said about them.
        """
        wanted = self.config.resume_from_checkpoint
        found = self.all()
        if wanted is None and found:
            raise ValueError(
                f"{self.folder} holds {found[-1].name} of a run: --resume_from_checkpoint latest goes on with it, "
                "another --output_dir begins anew."
            )
        path = (found[-1] if found else None) if wanted == "latest" else Path(wanted) if wanted else None
        if path is not None:
            self._same_run(path, identity)
            self._load(path)
        if self.accelerator.is_main_process:
            for rest in self.folder.glob(".checkpoint-*"):
                shutil.rmtree(rest)
        self.identity = dict(identity)
        return number(path) if path is not None else 0

    def save(self, step: int) -> None:
        """Write `checkpoint-<step>`; OSError leaves the earlier ones as they were."""
        part, final = self.folder / f".checkpoint-{step}", self.folder / f"checkpoint-{step}"
        if final.is_dir():
            return
        try:
            self.accelerator.save_state(str(part))
            if self.accelerator.is_main_process:
                write_json(part / RUN, self.identity)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save tells of a full disk by RuntimeError
            shutil.rmtree(part, ignore_errors=True)
            raise OSError(f"{final} could not be written ({error}). {self.last()}") from None
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            part.rename(final)
            limit = self.config.checkpoints_total_limit
            for old in self.all()[:-limit] if limit else []:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def all(self) -> list[Path]:
        """Oldest first."""
        return sorted((p for p in self.folder.glob("checkpoint-*") if p.is_dir()), key=number)

    def last(self) -> str:
        """A sentence on where to go on from."""
        found = self.all()
        return f"The last checkpoint is {found[-1]}." if found else "There is no checkpoint yet."

    def _same_run(self, path: Path, identity: Mapping[str, Any]) -> None:
        try:
            found = json.loads((path / RUN).read_text())
        except (OSError, json.JSONDecodeError):
            raise ValueError(f"{path} is no checkpoint: it lacks {RUN}.") from None
        if (difference := first_difference(found, json.loads(json.dumps(dict(identity))))) is not None:
            raise ValueError(f"{path} is of another run: {difference}. Nothing was changed.")

    def _load(self, path: Path) -> None:
        try:
            self.accelerator.load_state(str(path))
        except (OSError, RuntimeError, SafetensorError, KeyError, EOFError) as error:
            raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from None


def identity(config: TrainConfig, meta: Mapping[str, Any], world: int) -> dict[str, Any]:
    """Everything that decides the numbers of a run."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    settings["train_batch_size"] = config.train_batch_size * world
    if config.init_adapter is not None:  # by what is in it: an earlier stage may have been trained anew
        settings["init_adapter"] = hashlib.sha256(_content(config.init_adapter)).hexdigest()[:16]
    data = {f"data {k}": v for k, v in meta.items() if k in ("model", "num_samples", "seed", "prompts", "source")}
    return settings | data


def _content(adapter: str) -> bytes:
    """An adapter's tensors, or the name of one on the Hub."""
    file = Path(adapter) / WEIGHTS
    return file.read_bytes() if file.is_file() else adapter.encode()


def number(path: Path) -> int:
    match = re.search(r"checkpoint-(\d+)$", path.name)
    if match is None:
        raise ValueError(f"{path} is no checkpoint: its name must end in checkpoint-<step>.")
    return int(match.group(1))
