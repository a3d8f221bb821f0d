"""Settings of the three commands: one dataclass each, whose fields are the flags and the keys of a YAML file.

Names are those of diffusers' training scripts, where those have one.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

Settings = TypeVar("Settings")


def flag(default: Any, about: str) -> Any:
    """A field with its help text."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": about})
    return dataclasses.field(default=default, metadata={"help": about})


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """`linfusion distill sample`."""

    output_dir: str = flag("distill-data", "folder of the data set; the same command goes on from what is there")
    prompts: str | None = flag(None, "text file, one prompt a line; default the built-in ones of an embedded model")
    train_data_dir: str | None = flag(None, "instead of sampling: a folder of pictures with captions.json")
    num_samples: int | None = flag(None, "how many; default one for each prompt or picture")
    sample_batch_size: int = flag(8, "pictures at a time")
    shard_size: int = flag(64, "samples a file; a kill loses less than one file")
    resolution: int | None = flag(None, "height and width in pixels; default the model's own")
    num_inference_steps: int | None = flag(None, "default the pipeline's own")
    guidance_scale: float | None = flag(None, "default the pipeline's own")
    seed: int = flag(0, "sample i starts from noise of seed + i")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`linfusion distill train`."""

    mechanism: dict[str, Any] = flag({}, "name and settings of the mechanism, or patterns of layers with those")
    layers: list[str] = flag([], "patterns of the layers to replace; default all")
    data_dir: str = flag("distill-data", "what `linfusion distill sample` wrote")
    output_dir: str = flag("distill-run", "checkpoints, logs, pictures and the adapter")
    stage: Literal["transfer", "end_to_end"] = flag("end_to_end", "layer-local attention transfer, or the whole model")
    stages: list[dict[str, Any]] = flag([], "YAML only: settings of several stages, run one after the other")
    init_adapter: str | None = flag(None, "start from this adapter, as an earlier stage wrote it")
    trainable: Literal["mechanism", "mechanism+qkvo", "mechanism+lora"] = flag("mechanism+lora", "what is trained")
    rank: int = flag(8, "of the low-rank additions to q, k, v and out")
    lora_alpha: float | None = flag(None, "their scale times rank; default the rank")
    # losses
    task_weight: float = flag(1.0, "of the loss against the data")
    output_weight: float = flag(0.5, "of the loss against the teacher's prediction")
    attention_weight: float = flag(0.5, "of the loss against the teacher's attention outputs")
    variance_weight: float = flag(0.05, "of the loss against the teacher's variance, where the model predicts one")
    attention_loss: Literal["mse", "relative"] = flag("mse", "of stage end_to_end; transfer is always relative")
    caption_dropout: float = flag(0.1, "share of samples without caption, where the pipeline guides by such a pass")
    # noise
    weighting_scheme: Literal["none", "logit_normal", "mode"] = flag("none", "density of times, for flow models")
    logit_mean: float = flag(0.0, "of logit_normal")
    logit_std: float = flag(1.0, "of logit_normal")
    mode_scale: float = flag(1.29, "of mode")
    # optimisation
    seed: int = flag(0, "of order, times and noise")
    max_train_steps: int = flag(1000, "optimiser steps")
    max_train_minutes: float | None = flag(
        None, "of one process: ends sooner, after these, the learning rate falling to zero over the last 40 %"
    )
    train_batch_size: int = flag(16, "samples a process and forward")
    gradient_accumulation_steps: int = flag(1, "forwards an optimiser step")
    gradient_checkpointing: bool = flag(False, "less memory, more time")
    learning_rate: float = flag(1e-4, "after warm-up")
    host_learning_rate: float | None = flag(None, "of q, k, v, out or their low-rank additions; default the same")
    lr_scheduler: str = flag("constant_with_warmup", "as diffusers names them")
    lr_warmup_steps: int = flag(0, "optimiser steps")
    adam_beta1: float = flag(0.9, "of AdamW")
    adam_beta2: float = flag(0.999, "of AdamW")
    adam_weight_decay: float = flag(0.0, "of AdamW")
    adam_epsilon: float = flag(1e-8, "of AdamW")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(None, "default accelerate's own setting")
    allow_tf32: bool = flag(False, "on CUDA")
    use_ema: bool = flag(False, "the adapter, and the pictures on the way, are of averaged weights")
    ema_decay: float = flag(0.999, "of the average")
    dataloader_num_workers: int = flag(0, "processes that read data and draw noise")
    # what is written
    checkpointing_steps: int = flag(500, "optimiser steps between checkpoints")
    checkpoints_total_limit: int | None = flag(2, "older ones are removed")
    resume_from_checkpoint: str | None = flag(None, '"latest", or a checkpoint folder')
    logging_steps: int = flag(10, "optimiser steps between lines of the log; only then the device is waited for")
    report_to: str | None = flag(None, "tensorboard, wandb, ...; log.jsonl is always written")
    tracker_project_name: str = flag("linfusion-distill", "in wandb")
    validation_prompts: list[str] = flag([], "drawn during training")
    validation_steps: int = flag(500, "optimiser steps between pictures")
    num_inference_steps: int | None = flag(None, "of validation pictures; default the pipeline's own")
    adapter_dtype: Literal["fp32", "bf16"] = flag("bf16", "of the adapter's numbers on disk")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """`linfusion distill eval`."""

    output_dir: str | None = flag(None, "figures.json and sheet.png; default the adapter's folder")
    prompts: str | None = flag(None, "text file, one prompt a line; default the built-in ones of an embedded model")
    num_samples: int = flag(16, "prompts to draw")
    eval_batch_size: int = flag(4, "pictures at a time")
    resolution: int | None = flag(None, "of training; default the model's own")
    scales: list[float] = flag([1.0], "multiples of the resolution to draw at")
    num_inference_steps: int | None = flag(None, "default the pipeline's own")
    guidance_scale: float | None = flag(None, "default the pipeline's own")
    seed: int = flag(0, "picture i starts from noise of seed + i, for teacher and student")
    features: str = flag("vae", "network of FID and KID: vae (the pipeline's own), inception, clip; or none, nor LPIPS")
    retrieval_data: str | None = flag(None, "embedded models: their training pictures, for retrieval top-1")


def fields_of(config: type) -> dict[str, tuple[dataclasses.Field, Any]]:
    """Name to field and resolved type."""
    hints = typing.get_type_hints(config)
    return {f.name: (f, hints[f.name]) for f in dataclasses.fields(config)}


def merge(config: type[Settings], *sources: Mapping[str, Any], where: str = "the configuration") -> Settings:
    """Later sources win. ValueError for an unknown name or a value of the wrong kind."""
    known, given = fields_of(config), {}
    for source in sources:
        for name, value in source.items():
            if name not in known:
                raise ValueError(f"{where} has no setting {name!r}. Settings: {', '.join(known)}.")
            given[name] = _checked(name, value, known[name][1])
    return config(**given)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's settings; ValueError where there are none."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} must hold names and values, got {type(content).__name__}.")
    return content


def _checked(name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`; YAML reads 1e-4 as text and 1 as an int where a float is meant."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    for option in options:
        origin, inner = typing.get_origin(option), typing.get_args(option)
        if origin is Literal and value in inner:
            return value
        if origin is list and isinstance(value, (list, tuple)):
            return [_checked(name, v, inner[0]) for v in value]
        if origin is dict and isinstance(value, Mapping):
            return dict(value)
        if option is float and not isinstance(value, bool):
            try:
                return float(value)
            except (TypeError, ValueError):
                continue
        if isinstance(option, type) and origin is None and type(value) is option:
            return value
    wanted = " or ".join(_describe(o) for o in options if o is not type(None))
    raise ValueError(f"{name} must be {wanted}, got {value!r}.")


def _describe(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(map(str, inner))
    return {list: "a list", dict: "names and values"}.get(origin or kind, getattr(kind, "__name__", str(kind)))
