"""`linfusion describe`: which layers of a model a mechanism replaces, and why not the others."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .options import add_mechanism_options, add_model_options, change, chosen_mechanism, load_pipeline


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "describe", help="list a model's attention layers and what would replace them", allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_model_options(parser)
    add_mechanism_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = chosen_mechanism(args)

    from rich.console import Console

    from .. import describe

    pipe = load_pipeline(args)
    change(pipe, args, config)
    report = describe(pipe)
    if args.json:
        Console().out(json.dumps(report.to_dict()), highlight=False)
    else:
        Console().print(report)
    return 0
