"""Pictures of a teacher and its students, from the same prompts and noise, and sheets of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from .probe import call_arguments, generator


@torch.no_grad()
def draw(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    size: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int = 4,
) -> Tensor:
    """Pictures `[N, 3, H, W]` in [0, 1] on the CPU; picture i starts from noise of `seed + i`."""
    arguments = call_arguments(pipe, size, steps, guidance) | {"output_type": "pt"}
    drawn = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        noise = [generator(seed + start + i) for i in range(len(part))]
        drawn.append(pipe(part, generator=noise, **arguments).images.float().cpu().clamp(0, 1))
    return torch.cat(drawn)


@contextmanager
def component(pipe: Any, name: str, module: nn.Module) -> Iterator[None]:
    """The pipeline with another denoiser."""
    before = getattr(pipe, name)
    setattr(pipe, name, module)
    try:
        yield
    finally:
        setattr(pipe, name, before)


def sheet(rows: Sequence[tuple[str, Tensor]], captions: Sequence[str], path: Path, side: int = 128) -> None:
    """Write a PNG: a column for each caption, a labelled row for each set of pictures `[N, 3, H, W]` in [0, 1]."""
    font, line, margin = ImageFont.load_default(size=11), 16, 110
    width, height = margin + side * len(captions), (side + 2) * len(rows) + 2 * line
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    for row, (label, pictures) in enumerate(rows):
        top = row * (side + 2)
        for i, words in enumerate(label.split("\n")):
            pen.text((4, top + side // 2 + line * i), words, fill="black", font=font, anchor="lm")
        for column, picture in enumerate(pictures[: len(captions)]):
            canvas.paste(image(picture).resize((side, side), Image.Resampling.LANCZOS), (margin + column * side, top))
    for column, caption in enumerate(captions):
        left, text = margin + column * side, caption
        while text and font.getlength(text) > side - 4:
            text = text[:-1]
        pen.text((left + 2, height - 2 * line + 2), text, fill="black", font=font)
    part = path.with_name(f".{path.name}")
    canvas.save(part, format="PNG", optimize=True)
    part.replace(path)


def image(pixels: Tensor) -> Image.Image:
    """`[3, H, W]` in [0, 1]."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
