"""The `linfusion` command: errors in one line, progress and remarks on standard error, results on standard output."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from ..version import __version__


class Parser(argparse.ArgumentParser):
    """Mistakes in one line, as all others; the usage is a word away. Commands become such parsers too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"linfusion: error: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    from . import bench, convert, demo, describe, distill, generate, upscale

    parser = Parser(prog="linfusion", description="Linear and sparse attention for diffusers: try it, measure it.")
    parser.add_argument("--version", action="version", version=f"linfusion {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (generate, upscale, demo, describe, distill, convert, bench):
        module.add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 for input that cannot be served, 130 when interrupted."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, NotImplementedError, ImportError, OSError, MemoryError, FloatingPointError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        _say(f"linfusion: error: {reason}")
        return 2
    except RuntimeError as error:
        if "out of memory" not in str(error).lower():
            raise
        _say("linfusion: error: out of memory; try a smaller --size or --dtype bfloat16.")
        return 2
    except KeyboardInterrupt:
        _say("linfusion: interrupted")
        return 130


def _say(line: str) -> None:
    from rich.console import Console

    Console(stderr=True).out(line, highlight=False)
