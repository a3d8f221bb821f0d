"""`linfusion generate`: a picture from a prompt, with the attention replaced, next to the untouched model's."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..mechanisms import MechanismConfig, config_from_dict
from .options import DEFAULT_MODEL, add_mechanism_options, add_model_options, change, chosen_mechanism, load_pipeline
from .stages import add_stage_options, check_no_stages

if TYPE_CHECKING:  # the command's help need not wait for PIL
    from ..describe import Description
    from ..pipelines.generate import Picture


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="draw a picture from a prompt",
        description="Draw a picture from a prompt, with the model's attention replaced.",
        allow_abbrev=False,
        epilog='example: linfusion generate "red apple" --mechanism clear --radius 8 --compare --out out.png',
    )
    parser.add_argument("prompt", nargs="?", help="what to draw")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="PNG",
        help="draw a picture of this command or of the demo again, with the settings in its file; options given here "
        "come before those",
    )  # fmt: skip
    parser.add_argument("--out", default="out.png", type=Path, help="the image file; its folder must exist")
    parser.add_argument("--compare", action="store_true", help="draw with the original too, side by side, both timed")
    parser.add_argument(
        "--size", type=int,
        help="height and width in pixels; default the model's own, and drawn by stages from one and a half times that",
    )  # fmt: skip
    parser.add_argument("--direct", action="store_true", help="draw any size at once; so does --compare")
    parser.add_argument("--steps", type=int, help="denoising steps; default the model's own")
    parser.add_argument("--guidance", type=float, help="guidance scale; default the model's own")
    parser.add_argument("--seed", type=int, help="of the starting noise; default 0")
    parser.add_argument(
        "--json", action="store_true",
        help="print the figures as one JSON object, by stages those of each; psnr is null "
        "when nothing was compared or the pictures are equal",
    )  # fmt: skip
    add_stage_options(parser)
    add_model_options(parser)
    add_mechanism_options(parser)
    parser.set_defaults(run=run, model=None)


def run(args: argparse.Namespace) -> int:
    config = chosen_mechanism(args)
    config = _resolve(args, config)
    _check(args, config is not None or args.adapter is not None)

    from rich.console import Console

    from .. import describe, restore
    from ..pipelines.facts import check_pipeline, native_size, remarks, size_multiple
    from ..pipelines.generate import generate, psnr, side_by_side
    from ..pipelines.settings import Settings, public_name, save
    from ..pipelines.stages import needs_cascade, sizes_up_to
    from .upscale import draw_stages

    pipe = load_pipeline(args)
    staged = needs_cascade(pipe, args.size) and not (args.compare or args.direct)
    if not staged:
        check_no_stages(args)
    check_pipeline(pipe, None if staged else args.size, prefix="--")
    change(pipe, args, config)
    name, label = _mechanism(pipe), _label(args, config)
    console = Console(stderr=True)
    if staged:
        native = native_size(pipe)
        assert native is not None
        return draw_stages(pipe, args, [native, *sizes_up_to(native, args.size, size_multiple(pipe))])
    for remark in remarks(pipe, args.prompt, args.size, args.guidance):
        console.print(remark, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def draw(title: str, steps: int | None = args.steps) -> Picture:
        with _progress(console, title, steps or _default_steps(pipe)) as on_step:
            return generate(
                pipe, args.prompt, size=args.size, steps=steps, guidance=args.guidance, seed=args.seed, on_step=on_step
            )

    def timed(title: str) -> Picture:
        if args.compare:
            draw("warm-up", steps=2)
        return draw(title)

    picture, original = timed(label), None
    report = describe(pipe) if name is not None else None
    sheet = picture.image
    quality = None
    if args.compare:
        restore(pipe)
        original = timed("original")
        sheet = side_by_side([("original", original.image), (label, picture.image)])
        quality = psnr(original.image, picture.image)
    settings = Settings(
        args.prompt, model=public_name(args.model), mechanism=None if config is None else config.to_dict(),
        adapter=args.adapter and public_name(args.adapter), untrained=args.untrained, fuse_prologue=args.fuse_prologue,
        size=picture.image.width, steps=args.steps, guidance=args.guidance, seed=args.seed,
        dtype=str(pipe.dtype).removeprefix("torch."),
    )  # fmt: skip
    save(sheet, args.out, settings)

    figures = _figures(name, report, picture, original, quality) | {"out": str(args.out)}
    if args.json:
        Console().out(json.dumps(figures), highlight=False)
    else:
        Console().print(_table(label, figures, quality))
    return 0


def _resolve(args: argparse.Namespace, config: MechanismConfig | None) -> MechanismConfig | None:
    """Fill in what was not given: from the picture of --from, else the defaults. Gives the mechanism to use.

    A picture may come from anyone, so the models that it names are only loaded where they ship with the package.
    """
    if args.source is not None:
        from ..demos.embedded import PIPELINES
        from ..pipelines.settings import read

        found = read(args.source)
        own = found.model in PIPELINES
        for option, value, trusted in (("model", found.model, own), ("adapter", found.adapter, False)):
            given = getattr(args, option) is not None or (option == "adapter" and config is not None)
            if value is not None and not given and not trusted:
                raise ValueError(f"{args.source.name} was drawn with --{option} {value}; add that if you trust it.")
        if config is None and args.adapter is None and found.mechanism is not None:
            config = config_from_dict(found.mechanism)
            args.fuse_prologue &= found.fuse_prologue
        args.untrained |= found.untrained and args.adapter is not None
        args.direct |= args.size is None  # pictures that were drawn by stages carry no settings
        for name in ("prompt", "model", "size", "steps", "guidance", "seed", "dtype"):
            if getattr(args, name) is None:
                setattr(args, name, getattr(found, name))
    if args.prompt is None:
        raise ValueError("The prompt is missing; say what to draw, or --from PNG to draw a picture again.")
    args.model, args.seed = args.model or DEFAULT_MODEL, args.seed or 0
    return config


def _check(args: argparse.Namespace, changed: bool) -> None:
    """All that can be known before the model is loaded."""
    from ..pipelines.facts import check_request

    check_request(args.prompt, args.size, args.steps, args.guidance, args.seed, prefix="--")
    check_out(args.out)
    if args.compare and not changed:
        raise ValueError("--compare needs something to compare with: add --mechanism or --adapter.")


def check_out(path: Path) -> None:
    """ValueError for a file that no picture can be written to."""
    from PIL import Image

    if not path.absolute().parent.is_dir():
        raise ValueError(f"--out: the folder {path.absolute().parent} does not exist.")
    if path.is_dir() or Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out {path} must be an image file, such as out.png.")


def _mechanism(pipe: Any) -> str | None:
    """The names of the mechanisms that are in, None for the model's own attention."""
    from ..apply import COMPONENTS, record_of

    # not `denoisers`, which refuses pipelines without one: the pipeline itself tells better what it lacks
    records = [record_of(model) for c in COMPONENTS if (model := getattr(pipe, c, None)) is not None]
    names = [entry.mechanism.config.name for r in records if r is not None for entry in r.entries.values()]
    return "+".join(dict.fromkeys(names)) or None


def _figures(
    name: str | None, report: Description | None, picture: Picture, original: Picture | None, quality: float | None
) -> dict[str, Any]:
    """The numbers of --json, JSON knowing no infinity."""
    return {
        "mechanism": name,
        "layers": report.replaced if report else 0,
        "attention_work_left": report.attention_work_left if report else 1.0,
        "seconds_per_step": picture.seconds_per_step,
        "psnr": None if quality is None or math.isinf(quality) else quality,
        "original_seconds_per_step": original.seconds_per_step if original else None,
        "size": picture.image.size[0],
    }


def _label(args: argparse.Namespace, config: Any) -> str:
    if args.adapter is not None:
        return f"{Path(args.adapter).name}{', untrained' if args.untrained else ''}"
    return str(config) if config is not None else "original"


def _default_steps(pipe: Any) -> int:
    from ..pipelines.facts import call_defaults

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
