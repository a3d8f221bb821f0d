"""HTML: what the page shows, from what the jobs give. Everything that came in is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from linfusion.describe import Description

from .jobs import Job
from .studio import Drawn


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
        left, right, done = "Waiting", f"{ahead} before you" if ahead else "next", 0.0
    else:
        done = job.done / job.total if job.total else 0.0
        left = job.note or "Starting"
        right = "" if job.seconds_left is None else f"about {duration(job.seconds_left)} left"
    return (
        '<div class="lf-status" role="status">'
        f'<div class="lf-line"><span>{escape(left)}</span><span>{right}</span></div>'
        f'<div class="lf-bar"><div style="width:{done:.1%}"></div></div></div>'
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
