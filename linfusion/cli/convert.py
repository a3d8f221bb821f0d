"""`linfusion convert`: weights that a mechanism's authors published, as an adapter folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import add_mechanism_options, chosen_mechanism


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "convert", help="turn a mechanism's published weights into an adapter", allow_abbrev=False
    )
    parser.add_argument("source", type=Path, help="a .safetensors file, or a .pth of which only tensors are read")
    parser.add_argument("folder", type=Path, help="where the adapter goes")
    parser.add_argument(
        "--model-class", default="WanTransformer3DModel", metavar="NAME",
        help="the model that they are for, as diffusers calls it; default %(default)s",
    )  # fmt: skip
    add_mechanism_options(parser, adapters=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = chosen_mechanism(args)
    if config is None:
        raise ValueError("convert needs --mechanism and the settings that the weights were trained with.")

    from rich.console import Console

    from ..convert import convert

    found = convert(args.source, args.folder, config, args.model_class)
    Console().out(f"{args.folder}: {found['layers']} layers, {found['host']} parameters of the model", highlight=False)
    return 0
