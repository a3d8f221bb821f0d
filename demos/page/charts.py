"""Charts as SVG, and attention over a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from .render import memory, step_time, table
from .studio import Looked, Measured

HOT = np.array([255, 96, 0], dtype=np.float32)


def distances(looked: Looked, layer: int) -> str:
    """Every head's mean distance by layer: rings are the original's, dots the mechanism's; `layer` is marked."""
    groups = looked.distances
    top = max(d for group in groups for row in group for d in row) * 1.1
    count, left, width, height, bottom = len(groups[0]), 34, 640, 190, 26
    span = (width - left - 8) / count

    def y(value: float) -> float:
        return (height - bottom) * (1 - value / top) + 4

    parts = scale(top, y, left, width, "")
    x0, tall = left + layer * span, height - bottom + 4
    parts.append(f'<rect class="chosen" x="{x0:.1f}" y="0" width="{span:.1f}" height="{tall}"/>')
    for group, (rows, kind, shift) in enumerate(((groups[0], "a", -0.16), (groups[1], "b", 0.16))):
        for i, row in enumerate(rows):
            for head, value in enumerate(row):
                x = left + (i + 0.5 + shift) * span
                title = f"{looked.original[i].name}, head {head + 1}, {('original', looked.label)[group]}: {value:.1f}"
                parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y(value):.1f}" r="4">')
                parts.append(f"<title>{escape(title)}</title></circle>")
    every = -(-count // 16)
    parts += [
        f'<text x="{left + (i + 0.5) * span:.1f}" y="{height - 6}" text-anchor="middle">{i + 1}</text>'
        for i in range(0, count, every)
    ]
    return key(looked.label) + svg(width, height, parts, "Mean attention distance of each head, by layer, in patches")


def curves(rows: Sequence[Measured], label: str) -> str:
    """Seconds a step over size, both attentions, with a table that has the memory too."""
    if not rows:
        return ""
    width, height, left, bottom = 640, 220, 52, 30
    top = max(max(r.seconds) for r in rows) * 1.1
    low, high = rows[0].size, max(rows[-1].size, rows[0].size + 1)

    def x(size: float) -> float:
        return left + 14 + (width - left - 40) * (size - low) / (high - low)

    def y(value: float) -> float:
        return (height - bottom) * (1 - value / top) + 4

    parts = scale(top, y, left, width, " s")
    for which, kind in ((0, "a"), (1, "b")):
        points = [(x(r.size), y(r.seconds[which])) for r in rows]
        parts.append(f'<path class="{kind}" d="M{" L".join(f"{a:.1f} {b:.1f}" for a, b in points)}"/>')
        parts += [f'<circle class="{kind}" cx="{a:.1f}" cy="{b:.1f}" r="3.5"/>' for a, b in points]
    parts += [f'<text x="{x(r.size):.1f}" y="{height - 8}" text-anchor="middle">{r.size}</text>' for r in rows]
    numbers = [
        [
            f"{r.size} x {r.size}",
            *map(step_time, r.seconds),
            f"{r.seconds[0] / r.seconds[1]:.2f} x",
            *map(memory, r.memory),
        ]
        for r in rows
    ]
    head = ["Size", "Original, a step", f"{label}, a step", "Speed-up", "Memory, original", f"Memory, {label}"]
    return key(label) + svg(width, height, parts, "Seconds a step over the size in pixels") + table(head, numbers, 1)


def key(label: str) -> str:
    return f'<div class="lf-key"><span><i></i>Original</span><span><i class="b"></i>{escape(label)}</span></div>'


def svg(width: int, height: int, parts: Sequence[str], title: str) -> str:
    head = f'<svg class="lf-chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
    return f'<div class="lf-scroll">{head}{"".join(parts)}</svg></div>'


def scale(top: float, y: Callable[[float], float], left: int, right: int, unit: str) -> list[str]:
    """Lines and numbers from 0 to `top`."""
    parts = []
    for tick in ticks(top, 4):
        parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}{unit}</text>')
    return parts


def ticks(top: float, count: int) -> list[float]:
    """About `count` round numbers from 0 to `top`."""
    step = 10 ** math.floor(math.log10(top / count))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if top / (step * m) <= count + 0.5)
    return [round(i * step, 10) for i in range(int(top / step) + 1)]


def heat(image: Image.Image, weights: Tensor, grid: tuple[int, ...], top: float, patch: tuple[int, int]) -> Image.Image:
    """The picture in grey, coloured by `weights` `[N]`, the root of their share of `top`; `patch` is framed."""
    rows, columns = grid[-2:]
    size = shown_size(image)
    grey = np.asarray(image.convert("L").resize(size), dtype=np.float32)[..., None] * 0.55 + 90
    part = np.sqrt(np.clip(weights.numpy().reshape(rows, columns) / max(top, 1e-12), 0, 1))
    mask = np.asarray(Image.fromarray((part * 255).astype(np.uint8)).resize(size, Image.Resampling.NEAREST))
    alpha = mask.astype(np.float32)[..., None] / 255 * 0.85
    shown = Image.fromarray((grey * (1 - alpha) + HOT * alpha).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(shown)
    high, wide = size[1] / rows, size[0] / columns
    row, column = patch
    box = [column * wide, row * high, (column + 1) * wide - 1, (row + 1) * high - 1]
    draw.rectangle([box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2], outline="black", width=2)
    draw.rectangle(box, outline="white", width=2)
    return shown


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Of the overlay of a picture: small ones are enlarged, so that patches can be hit."""
    factor = max(1, round(512 / max(image.size)))
    return image.width * factor, image.height * factor
