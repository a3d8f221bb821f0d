"""`linfusion generate`: a picture from a prompt, with the attention replaced, next to the untouched model's."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .options import EMBEDDED, add_mechanism_options, add_model_options, chosen_mechanism, load_pipeline

EMBEDDED_SIZES = (256, 1024)


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="draw a picture from a prompt",
        description="Draw a picture from a prompt, with the model's attention replaced.",
        allow_abbrev=False,
        epilog='example: linfusion generate "red apple" --mechanism clear --radius 8 --compare --out out.png',
    )
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument("--out", default="out.png", type=Path, help="the image file; its folder must exist")
    parser.add_argument("--compare", action="store_true", help="draw with the original too, side by side, both timed")
    parser.add_argument("--size", type=int, help="height and width in pixels; default the model's own")
    parser.add_argument("--steps", type=int, help="denoising steps; default the model's own")
    parser.add_argument("--guidance", type=float, help="guidance scale; default the model's own")
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise; default 0")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    add_model_options(parser)
    add_mechanism_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = chosen_mechanism(args)
    _check(args, config is not None or args.adapter is not None)

    from rich.console import Console

    from .. import apply, describe, load, restore
    from ..adapter import read_adapter
    from ..pipelines.generate import Picture, generate, psnr, refuse_video, side_by_side, size_multiple

    remarks = Console(stderr=True)
    pipe = load_pipeline(args)
    refuse_video(pipe)
    if args.size is not None and args.size % (multiple := size_multiple(pipe)):
        raise ValueError(f"--size must be a multiple of {multiple} pixels for this model, got {args.size}.")
    unknown = pipe.unknown_words(args.prompt) if hasattr(pipe, "unknown_words") else []
    if unknown:
        remarks.print(f"The embedded model has never seen: {', '.join(unknown)}.", style="yellow")

    adapter = None
    if args.adapter is not None:  # fits or fails before anything slow starts
        adapter = read_adapter(args.adapter)
        load(pipe, args.adapter)
        if args.untrained:
            apply(restore(pipe), adapter.layers)
    elif config is not None:
        apply(pipe, config)
    changed = config is not None or args.adapter is not None
    label = _label(args, config)
    name = config.name if config is not None else None
    if adapter is not None:
        name = "+".join(dict.fromkeys(c.name for c in adapter.layers.values()))

    def draw(title: str, steps: int | None = args.steps) -> Picture:
        with _progress(remarks, title, steps or _default_steps(pipe)) as on_step:
            return generate(
                pipe, args.prompt, size=args.size, steps=steps, guidance=args.guidance, seed=args.seed, on_step=on_step
            )

    if args.compare:
        draw("warm-up", steps=2)
    picture = draw(label)
    report = describe(pipe) if changed else None
    original = None
    if args.compare:
        restore(pipe)
        draw("warm-up", steps=2)
        original = draw("original")
    sheet = picture.image
    if original is not None:
        sheet = side_by_side([("original", original.image), (label, picture.image)])
    sheet.save(args.out)

    quality = None if original is None else psnr(original.image, picture.image)
    figures = {
        "mechanism": name,
        "layers": report.replaced if report else 0,
        "attention_work_left": report.attention_work_left if report else 1.0,
        "seconds_per_step": picture.seconds_per_step,
        "psnr": None if quality is None or math.isinf(quality) else quality,
        "original_seconds_per_step": original.seconds_per_step if original else None,
        "size": picture.image.size[0],
        "out": str(args.out),
    }
    if args.json:
        print(json.dumps(figures))
    else:
        Console().print(_table(label, figures, quality))
    return 0


def _check(args: argparse.Namespace, changed: bool) -> None:
    """All that can be known before the model is loaded."""
    from PIL import Image

    if not args.prompt.strip():
        raise ValueError("The prompt is empty; say what to draw.")
    if not args.out.absolute().parent.is_dir():
        raise ValueError(f"--out: the folder {args.out.absolute().parent} does not exist.")
    if args.out.is_dir() or Image.registered_extensions().get(args.out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out {args.out} must be an image file, such as out.png.")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}.")
    if args.seed < 0:
        raise ValueError(f"--seed must not be negative, got {args.seed}.")
    if args.size is not None:
        low, high = EMBEDDED_SIZES if args.model in EMBEDDED else (1, math.inf)
        if not low <= args.size <= high:
            raise ValueError(f"--size must be between {low} and {high} pixels for {args.model}, got {args.size}.")
    if args.compare and not changed:
        raise ValueError("--compare needs something to compare with: add --mechanism or --adapter.")


def _label(args: argparse.Namespace, config: Any) -> str:
    if args.adapter is not None:
        return f"{Path(args.adapter).name}{', untrained' if args.untrained else ''}"
    return str(config) if config is not None else "original"


def _default_steps(pipe: Any) -> int:
    from ..pipelines.generate import call_defaults

    default = call_defaults(pipe).get("num_inference_steps")
    return default if isinstance(default, int) else 50


@contextmanager
def _progress(console: Any, name: str, steps: int) -> Iterator[Callable[[int], None]]:
    """A bar over the steps on standard error; gives the function to call after each."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=steps)
        yield lambda done: bar.update(task, completed=done)


def _table(label: str, figures: dict[str, Any], quality: float | None) -> Any:
    from rich.table import Table

    table = Table(title=f"{figures['out']}, {figures['size']} x {figures['size']} pixels")
    for column in ("attention", "layers replaced", "work left", "seconds a step", "PSNR"):
        table.add_column(column, overflow="fold")
    if figures["original_seconds_per_step"] is not None:
        table.add_row("original", "0", "100.0 %", f"{figures['original_seconds_per_step']:.4f}", "-")
    work = figures["attention_work_left"]
    table.add_row(
        label,
        str(figures["layers"]),
        "-" if work is None else f"{work:.1%}".replace("%", " %"),
        f"{figures['seconds_per_step']:.4f}",
        "-" if quality is None else "identical" if math.isinf(quality) else f"{quality:.1f} dB",
    )
    return table
