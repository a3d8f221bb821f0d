"""One picture from any pipeline, with its time a step; two pictures side by side."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from ..apply import COMPONENTS
from .facts import call_defaults, check_pipeline, check_request, made_for, text_reader


@dataclass(frozen=True)
class Picture:
    """A generated image and the median time of its denoising steps, in seconds."""

    image: Image.Image
    seconds_per_step: float


def generate(
    pipe: Any,
    prompt: str,
    *,
    size: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
    on_latents: Callable[[torch.Tensor], None] | None = None,
) -> Picture:
    """Draw one picture with a stock pipeline, timing its steps.

    Args:
        pipe: any diffusers text-to-image pipeline with `callback_on_step_end`.
        prompt: not empty.
        size: height and width in pixels; None for the model's own. So for `steps` and `guidance`.
        seed: of the starting noise, drawn on the CPU, so that all devices and mechanisms start alike.
        on_step: called with the number of finished steps; what it raises ends the drawing.
        on_latents: called with the latents after each step, in the pipeline's own shape. The time that both take is
            left out of the steps'.

    Raises:
        ValueError: an empty prompt, a size that the VAE cannot divide, steps below 1, guidance that is negative or
            not finite, a seed that does not fit in 64 bits, an argument that the pipeline does not take.
        NotImplementedError: a video pipeline.
    """
    check_request(prompt, size, steps, guidance, seed)
    check_pipeline(pipe, size)
    size = size or made_for(pipe)
    given: dict[str, Any] = {
        "height": size, "width": size, "num_inference_steps": steps, "guidance_scale": guidance,
        "generator": torch.Generator("cpu").manual_seed(seed),
    }  # fmt: skip
    known = call_defaults(pipe)
    if "callback_on_step_end" not in known:
        raise ValueError(f"{type(pipe).__name__} has no callback_on_step_end, which timing and progress need.")
    for name in ("height", "guidance_scale"):
        if given[name] is not None and name not in known:
            raise ValueError(f"{type(pipe).__name__} does not take {name}.")
    reader = text_reader(pipe)
    if reader is not None and reader.t5:  # padding to the pipeline's length would be text that a small model never saw
        given["max_sequence_length"] = reader.tokens
    aside = 0.0
    with best_backend(pipe), _first_call(pipe) as marks:

        def mark(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal aside
            now = _now(pipe)
            marks.append(now - aside)
            if on_step is not None:
                on_step(step + 1)
            if on_latents is not None:
                on_latents(tensors["latents"])
            aside += _now(pipe) - now
            return tensors

        given["callback_on_step_end"] = mark
        result = pipe(prompt, **{k: v for k, v in given.items() if v is not None and k in known})
    seconds = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    # the first step also plans windows and chooses kernels, so it only counts when there is no other
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
def _first_call(pipe: Any) -> Iterator[list[float]]:
    """A list whose first entry becomes the time of the denoiser's first call: the text encoders run before it."""
    marks, started = [_now(pipe)], False

    def start(module: nn.Module, args: Any) -> None:
        nonlocal started
        # a compiled denoiser would trace this, and break its graph at the clock: the first mark is then the start
        if not torch.compiler.is_compiling() and not started:
            marks[0], started = _now(pipe), True

    models = [getattr(pipe, name, None) for name in COMPONENTS]
    hooks = [model.register_forward_pre_hook(start) for model in models if isinstance(model, nn.Module)]
    try:
        yield marks
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def best_backend(pipe: Any) -> Iterator[None]:
    """cuDNN's attention first where there is one: on Hopper it is twice as fast as the flash backend."""
    if pipe.device.type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield
