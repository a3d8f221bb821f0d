"""The command, for `python -m linfusion.kernels.bench` and `linfusion bench` alike: options, lines and tables."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .op import Bench, Case

DESCRIPTION = "Check each kernel against float64, time it next to PyTorch and published kernels, append to a CSV."
HERE = Path(__file__).parent
CHECKOUT = (HERE.parents[1] / "pyproject.toml").is_file()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Everything the command understands."""
    parser.add_argument(
        "--op", action="append", metavar="NAME", help="measure this op only; default all kernels, no models"
    )
    parser.add_argument(
        "--shape", action="append", metavar="TEXT", help="only shapes that contain it, such as S16384-D64"
    )
    parser.add_argument("--provider", action="append", metavar="NAME", help="time this one only, such as linfusion")
    parser.add_argument("--direction", choices=("forward", "backward"), help="default both")
    parser.add_argument(
        "--csv", type=Path, default=HERE / "results.csv" if CHECKOUT else Path("results.csv"), metavar="FILE",
        help="append rows to it; default %(default)s",
    )  # fmt: skip
    parser.add_argument("--log", type=Path, metavar="FILE", help="write all lines there too")
    parser.add_argument("--git", metavar="REVISION", help="of the code, where git cannot tell")
    parser.add_argument("--list", action="store_true", help="list ops and shapes, and measure nothing")
    parser.add_argument("--check", action="store_true", help="check against float64, and time nothing")
    parser.add_argument(
        "--here", nargs="?", const=True, default=None, metavar="FILE",
        help="measure from which size on each kernel pays on this GPU, for the library to choose by; default the "
        "user's cache folder",
    )  # fmt: skip
    parser.add_argument(
        "--plots",
        type=Path,
        metavar="FOLDER",
        help="draw the CSV's rows there, fill the pages' tables, measure nothing",
    )
    parser.add_argument(
        "--warm", metavar="I/N", help="compile the I-th of N parts and stop; N such processes share out the waiting"
    )


def run(args: argparse.Namespace) -> int:
    """0 when all rows of ours were written, 1 when one was refused.

    Raises:
        ValueError: an unknown op or shape, no CUDA GPU.
        ImportError: matplotlib or triton are needed and missing.
    """
    from rich.console import Console

    from ..backend import use_backend
    from .ops import OPS, chosen

    ops, cases = chosen(args.op or (list(OPS) if args.list else None), args.shape)
    if args.list:
        Console().print(
            _table(("op", "shape", "directions"), ((c.op, str(c.shape), " ".join(c.directions)) for c in cases))
        )
        return 0
    if args.plots is not None:
        from .pages import fill
        from .plots import draw

        for path in [*draw(args.csv, args.plots), *fill(args.csv, args.plots)]:
            Console().out(str(path), highlight=False)
        return 0
    with ExitStack() as open_files:
        open_files.enter_context(use_backend("triton"))  # the kernels are measured, not the choice
        return _measure(args, ops, cases, _speaker(args.log, open_files))


def _measure(args: argparse.Namespace, ops: list[Bench], cases: list[Case], say: Callable[[str], None]) -> int:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("measuring needs a CUDA GPU, and torch sees none here; --list and --plots work without.")
    if torch.version.hip is None:
        _need_triton()

    from rich.console import Console

    from . import ceilings, here
    from .op import DIRECTIONS, Op
    from .ops import OPS
    from .report import summary
    from .runner import Session, revision, run, triton_version, warm

    session = Session(
        torch.device("cuda"), say, args.csv,
        providers=None if args.provider is None else frozenset(args.provider),
        directions=DIRECTIONS if args.direction is None else (args.direction,),
        timed=not args.check, git=args.git or revision(),
    )  # fmt: skip
    logging.getLogger("linfusion").addHandler(_Said(say))  # an op that falls back to PyTorch says so there
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton_version()}, git {session.git}")
    if args.here is not None:
        here.measure(session, None if args.here is True else Path(args.here))
        return 1 if session.refused else 0
    if args.warm is not None:
        part, parts = _part(args.warm)
        for case in cases[part::parts]:
            op = OPS[case.op]
            if isinstance(op, Op):
                warm(op, case, session)
        return 0
    if session.timed:
        ceilings.measure(session)
    run(ops, cases, session)
    columns = ("op", "shape", "direction", "provider", "ms", "of copy", "faster than")
    table = _table(columns, summary(session.rows, OPS, session.copy_gbs))
    Console(width=180).print(table)
    if args.log is not None:
        with args.log.open("a", encoding="utf-8") as file:
            Console(file=file, width=180).print(table)
    for what in session.refused:
        say(f"no row: {what}")
    return 1 if session.refused else 0


class _Said(logging.Handler):
    """Warnings of the library as lines of the log."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        self.say(f"WARNING {record.getMessage()}")


def _need_triton() -> None:
    try:
        import triton.testing  # noqa: F401
    except ImportError:
        raise ImportError("measuring needs triton: pip install triton.") from None


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise ValueError(f"--warm {text} must be I/N, such as 0/8 to 7/8.")
    return int(part), int(parts)


def _speaker(log: Path | None, open_files: ExitStack) -> Callable[[str], None]:
    """Lines on standard error, with the seconds so far, and in the log."""
    from rich.console import Console

    console, start = Console(stderr=True), time.monotonic()
    file = None if log is None else open_files.enter_context(log.open("a", encoding="utf-8"))

    def say(line: str) -> None:
        line = f"[{time.monotonic() - start:4.0f} s] {line}"
        console.out(line, highlight=False)
        if file is not None:
            file.write(line + "\n")
            file.flush()

    return say


def _table(columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Any:
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
