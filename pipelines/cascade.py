"""A picture far larger than its model: drawn at the native size, then upscaled, noised and denoised, size by size."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..apply import apply, kept, named_denoisers, record_of
from ..weights import load
from . import scale
from .facts import call_defaults, text_reader
from .files import check_picture, save_latents
from .generate import best_backend
from .latents import coarse, from_vae, pack, resize, to_vae, unpack
from .memory import Budget, frugal, parse_memory, room
from .schedule import check_scheduler, noised, steered
from .stages import Shelf, Size, Stage, check_stages, digest, on_white, stages, steps_of
from .vae import decode, encode, room_needed

PREVIEW = 512  # pixels of the longer side
OURS = ("height", "width", "num_inference_steps", "generator", "output_type", "latents", "callback_on_step_end")


@dataclass(frozen=True)
class StageReport:
    """What one stage did.

    Attributes:
        stage, steps: what it was told, and the steps that were run.
        level: the noise level that it began at.
        seconds: of upscaling and the pipeline's call, its text encoders included.
        resumed: whether it was found in the folder.
        remarks: what was done to fit into memory.
    """

    stage: Stage
    steps: int
    level: float
    seconds: float
    resumed: bool = False
    remarks: tuple[str, ...] = ()


@dataclass
class Cascade:
    """A finished cascade.

    Attributes:
        latents: clean, `[1, C, h, w]`, in the denoiser's scale.
        stages: one report each.
        decode_seconds: of decoding, and of writing where it was written to a file.
        image: the picture; None where it was written to a file.
        path: that file.
    """

    latents: Tensor
    stages: list[StageReport] = field(default_factory=list)
    decode_seconds: float = 0.0
    image: Image.Image | None = None
    path: Path | None = None


@torch.no_grad()
def cascade(
    pipe: Any,
    prompt: str | None,
    sizes: Sequence[Size | Stage],
    *,
    image: Image.Image | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    out: str | Path | None = None,
    arguments: dict[str, Any] | None = None,
    memory: str | int | None = None,
    on_step: Callable[[int, int, int], None] | None = None,
    on_stage: Callable[[StageReport, Image.Image], None] | None = None,
    **settings: Any,
) -> Cascade:
    """Draw one picture size by size with a stock text-to-image pipeline (SDEdit, arXiv 2108.01073).

    Args:
        pipe: a diffusers pipeline whose latents are pictures or packed as FLUX.1's; nothing of it stays changed.
        prompt: for every stage; None where `arguments` hold its embeddings.
        sizes: in pixels, growing: numbers, (height, width), or `Stage`s. The first should be the model's own.
        image: a picture of the user's own to begin with instead of noise; brought to the first size.
        seed: of the noise, drawn on the CPU; every stage has its own.
        folder: where finished stages are kept, with small previews; the same call goes on from there.
        out: stream the picture to this file instead of returning it, never holding it whole in floats.
        arguments: more of the pipeline's own call, such as `{"negative_prompt": "blurry"}`.
        memory: of the GPU, such as "24GiB", for the denoiser's stages: what is done without to fit into it, or into
            what there is, stands in the stages' remarks (memory.py).
        on_step: called with the stage's number from 1, its finished steps and their total.
        on_stage: called with each stage's report and a preview.
        **settings: of `Stage`, one value for all or a list with one for each.

    Raises:
        ValueError: settings or sizes that do not fit, a folder of another picture.
        MemoryError: a stage does not fit; those before it are in `folder`.
        NotImplementedError: a pipeline whose latents or schedule cannot be handled from outside.
    """
    plan = stages(sizes, **settings)
    budget = Budget(None if memory is None else parse_memory(memory))
    check_stages(pipe, plan)
    check_scheduler(pipe.scheduler, flow=any(s.shift is not None for s in plan))
    if out is not None:
        check_picture(out, plan[-1].shape[1], plan[-1].shape[0])
    arguments = dict(arguments or {})
    if wrong := [name for name in arguments if name in OURS or name not in call_defaults(pipe)]:
        raise ValueError(f"arguments cannot hold {', '.join(wrong)}: not of {type(pipe).__name__}'s call, or set here.")
    run: dict[str, Any] = {
        "pipeline": type(pipe).__name__,
        "model": str(getattr(pipe.config, "_name_or_path", "")),
        "prompt": prompt,
    }
    if folder is not None:
        run["attention"] = _attention(pipe)
    shelf = Shelf(folder, run | {"seed": seed, "image": digest(image), "arguments": digest(arguments)})
    result = Cascade(torch.empty(0))
    clean: Tensor | None = None
    held = plan[0].shape  # what the picture so far can show, in pixels
    if image is not None:
        held = min(image.height, held[0]), min(image.width, held[1])
        clean = from_vae(pipe.vae, encode(pipe.vae, on_white(image, plan[0].shape)))
    for number, stage in enumerate(plan, 1):
        steps = steps_of(pipe, stage, whole=clean is None)
        latents = shelf.get(number, plan)
        if latents is not None:
            level = 1.0 if clean is None else stage.strength
            clean, held = latents.to(pipe.device), stage.shape
            result.stages.append(StageReport(stage, steps, level, 0.0, resumed=True))
            continue

        def tell(done: int, total: int, number: int = number) -> None:
            if on_step is not None:
                on_step(number, done, total)

        run_stage = functools.partial(_run, pipe, prompt, stage, steps, clean, held, seed + number - 1, arguments, tell)
        kept_there = "" if folder is None else f"Finished stages are in {folder}."
        with _stage_settings(pipe, stage, plan[0]):
            (clean, report), remarks = frugal(pipe, budget, math.prod(stage.shape), run_stage, kept_there)
        report, held = replace(report, remarks=tuple(remarks)), stage.shape
        result.stages.append(report)
        if folder is not None or on_stage is not None:
            small = preview(pipe, clean)
            shelf.put(number, plan, clean, small)
            if on_stage is not None:
                on_stage(report, small)
    assert clean is not None
    result.latents = clean
    started, latents = time.perf_counter(), to_vae(pipe.vae, clean)
    with room(pipe, room_needed(pipe.vae, latents)):
        if out is None:
            result.image = decode(pipe.vae, latents)
        else:
            save_latents(pipe.vae, latents, out, plan[-1].shape)
            result.path = Path(out)
    result.decode_seconds = time.perf_counter() - started
    return result


def preview(pipe: Any, latents: Tensor) -> Image.Image:
    """A small picture of clean latents `[1, C, h, w]`, decoded from an average of them where they are many."""
    longest = PREVIEW // pipe.vae_scale_factor
    shrink = max(1.0, max(latents.shape[2:]) / longest)
    size = (max(1, round(latents.shape[2] / shrink)), max(1, round(latents.shape[3] / shrink)))
    return decode(pipe.vae, to_vae(pipe.vae, resize(latents, size)))


def _run(
    pipe: Any, prompt: str | None, stage: Stage, steps: int, clean: Tensor | None, held: tuple[int, int], seed: int,
    arguments: dict[str, Any], on_step: Callable[[int, int], None],
) -> tuple[Tensor, StageReport]:  # fmt: skip
    """One stage: clean latents `[1, C, h, w]` that show `held` pixels, or none, to clean latents of its size."""
    size, factor, started = stage.shape, pipe.vae_scale_factor, time.perf_counter()
    before = max(1, held[0] // factor), max(1, held[1] // factor)
    if clean is not None:
        clean = _upscale(pipe, clean, stage, (size[0] // factor, size[1] // factor))
    kept_back: dict[str, Tensor] = {}

    def start(noise: Tensor, scheduler: Any) -> Tensor:
        assert clean is not None
        kept_back["clean"], kept_back["noise"] = pack(pipe, clean, noise), noise
        return noised(scheduler, kept_back["clean"], noise)

    def change(latents: Tensor, done: int) -> Tensor:
        """Fade from the noised upscaled picture to what the model makes of it."""
        gap = noised(pipe.scheduler, kept_back["clean"], kept_back["noise"], done).to(latents) - latents
        fade = (1 + math.cos(math.pi * done / steering.total)) / 2
        moved = latents + stage.skip * fade**3 * gap
        if stage.low:
            rough = pack(pipe, coarse(unpack(pipe, gap, size), before), gap)
            moved = moved + stage.low * fade * (1 - stage.skip * fade**3) * rough
        return moved

    changes = clean is not None and (stage.skip > 0 or stage.low > 0)
    own = call_arguments(pipe, stage, steps, seed) | arguments
    with best_backend(pipe), steered(
        pipe, steps, 1.0 if clean is None else stage.strength, shift=stage.shift,
        start=None if clean is None else start, change=change if changes else None, on_step=on_step,
    ) as steering:  # fmt: skip
        latents = pipe(prompt, **own)[0]
    latents = unpack(pipe, latents, size)
    return latents, StageReport(stage, steering.done, steering.level, time.perf_counter() - started)


def _upscale(pipe: Any, clean: Tensor, stage: Stage, grid: tuple[int, int]) -> Tensor:
    if clean.shape[2:] == grid:
        return clean
    if stage.upscale == "latent":
        return resize(clean, grid)
    picture = on_white(decode(pipe.vae, to_vae(pipe.vae, clean)), stage.shape)
    return from_vae(pipe.vae, encode(pipe.vae, picture)).to(clean)


def call_arguments(pipe: Any, stage: Stage, steps: int, seed: int) -> dict[str, Any]:
    """What the pipeline's call is given, as far as it takes it."""
    known, reader = call_defaults(pipe), text_reader(pipe)
    given = {
        "height": stage.shape[0], "width": stage.shape[1], "num_inference_steps": steps, "output_type": "latent",
        "guidance_scale": stage.guidance, "generator": torch.Generator("cpu").manual_seed(seed),
        "use_resolution_binning": False,  # PixArt's, which draws at another size and resizes
        "max_sequence_length": reader.tokens if reader is not None and reader.t5 else None,
    }  # fmt: skip
    if stage.guidance is not None and "guidance_scale" not in known:
        raise ValueError(f"{type(pipe).__name__} does not take guidance_scale.")
    return {name: value for name, value in given.items() if value is not None and name in known}


