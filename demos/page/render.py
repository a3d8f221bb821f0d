"""HTML, charts and overlays: what the page shows, from what the jobs give. Everything that came in is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from linfusion.describe import Description

from .jobs import Job
from .studio import Drawn, Looked, Measured

HOT = np.array([255, 96, 0], dtype=np.float32)


def error(text: str) -> str:
    return f'<div class="lf-status"><div class="lf-error" role="alert">{escape(text)}</div></div>'


def note(text: str = "") -> str:
    return f'<div class="lf-status lf-note" role="status">{escape(text)}</div>'


def progress(job: Job, ahead: int) -> str:
    """A job's line: its place in the queue, or how far it is and how long it will take."""
    if job.state == "failed":
        return error(job.error)
    if job.state == "cancelled":
        return note("Cancelled.")
    if job.state == "done":
        return note(f"Done in {duration(job.seconds)}.")
    if job.state == "waiting":
        left, right, share = "Waiting", f"{ahead} before you" if ahead else "next", 0.0
    else:
        share = job.done / job.total if job.total else 0.0
        left = job.note or "Starting"
        right = "" if job.seconds_left is None else f"about {duration(job.seconds_left)} left"
    return (
        f'<div class="lf-status" role="status"><div class="lf-line"><span>{escape(left)}</span><span>{right}</span></div>'
        f'<div class="lf-bar"><div style="width:{share:.1%}"></div></div></div>'
    )


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def figures(drawn: Drawn) -> str:
    """A picture's numbers."""
    replaced = 0 if drawn.report is None else drawn.report.replaced
    shown = {
        "Attention": drawn.label,
        "Time a step": step_time(drawn.seconds_per_step),
        "In all": duration(drawn.seconds),
        "Peak memory": memory(drawn.memory),
        "Attention work left": share(drawn.work),
        "Layers replaced": str(replaced),
    }
    return (
        '<dl class="lf-figures">'
        + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in shown.items())
        + "</dl>"
    )


def comparison(drawn: Sequence[Drawn]) -> str:
    rows = [
        [
            d.label, step_time(d.seconds_per_step), duration(d.seconds), memory(d.memory), share(d.work),
            "-" if d.psnr is None else "identical" if math.isinf(d.psnr) else f"{d.psnr:.1f} dB",
        ]
        for d in drawn
    ]  # fmt: skip
    return table(["Attention", "Time a step", "In all", "Peak memory", "Work left", "PSNR"], rows, numbers=1)


def described(report: Description) -> str:
    """`describe` as a table."""
    rows = [
        [
            r.layer, r.mechanism or "-", " x ".join(map(str, r.grid)) if r.grid else "-",
            "-" if r.text is None else str(r.text), str(r.parameters), r.reason,
        ]
        for r in report.layers
    ]  # fmt: skip
    head = f"<p>{escape(report.model)}: {report.replaced} of {len(report.layers)} attention layers replaced, "
    head += f"{share(report.attention_work_left)} of the attention work left.</p>"
    return head + table(["Layer", "Mechanism", "Grid", "Text", "Parameters", "Note"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int | None = None) -> str:
    """Columns from `numbers` on are set to the right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kind = [' class="n"' if numbers is not None and i >= numbers else "" for i in range(len(row))]
        return "".join(f"<{tag}{k}>{escape(c)}</{tag}>" for k, c in zip(kind, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="lf-scroll"><table class="lf-table"><thead><tr>{cells("th", head)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def step_time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def memory(mib: float | None) -> str:
    return "-" if mib is None else f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def distances(looked: Looked, layer: int) -> str:
    """Every head's mean distance by layer: rings are the original's, dots the mechanism's; the chosen layer is marked."""
    groups = looked.distances
    top = max(d for group in groups for row in group for d in row) * 1.1
    count, left, width, height, bottom = len(groups[0]), 34, 640, 190, 26
    span = (width - left - 8) / count

    def y(value: float) -> float:
        return (height - bottom) * (1 - value / top) + 4

    parts = []
    for tick in ticks(top, 4):
        parts.append(f'<line class="axis" x1="{left}" x2="{width}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    x0 = left + layer * span
    parts.append(
        f'<rect x="{x0:.1f}" y="0" width="{span:.1f}" height="{height - bottom + 4}" fill="currentColor" opacity=".07"/>'
    )
    for group, (rows, kind, shift) in enumerate(((groups[0], "a", -0.16), (groups[1], "b", 0.16))):
        for i, row in enumerate(rows):
            for head, value in enumerate(row):
                x = left + (i + 0.5 + shift) * span
                title = f"{looked.original[i].name}, head {head + 1}, {('original', looked.label)[group]}: {value:.1f}"
                parts.append(
                    f'<circle class="{kind}" cx="{x:.1f}" cy="{y(value):.1f}" r="4"><title>{escape(title)}</title></circle>'
                )
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

    parts = []
    for tick in ticks(top, 4):
        parts.append(f'<line class="axis" x1="{left}" x2="{width}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g} s</text>')
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
    return (
        f'<div class="lf-scroll"><svg class="lf-chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></div>"
    )


def ticks(top: float, count: int) -> list[float]:
    """About `count` round numbers from 0 to `top`."""
    step = 10 ** math.floor(math.log10(top / count))
    step *= next(m for m in (1, 2, 5, 10) if top / (step * m) <= count + 0.5)
    return [round(i * step, 10) for i in range(int(top / step) + 1)]


def heat(
    image: Image.Image, weights: Tensor, grid: tuple[int, ...], scale: float, patch: tuple[int, int]
) -> Image.Image:
    """The picture in grey, coloured by `weights` `[N]`: the square root of their share of `scale`; `patch` is framed."""
    rows, columns = grid[-2:]
    size = shown_size(image)
    grey = np.asarray(image.convert("L").resize(size), dtype=np.float32)[..., None] * 0.55 + 90
    share = np.sqrt(np.clip(weights.numpy().reshape(rows, columns) / max(scale, 1e-12), 0, 1))
    mask = np.asarray(Image.fromarray((share * 255).astype(np.uint8)).resize(size, Image.Resampling.NEAREST))
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
