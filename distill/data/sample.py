"""The teacher's own samples: its pipeline draws every prompt, and the denoiser's arguments are kept with the result."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from ..config import SampleConfig
from ..probe import Convention, Leaves, Step, call_arguments, generator, probe, stopped, watched
from .images import encode, read_pictures
from .store import LATENTS, META, SHARED, Store, first_difference, shard_name, write_json, write_shard, write_tensors

logger = logging.getLogger(__name__)


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line, empty lines left out.

    Raises:
        ValueError: no such file, or nothing in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {path} cannot be read: {error}") from None
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"--prompts {path} has no prompts in it: one a line is needed.")
    return prompts


def sample(
    pipe: Any,
    prompts: Sequence[str],
    config: SampleConfig,
    *,
    model: str = "",
    on_progress: Callable[[int, int], None] | None = None,
) -> Store:
    """Make a data set, or go on with one.

    Sample i is of prompt `i % len(prompts)`, from noise of `seed + i`, whatever the batch size and the processes.
    Under `accelerate launch` every process makes the files `rank, rank + world, ...`.

    Args:
        pipe: any text-to-image pipeline; not changed.
        prompts: ignored where `config.train_data_dir` names pictures with captions.
        model: the pipeline's name or folder, for the record.
        on_progress: called with how many samples there are, of how many.

    Raises:
        ValueError: no prompts, or the folder holds a data set of other settings.
        NotImplementedError: a pipeline that cannot be watched, with what it does.
        OSError: the disk is full; what was written stays, and the same call goes on from there.
    """
    pictures = read_pictures(config.train_data_dir) if config.train_data_dir else None
    if pictures is not None:
        prompts = [caption for _, caption in pictures]
    if not prompts:
        raise ValueError("There are no prompts to sample.")
    for name in ("sample_batch_size", "shard_size", "num_samples"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    total = config.num_samples or len(prompts)
    if pictures is not None:
        total = min(total, len(prompts))
    arguments = call_arguments(pipe, config.resolution, config.num_inference_steps, config.guidance_scale)
    convention, first = probe(pipe, prompts[0], arguments)
    meta: dict[str, Any] = {
        "model": model, "pipeline": type(pipe).__name__, "num_samples": total, "shard_size": config.shard_size,
        "seed": config.seed, "source": "pictures" if pictures is not None else "samples",
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16], "arguments": arguments,
        "latents": list(first.latents.shape[1:]) if first.latents is not None else [],
        "scheduler": type(pipe.scheduler).__name__, "schedule": _plain(dict(pipe.scheduler.config)),
        "convention": dataclasses.asdict(convention),
    }  # fmt: skip
    state = PartialState()
    folder = Path(config.output_dir)
    if state.is_main_process:
        _begin(folder, meta, pipe, arguments, convention, prompts[0])
    state.wait_for_everyone()
    shards = range(-(-total // config.shard_size))
    done = sum(_size(n, total, config.shard_size) for n in shards if (folder / shard_name(n)).is_file())
    if on_progress is not None:
        on_progress(done, total)
    for number in shards[state.process_index :: state.num_processes]:
        if (folder / shard_name(number)).is_file():
            continue
        indices = range(
            number * config.shard_size, number * config.shard_size + _size(number, total, config.shard_size)
        )
        samples: list[dict[str, Tensor]] = []
        for part in _batches(indices, config.sample_batch_size):
            texts = [prompts[i % len(prompts)] for i in part]
            if pictures is not None:
                latents = encode(pipe, [pictures[i][0] for i in part], arguments, meta["latents"])
                calls = stopped(pipe, texts, arguments)
            else:
                step, latents = _draw(pipe, texts, [config.seed + i for i in part], arguments)
                calls = step.calls
            samples += _rows(calls[0], convention, latents)
            if on_progress is not None:
                on_progress(done + len(samples), total)
        write_shard(folder, number, samples, [prompts[i % len(prompts)] for i in indices])
        done += len(samples)
    state.wait_for_everyone()
    return Store(folder)


def _begin(
    folder: Path, meta: dict[str, Any], pipe: Any, arguments: dict[str, Any], convention: Convention, prompt: str
) -> None:
    """Write what all samples share; a folder that has it already must have the same."""
    import json

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be made: {error.strerror}.") from None
    for rest in folder.glob(".*.part"):
        rest.unlink()
    if (folder / META).is_file():
        found = json.loads((folder / META).read_text())
        if (difference := first_difference(found, json.loads(json.dumps(meta)))) is not None:
            raise ValueError(f"{folder} holds another data set: {difference}. Choose another --output_dir.")
        return
    if any(folder.glob("samples-*.safetensors")):
        raise ValueError(f"{folder} holds samples without {META}; choose another --output_dir.")
    calls = stopped(pipe, [prompt], arguments, calls=2) if convention.guided == "calls" else None
    calls = calls or stopped(pipe, [prompt], arguments)
    shared, values = {}, {}
    for path, value in calls[0].items():
        if path in (convention.sample, convention.time):
            continue
        if path in convention.rows:
            if convention.guided:  # the pass without caption is the same for all
                shared[f"empty/{path}"] = calls[-1][path][:1]
        elif isinstance(value, Tensor):
            shared[f"shared/{path}"] = value
        else:
            values[path] = value[:1] if path in convention.repeated else value
    write_tensors(folder / SHARED, {k: t.cpu().clone() for k, t in shared.items()} or {"none": torch.zeros(1)})
    write_json(folder / META, meta | {"values": values})  # last: with it the folder is a data set


@torch.no_grad()
def _draw(pipe: Any, prompts: list[str], seeds: list[int], arguments: dict[str, Any]) -> tuple[Step, Tensor]:
    """Finished latents as the denoiser sees them, and the first step's calls."""
    steps: list[Step] = []
    with watched(pipe, steps):
        pipe(prompts, generator=[generator(s) for s in seeds], output_type="latent", **arguments)
    result = steps[-1].result
    assert result is not None
    if not bool(result.isfinite().all()):
        raise ValueError(f"The teacher's sample for {prompts[0]!r} or one beside it is not finite; try another dtype.")
    return steps[0], result


def _rows(call: Leaves, convention: Convention, latents: Tensor) -> list[dict[str, Tensor]]:
    """One dict a sample; in a guided batch captions stand in the last rows."""
    count = len(latents)
    arguments = {path: call[path][-count:] for path in convention.rows}
    return [
        {LATENTS: latents[i].clone()} | {path: rows[i].clone() for path, rows in arguments.items()}
        for i in range(count)
    ]


def _batches(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    rest = iter(indices)
    while part := list(itertools.islice(rest, size)):
        yield part


def _size(number: int, total: int, shard: int) -> int:
    return min(shard, total - number * shard)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's config as JSON has it."""
    return {
        k: v
        for k, v in config.items()
        if not k.startswith("_") and isinstance(v, (type(None), bool, int, float, str, list))
    }
