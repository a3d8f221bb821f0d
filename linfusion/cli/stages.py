"""What `generate` and `upscale` share: options of the stages, and bars over stages and steps."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command's help need not wait for torch
    from ..pipelines.cascade import Cascade
    from ..pipelines.stages import Stage

NUMBERS = {
    "strength": ("strength", "how far back on the noise schedule a stage begins, 0 to 1"),
    "shift": ("shift", "of flow models' schedules; default the pipeline's own for the size"),
    "skip": ("skip-residual", "0 to 1, how much of the upscaled picture is mixed in at first"),
    "low": ("low-guidance", "0 to 1, how far its coarse part is held, against repeated objects"),
    "ntk": ("ntk", "factor on the base of rotary embeddings"),
    "positions": ("positions", "factor on rotary positions"),
}
"""Setting of a stage: its option and what it is."""


def add_stage_options(parser: argparse.ArgumentParser) -> None:
    """One option for every setting of a stage; a value for all stages, or one for each, separated by commas."""
    group = parser.add_argument_group("stages", "one value for all, or one for each stage after the first, with commas")
    group.add_argument("--stage-steps", metavar="N", type=_values(int), help="steps of a stage; default by strength")
    for name, (flag, text) in NUMBERS.items():
        group.add_argument(f"--{flag}", dest=f"stage_{name}", metavar="VALUE", type=_values(float), help=text)
    group.add_argument("--upscale", choices=("latent", "pixel"), help="what is enlarged between stages")
    group.add_argument("--proportional", action="store_true", default=None, help="attention's temperature by tokens")
    group.add_argument("--stages", metavar="FOLDER", type=Path, help="keep finished stages here, and go on from them")
    group.add_argument("--memory", metavar="SIZE", help="fit into so much GPU memory, such as 24GiB")


def stage_settings(args: argparse.Namespace, own: dict[str, Any], count: int) -> dict[str, list[Any]]:
    """Settings of `count` stages as lists: what was asked for, else what the model says suits it."""
    given = {name: getattr(args, f"stage_{name}") for name in ("steps", *NUMBERS)}
    given |= {"upscale": args.upscale, "proportional": args.proportional}
    settings = own | {name: value for name, value in given.items() if value is not None}
    result = {}
    for name, value in settings.items():
        values = list(value) if isinstance(value, tuple) else [value]
        if len(values) not in (1, count):
            flag = NUMBERS[name][0] if name in NUMBERS else "stage-steps"
            raise ValueError(f"--{flag} has {len(values)} values for {count} stages after the first.")
        result[name] = values * (count if len(values) == 1 else 1)
    return result


def check_no_stages(args: argparse.Namespace) -> None:
    """ValueError for an option of the stages where a picture is drawn at once."""
    flags = {f"stage_{name}": flag for name, (flag, _) in NUMBERS.items()}
    flags |= {"stage_steps": "stage-steps", **{name: name for name in ("upscale", "proportional", "stages", "memory")}}
    given = [f"--{flag}" for name, flag in flags.items() if getattr(args, name) is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)} is for pictures drawn by stages: a --size of at least one and a half times the "
            "model's own, without --direct and --compare."
        )


@contextmanager
def bars(console: Any, plan: Sequence[Stage], first: int | None) -> Iterator[Callable[[int, int, int], None]]:
    """A bar for each stage on standard error; gives the function to call after each step."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
    )  # fmt: skip
    with progress.Progress(*columns, console=console) as bar:
        tasks = [
            bar.add_task(f"{s.shape[1]} x {s.shape[0]}", total=s.steps or (first if i == 0 else None), start=False)
            for i, s in enumerate(plan)
        ]

        def tell(stage: int, done: int, total: int) -> None:
            if done == 1:
                bar.start_task(tasks[stage - 1])
            bar.update(tasks[stage - 1], completed=done, total=total)

        yield tell


def figures(done: Cascade) -> dict[str, Any]:
    """The numbers of --json."""
    height, width = done.stages[-1].stage.shape
    return {
        "width": width,
        "height": height,
        "stages": [
            {
                "size": list(s.stage.shape), "steps": s.steps, "level": s.level, "seconds": s.seconds,
                "resumed": s.resumed, "remarks": list(s.remarks),
            }
            for s in done.stages
        ],
        "decode_seconds": done.decode_seconds,
        "out": str(done.path),
    }  # fmt: skip


def table(done: Cascade) -> Any:
    """One row a stage."""
    from rich.table import Table

    result = Table(title=f"{done.path}, {done.decode_seconds:.1f} s to decode and write")
    for column in ("pixels", "steps", "from noise level", "seconds"):
        result.add_column(column)
    for s in done.stages:
        height, width = s.stage.shape
        seconds = "kept from before" if s.resumed else f"{s.seconds:.1f}"
        result.add_row(f"{width} x {height}", str(s.steps), f"{s.level:.2f}", seconds)
    return result


def _values(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def values(text: str) -> Any:
        return tuple(kind(part) for part in text.split(","))

    values.__name__ = "number or numbers separated by commas"
    return values
