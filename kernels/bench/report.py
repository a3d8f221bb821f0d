"""What rows say next to each other: how much faster than whom, and how near to the floor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from .op import Bench, Case, Op
from .table import Row, Shape

OURS = "linfusion"
TIMERS = ("+graph", "+loop")


class Comparison(NamedTuple):
    """One row of ours and those of the peers, timed alike on the same shape."""

    ours: Row
    peers: dict[str, Row]

    def times_faster(self) -> dict[str, float]:
        return {name: row.ms_p50 / self.ours.ms_p50 for name, row in self.peers.items()}


def is_ours(row: Row) -> bool:
    return row.provider.split("+")[0] == OURS


def timer(row: Row) -> str:
    """How it was timed: "" for each call by itself."""
    return next((t for t in TIMERS if row.provider.endswith(t)), "")


def _place(row: Row) -> tuple[str, ...]:
    return row.op, row.shape, row.direction, row.dtype, row.gpu, timer(row)


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows that measure the same, the last."""
    return list({(*_place(row), row.provider): row for row in rows}.values())


def compare(rows: Iterable[Row]) -> Iterator[Comparison]:
    """Each row of ours with its peers', of the same revision: times move from one run to another."""
    rows = latest(rows)
    for ours in filter(is_ours, rows):
        theirs = (r for r in rows if _place(r) == _place(ours) and r.git == ours.git)
        peers = {r.provider: r for r in theirs if not is_ours(r)}
        yield Comparison(ours, peers)


def floor_share(row: Row, op: Bench | None, copy_gbs: float | None) -> float | None:
    """The time that the bytes alone need at the speed of a copy, as a share of the time taken; None where unknown."""
    if not isinstance(op, Op) or copy_gbs is None:
        return None
    needed = op.floor_bytes(Shape.parse(row.shape), row.direction, getattr(torch, row.dtype))
    return needed / copy_gbs / 1e6 / row.ms_p50


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}".replace("%", " %")


def ratios(rows: list[Row], op: Op, case: Case, copy_gbs: float | None) -> Iterator[str]:
    """A line for each of our rows on this case."""
    for found in compare(r for r in rows if (r.op, r.shape) == (op.name, str(case.shape))):
        faster = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in found.times_faster().items())
        ours, share = found.ours, percent(floor_share(found.ours, op, copy_gbs))
        yield f"  {ours.direction} {ours.provider}: {share} of the copy's bandwidth; faster: {faster or '-'}"


def summary(rows: list[Row], ops: Mapping[str, Bench], copy_gbs: float | None) -> list[tuple[str, ...]]:
    """Cells of a table: op, shape, direction, provider, ms, share of the bandwidth, how much faster than whom."""
    return [
        (
            c.ours.op, c.ours.shape, c.ours.direction, c.ours.provider, f"{c.ours.ms_p50:.4f}",
            percent(floor_share(c.ours, ops.get(c.ours.op), copy_gbs)),
            ", ".join(f"{name.removesuffix(timer(c.ours))} {ratio:.2f} x" for name, ratio in c.times_faster().items()),
        )
        for c in compare(rows)
    ]  # fmt: skip