def _attention(pipe: Any) -> dict[str, Any]:
    """What was applied to the pipeline before: mechanisms and trained weights by layer, for the shelf."""
    found: dict[str, Any] = {}
    for part, model in named_denoisers(pipe).items():
        record = record_of(model)
        if record is None:
            continue
        for name, entry in record.entries.items():
            found[f"{part}.{name}"] = [repr(entry.mechanism.config), _weights(entry.mechanism.state_dict())]
        found[part] = _weights({name: model.get_parameter(name) for name in record.originals})
    return found


def _weights(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Offloaded ones are elsewhere and left out."""
    return {name: digest(x) for name, x in tensors.items() if not x.is_meta}


@contextlib.contextmanager
def _stage_settings(pipe: Any, stage: Stage, first: Stage) -> Iterator[None]:
    """The stage's mechanism and scales, put back to what stood before."""
    with contextlib.ExitStack() as stack:
        if stage.mechanism is not None:
            stack.enter_context(kept(pipe))
            if isinstance(stage.mechanism, (str, Path)):
                load(pipe, stage.mechanism)
            else:
                apply(pipe, stage.mechanism)
        if stage.ntk != 1 or stage.positions != 1:
            stack.enter_context(scale.rotary(pipe, stage.ntk, stage.positions))
        if stage.proportional:
            stack.enter_context(scale.temperature(pipe, scale.proportional(pipe, stage.shape, first.shape)))
        yield
