"""`linfusion bench`: the kernels checked and timed next to what a user would pick instead, on this GPU."""

from __future__ import annotations

from typing import Any

from ..kernels.bench.command import DESCRIPTION, add_options, run


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="check and time the kernels next to their peers",
        description=DESCRIPTION,
        allow_abbrev=False,
        epilog="example: linfusion bench --op linear --shape S16384 --csv results.csv",
    )
    add_options(parser)
    parser.set_defaults(run=run)
