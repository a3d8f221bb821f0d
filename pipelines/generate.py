"""One picture from any pipeline, with its time a step; two pictures side by side."""

from __future__ import annotations

import contextlib
import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


@dataclass(frozen=True)
class Picture:
    """A generated image and the median time of its denoising steps, in seconds."""

    image: Image.Image
    seconds_per_step: float


def size_multiple(pipe: Any) -> int:
    """What height and width must be multiples of, in pixels: the VAE's factor times the denoiser's patch."""
    factor = getattr(pipe, "vae_scale_factor", 8)
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        return factor
    patch = getattr(transformer.config, "patch_size", None) or 1
    packs = "_pack_latents" in dir(type(pipe))  # FLUX-like pipelines fold 2 x 2 latents into a token themselves
    return factor * (2 if packs else int(patch))


def call_defaults(pipe: Any) -> dict[str, Any]:
    """Arguments that the pipeline's call takes, with their defaults; `**kwargs` are those of the class above."""
    known: dict[str, Any] = {}
    for cls in type(pipe).__mro__:
        if "__call__" not in vars(cls):
            continue
        parameters = inspect.signature(cls.__call__).parameters.values()
        for p in parameters:
            if p.kind is not p.VAR_KEYWORD:
                known.setdefault(p.name, p.default)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return known


def refuse_video(pipe: Any) -> None:
    """NotImplementedError for a pipeline that makes videos, with what to do instead."""
    if "num_frames" in call_defaults(pipe):
        raise NotImplementedError(
            f"generate draws one picture, and {type(pipe).__name__} makes videos. In Python: "
            "linfusion.apply(pipe, ...), call the pipeline, and save the frames with diffusers.utils.export_to_video."
        )


def generate(
    pipe: Any,
    prompt: str,
    *,
    size: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> Picture:
    """Draw one picture with a stock pipeline, timing its steps.

    Args:
        pipe: any diffusers text-to-image pipeline with `callback_on_step_end`.
        prompt: not empty.
        size: height and width in pixels; None for the pipeline's own. So for `steps` and `guidance`.
        seed: of the starting noise, drawn on the CPU, so that all devices and mechanisms start alike.
        on_step: called with the number of finished steps.

    Raises:
        ValueError: an empty prompt, a size that the VAE cannot divide, steps below 1.
        NotImplementedError: a video pipeline.
    """
    if not prompt.strip():
        raise ValueError("The prompt is empty; say what to draw.")
    refuse_video(pipe)
    if size is not None and (size % (multiple := size_multiple(pipe)) or size < 1):
        raise ValueError(f"size must be a multiple of {multiple} pixels for this model, got {size}.")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    marks = [_now(pipe)]

    def mark(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        marks.append(_now(pipe))
        if on_step is not None:
            on_step(step + 1)
        return tensors

    given = {
        "height": size, "width": size, "num_inference_steps": steps, "guidance_scale": guidance,
        "generator": torch.Generator("cpu").manual_seed(seed), "callback_on_step_end": mark,
    }  # fmt: skip
    known = call_defaults(pipe)
    if "callback_on_step_end" not in known:
        raise ValueError(f"{type(pipe).__name__} has no callback_on_step_end, which timing and progress need.")
    for name in ("height", "guidance_scale"):
        if given[name] is not None and name not in known:
            raise ValueError(f"{type(pipe).__name__} does not take {name}.")
    with _best_backend(pipe):
        result = pipe(prompt, **{k: v for k, v in given.items() if v is not None and k in known})
    seconds = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    # the first stretch also holds the text encoders, so it only counts when there is no other
    return Picture(result.images[0], statistics.median(seconds[1:] or seconds))


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures in dB; infinite when they are equal."""
    x, y = (np.asarray(i.convert("RGB"), dtype=np.float64) for i in (a, b))
    if x.shape != y.shape:
        raise ValueError(f"The pictures differ in size: {a.size} and {b.size}.")
    error = float(((x - y) ** 2).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def side_by_side(pictures: list[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures in a row, each with its label below it."""
    width, height = pictures[0][1].size
    margin, font = max(18, width // 12), ImageFont.load_default(size=max(11, width // 20))
    sheet = Image.new("RGB", (width * len(pictures), height + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (label, image) in enumerate(pictures):
        sheet.paste(image.convert("RGB"), (i * width, 0))
        draw.text((i * width + width // 2, height + margin // 2), label, fill="black", font=font, anchor="mm")
    return sheet


def _now(pipe: Any) -> float:
    if pipe.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def _best_backend(pipe: Any) -> Iterator[None]:
    """cuDNN's attention first where there is one: on Hopper it is twice as fast as the flash backend."""
    if pipe.device.type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield
