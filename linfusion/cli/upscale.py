"""`linfusion upscale`: a larger picture from one's own, with detail drawn by the model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .options import add_mechanism_options, add_model_options, change, chosen_mechanism, load_pipeline
from .stages import add_stage_options, bars, figures, stage_settings, table


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "upscale",
        help="enlarge a picture of one's own",
        description="Enlarge a picture: upscale, add noise, let the model denoise; at most twice the size at a time.",
        allow_abbrev=False,
        epilog='example: linfusion upscale cat.png "cat face" --size 512 --mechanism clear --radius 8 --out large.png',
    )
    parser.add_argument("picture", type=Path, help="an image file")
    parser.add_argument("prompt", help="what it shows")
    parser.add_argument("--size", type=int, required=True, help="pixels of the longer side")
    parser.add_argument("--out", default="out.png", type=Path, help="the image file; its folder must exist")
    parser.add_argument("--guidance", type=float, help="guidance scale; default the model's own")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; default 0")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    add_stage_options(parser)
    add_model_options(parser)
    add_mechanism_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = chosen_mechanism(args)

    from PIL import Image

    from ..pipelines.facts import check_request, size_multiple
    from ..pipelines.stages import sizes_up_to
    from .generate import check_out

    check_request(args.prompt, args.size, None, args.guidance, args.seed, prefix="--")
    check_out(args.out)
    try:
        with Image.open(args.picture) as opened:
            picture = opened.copy()
    except OSError as error:
        raise ValueError(f"{args.picture} cannot be read as a picture: {error}") from None
    pipe = load_pipeline(args)
    change(pipe, args, config)
    sizes = sizes_up_to((picture.height, picture.width), args.size, size_multiple(pipe))
    return draw_stages(pipe, args, sizes, image=picture)


def draw_stages(pipe: Any, args: argparse.Namespace, sizes: list[Any], **more: Any) -> int:
    """Run the cascade with bars, and print what it did. Without a picture the first size is drawn from noise."""
    from rich.console import Console

    from ..pipelines.cascade import cascade
    from ..pipelines.facts import remarks
    from ..pipelines.stages import stages, steps_of

    drawn = 0 if "image" in more else 1
    own = getattr(pipe, "cascade_settings", {})
    settings = stage_settings(args, own, len(sizes) - drawn)
    plan = stages(sizes[:drawn], steps=args.steps) if drawn else []
    if len(sizes) > drawn:
        plan += stages(sizes[drawn:], **settings)
    console = Console(stderr=True)
    for remark in remarks(pipe, args.prompt, None, args.guidance):
        console.print(remark, style="yellow", markup=False, highlight=False, soft_wrap=True)
    with bars(console, plan, steps_of(pipe, plan[0], whole=drawn == 1)) as tell:
        done = cascade(
            pipe, args.prompt, plan, guidance=args.guidance, seed=args.seed, folder=args.stages, out=args.out,
            memory=args.memory, on_step=tell, **more,
        )  # fmt: skip
    for remark in dict.fromkeys(r for s in done.stages for r in s.remarks):
        console.print(remark, style="yellow", markup=False, highlight=False, soft_wrap=True)
    Console().out(json.dumps(figures(done)), highlight=False) if args.json else Console().print(table(done))
    return 0
