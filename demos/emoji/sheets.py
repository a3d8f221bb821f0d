"""Contact sheets: small PNGs of pictures with their captions."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

UNSEEN = [
    "blue apple",
    "green heart with arrow",
    "red car",
    "purple cat face",
    "robot firefighter",
    "pink rocket",
    "cat with sunglasses",
    "yellow book",
    "panda wearing hat",
    "orange crystal ball",
    "smiling strawberry",
    "black dog face",
    "man zombie construction worker",
    "house with snow",
    "green octopus",
    "crying pizza",
]


def sheet(rows: list[torch.Tensor], captions: list[str], path: Path, columns: int = 8, side: int = 96) -> None:
    """Write a sheet of cells, each one picture of every row side by side over its caption.

    Args:
        rows: pictures `[N, 3, H, W]` in [-1, 1], e.g. of the data and of the model.
        captions: N of them.
        path: where the PNG goes.
    """
    line, gap = 12, 6
    font = ImageFont.load_default(size=10)
    width, height = len(rows) * side + gap, side + 2 * line + gap
    lines = -(-len(captions) // columns)
    canvas = Image.new("RGB", (columns * width, lines * height), "white")
    pen = ImageDraw.Draw(canvas)
    for number, caption in enumerate(captions):
        left, top = number % columns * width, number // columns * height
        for place, pictures in enumerate(rows):
            canvas.paste(_picture(pictures[number], side), (left + place * side, top))
        for row, text in enumerate(_wrap(caption, font, width - gap)):
            pen.text((left + 2, top + side + row * line), text, fill="black", font=font)
    canvas.save(path, optimize=True)


def _picture(pixels: torch.Tensor, side: int) -> Image.Image:
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array).resize((side, side), Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """At most two lines."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:2]
