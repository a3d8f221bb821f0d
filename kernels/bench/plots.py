"""Figures from the CSV alone: time against length, and how near each is to the floor of the bandwidth."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .ceilings import copy_gbs
from .op import DIRECTIONS
from .ops import OPS
from .report import floor_share, is_ours, latest, timer
from .table import Row, Shape, read

CEILING = "ceiling"
COLOURS = ("tab:red", "tab:blue", "tab:green", "tab:orange", "tab:purple", "tab:brown", "tab:gray", "tab:olive")
MARKERS = "osD^v<>P*X"


def draw(file: Path, folder: Path) -> list[Path]:
    """Two PNGs for each op of one GPU in `folder`, that which was measured last; returns them.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the CSV has no rows to draw.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ImportError('Plots need matplotlib: pip install "linfusion[bench]".') from None
    rows = read(file)
    gpu = next((r.gpu for r in reversed(rows)), None)
    rows = latest(r for r in rows if r.gpu == gpu)
    ops = list(dict.fromkeys(r.op for r in rows if r.op != CEILING))
    if not ops:
        raise ValueError(f"{file} has no rows to draw.")
    folder.mkdir(parents=True, exist_ok=True)
    bandwidth = copy_bandwidth(rows)
    drawn = []
    for name in ops:
        mine = [r for r in rows if r.op == name and not timer(r)]
        drawn.append(_times(mine, name, folder / f"bench-{name}.png"))
        if shares(mine, bandwidth):
            drawn.append(_shares(mine, name, bandwidth, folder / f"bench-{name}-floor.png"))
    return drawn


def copy_bandwidth(rows: Iterable[Row]) -> float | None:
    """GB/s of the last large copy among the rows."""
    taken = [r.ms_p50 for r in rows if (r.op, r.provider) == (CEILING, "copy")]
    return copy_gbs(taken[-1]) if taken else None


def series(rows: Iterable[Row], direction: str) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(provider, all of the shape but length and grid) -> (tokens, ms), shortest first."""
    found = defaultdict(list)
    for row in (r for r in rows if r.direction == direction):
        shape = Shape.parse(row.shape)
        rest = re.sub(r"-(S|g|px)\d[\dx]*", "", row.shape)
        found[row.provider, rest].append((shape.tokens, row.ms_p50))
    return {key: sorted(points) for key, points in found.items()}


def shares(rows: Iterable[Row], bandwidth: float | None) -> list[tuple[str, str, float]]:
    """(direction and shape, provider, share of the floor) where the op has a floor."""
    with_share = ((r, floor_share(r, OPS.get(r.op), bandwidth)) for r in rows)
    return [(f"{r.direction} {r.shape}", r.provider, share) for r, share in with_share if share is not None]


def _times(rows: list[Row], name: str, path: Path) -> Path:
    from matplotlib.figure import Figure

    directions = [d for d in DIRECTIONS if any(r.direction == d for r in rows)]
    figure = Figure(figsize=(7 * len(directions), 5), layout="constrained")
    colour, marks = _colours(rows), dict[str, str]()
    for axis, direction in zip(figure.subplots(1, len(directions), squeeze=False)[0], directions, strict=True):
        for (provider, rest), points in series(rows, direction).items():
            mark = marks.setdefault(rest, MARKERS[len(marks) % len(MARKERS)])
            tokens, ms = zip(*points, strict=True)
            axis.loglog(tokens, ms, color=colour[provider], marker=mark, label=f"{provider} {rest}")
        axis.set(title=f"{name}, {direction}, {rows[-1].gpu}", xlabel="tokens", ylabel="milliseconds")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize=6)
    figure.savefig(path, dpi=110)
    return path


def _shares(rows: list[Row], name: str, bandwidth: float | None, path: Path) -> Path:
    from matplotlib.figure import Figure

    bars = shares(rows, bandwidth)
    shapes, names = list(dict.fromkeys(b[0] for b in bars)), list(dict.fromkeys(b[1] for b in bars))
    colour = _colours(rows)
    figure = Figure(figsize=(9, 1 + 0.16 * len(shapes) * (len(names) + 1)), layout="constrained")
    axis: Any = figure.subplots()
    height = 1 / (len(names) + 1)
    for i, provider in enumerate(names):
        mine = {shape: share for shape, p, share in bars if p == provider}
        axis.barh(
            [shapes.index(s) + i * height for s in mine],
            list(mine.values()),
            height,
            color=colour[provider],
            label=provider,
        )
    axis.set_yticks([n + height * (len(names) - 1) / 2 for n in range(len(shapes))], shapes, fontsize=7)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(
        title=f"{name}, {rows[-1].gpu}",
        xlabel=f"least bytes at the speed of a copy ({bandwidth:.0f} GB/s) / time taken",
    )
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    return path


def _colours(rows: Iterable[Row]) -> dict[str, str]:
    """Ours first."""
    names = sorted({r.provider: not is_ours(r) for r in rows}.items(), key=lambda pair: pair[1])
    return {name: COLOURS[i % len(COLOURS)] for i, (name, _) in enumerate(names)}
