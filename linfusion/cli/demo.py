"""`linfusion demo`: a page in the browser that draws, compares and looks inside."""

from __future__ import annotations

import argparse
import signal
import time
from typing import Any

from .options import add_model_options, load_pipeline


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="open a page that draws, compares and looks inside",
        description="A page in the browser: draw with another attention, compare, look inside. Needs no network.",
        allow_abbrev=False,
    )
    parser.add_argument("--port", type=int, help="default the first free one from 7860 on")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; default %(default)s")
    parser.add_argument("--share", action="store_true", help="a public address for a while, through gradio's servers")
    parser.add_argument(
        "--allow-models", action="store_true",
        help="let visitors load any folder or Hub id; only where you trust all of them",
    )  # fmt: skip
    parser.add_argument("--max-size", type=int, metavar="PIXELS", help="largest height and width that visitors get")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.port is not None and not 0 < args.port < 65536:
        raise ValueError(f"--port must be between 1 and 65535, got {args.port}.")
    try:
        from ..demos.page.app import serve
    except ImportError as error:
        if not (error.name or "").startswith("gradio"):
            raise
        raise ImportError("linfusion demo needs gradio: pip install 'linfusion[demo]'.") from None
    from rich.console import Console

    from ..demos.page.studio import Studio

    def load(name: str) -> Any:
        return load_pipeline(argparse.Namespace(**vars(args) | {"model": name}))

    studio = Studio(load(args.model), args.model, load if args.allow_models else None, args.max_size)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # containers end it so, and the files have to go
    with serve(studio, host=args.host, port=args.port, share=args.share) as (address, _):
        Console().out(f"linfusion demo: {address} (Ctrl+C ends it)", highlight=False)
        while True:
            time.sleep(3600)
