"""Checks and times cases: ours first against float64, then everybody in the same process."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from . import timing
from .checks import Bound, Expected, check, largest_error
from .op import DIRECTIONS, Bench, Case, Missing, Op, Provider
from .report import OURS, ratios
from .table import Row, Shape, append

ROOT = Path(__file__).parents[2]
MEMORY_LIMIT = 1.05  # of inputs and outputs

Tensors = dict[str, Tensor]


@dataclass
class Session:
    """One run: where it measures, what it leaves out, where results go.

    Attributes:
        say: takes a line for people.
        file: the CSV; None keeps the rows here alone.
        providers, directions: the only ones to time, None for all.
        timed: False checks ours and stops there.
        git: revision of this repository.
        rows, refused: what was measured, and which rows of ours were not written and why.
    """

    device: torch.device
    say: Callable[[str], None]
    file: Path | None = None
    providers: frozenset[str] | None = None
    directions: tuple[str, ...] = DIRECTIONS
    timed: bool = True
    git: str = "unknown"
    copy_gbs: float | None = None
    rows: list[Row] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def wants(self, provider: str) -> bool:
        return self.providers is None or provider in self.providers

    def emit(
        self, op: str, provider: str, direction: str, shape: Shape | str, dtype: torch.dtype,
        times: timing.Times, peak_mib: float,
    ) -> Row:  # fmt: skip
        """Keep one measurement, and write it at once: a run may be cut short."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        row = Row(
            op, provider, direction, str(shape), str(dtype).removeprefix("torch."), *times, peak_mib,
            torch.cuda.get_device_name(self.device), torch.__version__, triton_version(), self.git, now,
        )  # fmt: skip
        self.rows.append(row)
        if self.file is not None:
            append(self.file, row)
        return row

    def refuse(self, what: str, why: str) -> None:
        """A row of ours that will not be written."""
        self.refused.append(what)
        self.say(f"REFUSED {what}: {why}")


def run(ops: Sequence[Bench], cases: Sequence[Case], session: Session) -> None:
    """Measure the cases, op by op."""
    for op in ops:
        mine = [case for case in cases if case.op == op.name]
        if mine:
            op.run(mine, session)


def measure(op: Op, case: Case, session: Session) -> None:
    """Check ours, then time all providers; what fails costs its own rows only."""
    release(session)
    name = f"{op.name} {case.shape}"
    try:
        inputs = op.inputs(case, session.device)
        upstream = op.upstream(case, inputs)
    except Exception as error:
        return session.refuse(name, f"no inputs: {one_line(error)}")
    expected = checked(op, case, session, inputs, upstream) if session.wants(OURS) else None
    if not session.timed:
        return
    for provider, make in _makers(op, case, session).items():
        if provider == OURS and expected is None:
            continue
        try:
            bounds = [Bound(op, case, p, inputs, upstream) for p in make()]
        except Missing as error:
            session.say(f"{name}: {provider} left out, {error}")
            continue
        for direction in (d for d in session.directions if d in case.directions):
            _time(op, case, provider, direction, bounds, expected or [], session)
        del bounds
    for line in ratios(session.rows, op, case, session.copy_gbs):
        session.say(line)


def checked(op: Op, case: Case, session: Session, inputs: Tensors, upstream: Tensors) -> list[Expected] | None:
    """What float64 expects, or None where ours does not compute it."""
    name = f"{op.name} {case.shape}"
    try:
        findings, expected = check(op, case, inputs, upstream)
    except Exception as error:
        session.refuse(name, f"the check broke: {one_line(error)}")
        return None
    wrong = [f for f in findings if not f.passed]
    if wrong:
        session.refuse(name, "; ".join(f"{f.what} error {f.error:.2e} > {f.allowed:.2e}" for f in wrong))
        return None
    nearest = max(findings, key=lambda f: f.error / f.allowed)
    session.say(
        f"{name}: checked, {len(findings)} tensors; nearest to its limit {nearest.what}, "
        f"{nearest.error:.2e} of {nearest.allowed:.2e}"
    )
    return expected


def _time(
    op: Op, case: Case, provider: str, direction: str, bounds: list[Bound], expected: list[Expected], session: Session
) -> None:
    """The rows of one provider; of several ways in several layouts, the fastest counts."""
    taken = []
    for bound in bounds:
        try:
            taken.append((timing.each(bound.ready(direction)), bound))
        except Exception as error:
            _failed(f"{op.name} {case.shape} {direction}", provider, error, session)
    if not taken:
        return
    times, bound = min(taken, key=lambda pair: pair[0])
    try:
        call = torch.no_grad()(bound.forward) if direction == "forward" else bound.both
        held = [*bound.inputs.values(), *(bound.upstream if direction == "backward" else [])]
        peak = timing.peak_mib(call, held)
        needed = timing.storage_bytes([*held, *filter(torch.is_tensor, call())]) / timing.MIB
        session.emit(op.name, provider, direction, case.shape, case.dtype, times, peak)
        compared = expected and direction == "forward" and not bound.provider.other
        wrong = f", error {largest_error(bound, expected):.1e}" if compared else ""
        session.say(
            f"{op.name} {case.shape} {direction} {provider}: {times[0]:.4f} ms, "
            f"memory {peak / needed:.3f} x inputs and outputs{wrong}"
        )
        if provider == OURS and peak > MEMORY_LIMIT * needed:
            session.say(f"MEMORY {op.name} {case.shape} {direction}: {peak:.0f} MiB where {needed:.0f} are needed")
        for suffix, method in (("+graph", timing.graph), ("+loop", _loop)) if case.small else ():
            times = method(lambda: bound.ready(direction))
            session.emit(op.name, provider + suffix, direction, case.shape, case.dtype, times, peak)
    except Exception as error:
        _failed(f"{op.name} {case.shape} {direction}", provider, error, session)


def _loop(ready: Callable[[], Callable[[], object]]) -> timing.Times:
    return timing.loop(ready())


def _failed(what: str, provider: str, error: Exception, session: Session) -> None:
    if provider == OURS:
        session.refuse(what, one_line(error))
    else:
        session.say(f"{what}: {provider} failed, {one_line(error)}")


def warm(op: Op, case: Case, session: Session) -> None:
    """Call everybody once without timing: compilers leave what they made on disk, for a run after this one."""
    release(session)
    inputs = op.inputs(case, session.device)
    upstream = op.upstream(case, inputs)
    for provider, make in _makers(op, case, session).items():
        try:
            for one in make():
                bound = Bound(op, case, one, inputs, upstream)
                for direction in (d for d in session.directions if d in case.directions):
                    bound.ready(direction)()
        except Exception as error:
            session.say(f"warming {op.name} {case.shape}: {provider} failed, {one_line(error)}")


def _makers(op: Op, case: Case, session: Session) -> dict[str, Callable[[], list[Provider]]]:
    everybody = {OURS: lambda: [op.ours(case)], **op.peers(case)}
    return {n: make for n, make in everybody.items() if session.wants(n) and n not in case.skip}


def release(session: Session) -> None:
    """Compiled code of other shapes would be kept, and tried, for every call."""
    torch._dynamo.reset()
    gc.collect()
    if session.device.type == "cuda":
        torch.cuda.empty_cache()


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def revision() -> str:
    """The commit of this checkout, with `+` where its code differs from it; "unknown" where git cannot tell."""
    commands = (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", "*.py"])
    try:
        commit, changes = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True).stdout
            for words in commands
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit.strip() + ("+" if changes.strip() else "")
