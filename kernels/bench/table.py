"""Rows of measurements in a CSV, and the shapes in it: what was measured, where, with which code."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """`[B, S, H, D]` and what the op needs besides: `B1-H24-S16896-D128-g128x128-t512`.

    Attributes:
        batch, heads, tokens, dim: S counts text tokens too.
        settings: letters and values: `g` the token grid, `t` text tokens, `c` the side of a convolution's kernel,
            `r` the radius of a window, `a` agents; True stands for a word alone.
    """

    batch: int
    heads: int
    tokens: int
    dim: int
    settings: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        parts = [f"B{self.batch}", f"H{self.heads}", f"S{self.tokens}", f"D{self.dim}"]
        return "-".join(parts + [key + _text(value) for key, value in self.settings])

    @classmethod
    def parse(cls, text: str) -> Shape:
        """The inverse of `str`; ValueError for anything else."""
        found = re.fullmatch(r"B(\d+)-H(\d+)-S(\d+)-D(\d+)((?:-[a-z]+[\d.x]*)*)", text)
        if found is None:
            raise ValueError(f"{text!r} is no shape such as B1-H24-S16896-D128-g128x128.")
        settings = []
        for part in found[5].split("-")[1:]:
            key = re.match("[a-z]+", part)[0]  # type: ignore[index]  # the pattern above has seen to it
            settings.append((key, _value(part[len(key) :])))
        batch, heads, tokens, dim = (int(n) for n in found.groups()[:4])
        return cls(batch, heads, tokens, dim, tuple(settings))

    def get(self, key: str, default: Any = None) -> Any:
        """The setting of that name."""
        return dict(self.settings).get(key, default)

    @property
    def elements(self) -> int:
        return self.batch * self.heads * self.tokens * self.dim


def _text(value: Any) -> str:
    if value is True:
        return ""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _value(text: str) -> Any:
    if not text:
        return True
    if "x" in text:
        return tuple(int(n) for n in text.split("x"))
    return float(text) if "." in text else int(text)


class Row(NamedTuple):
    """One measurement.

    Attributes:
        op, provider: what is computed, by whom; a suffix of the provider tells another way to time (`timing.py`).
        direction: "forward" or "backward".
        shape, dtype: of the inputs, `str(Shape)` and as `torch` calls it.
        ms_p50, ms_p20, ms_p80: quantiles of the milliseconds a call takes.
        peak_mib: MiB that one call holds at its worst, its inputs and outputs included; for "backward" of forward and
            backward together, as training holds it.
        gpu, torch, triton, git: device, versions, revision of this repository.
        date: ISO, with time, UTC.
    """

    op: str
    provider: str
    direction: str
    shape: str
    dtype: str
    ms_p50: float
    ms_p20: float
    ms_p80: float
    peak_mib: float
    gpu: str
    torch: str
    triton: str
    git: str
    date: str


COLUMNS = Row._fields
NUMBERS = ("ms_p50", "ms_p20", "ms_p80", "peak_mib")


def append(path: Path, row: Row) -> None:
    """Write one row behind the others, on disk when this returns; the first brings the header.

    Raises:
        ValueError: the file has other columns.
    """
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        _check_header(path)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        writer.writerow(f"{x:.5g}" if n in NUMBERS else x for n, x in zip(COLUMNS, row, strict=True))


def read(path: Path) -> list[Row]:
    """All rows; ValueError where the columns or the numbers are others."""
    _check_header(path)
    with path.open(newline="", encoding="utf-8") as file:
        records = list(csv.reader(file))[1:]
    rows = []
    for line, record in enumerate(records, start=2):
        try:
            cells = zip(COLUMNS, record, strict=True)
            rows.append(Row(*(float(x) if n in NUMBERS else x for n, x in cells)))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from None
    return rows


def _check_header(path: Path) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), [])
    if tuple(header) != COLUMNS:
        raise ValueError(f"{path} has the columns {', '.join(header)}; these are needed: {', '.join(COLUMNS)}.")
