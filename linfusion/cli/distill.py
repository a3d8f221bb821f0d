"""`linfusion distill sample | train | eval`: fit a mechanism to a pipeline from the pipeline's own samples."""

from __future__ import annotations

import argparse
import json
import logging
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..distill.config import EvalConfig, SampleConfig, TrainConfig, fields_of, merge, read_yaml
from .options import ADAPTER_HELP, DTYPES, adapter_source, add_mechanism_options, chosen_mechanism, load_pipeline

EXAMPLE = """example:
  linfusion distill sample --output_dir data --num_samples 512
  linfusion distill train --config distill/configs/clear.yaml --data_dir data --output_dir runs/clear
  linfusion distill eval --adapter runs/clear/end_to_end/adapter --untrained"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "distill",
        help="train a mechanism from a pipeline's own samples",
        description="Make a data set with a pipeline, train a mechanism on it, and measure the result.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="sample | train | eval")
    for name, about, config, run in (
        ("sample", "draw a data set with the teacher, or encode pictures", SampleConfig, _sample),
        ("train", "train a mechanism on it", TrainConfig, _train),
        ("eval", "compare student and teacher", EvalConfig, _eval),
    ):
        part = parts.add_parser(name, help=about, description=about + ".", allow_abbrev=False)
        part.add_argument("--config", metavar="FILE", help="YAML with the same names; flags win over it")
        _add_model(part)
        _add_flags(part, config)
        if name == "train":
            add_mechanism_options(part, adapters=False)
        if name == "eval":
            part.add_argument("--adapter", required=True, help=ADAPTER_HELP)
            part.add_argument("--untrained", action="store_true", help="its mechanism without its weights, too")
        part.set_defaults(run=run)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pretrained_model_name_or_path", "--model", dest="model", metavar="NAME",
        help="an embedded model, a folder or a Hub id; default emoji-flux",
    )  # fmt: skip
    parser.add_argument("--device", help="of sample and eval; accelerate chooses for train")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default bfloat16 on cuda; of train, which has --mixed_precision, float32"
    )


def _add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """A flag for every field, spelled with underscores as in diffusers' scripts, or with hyphens."""
    for name, (field, kind) in fields_of(config).items():
        if name in ("mechanism", "stages"):
            continue
        options = typing.get_args(kind)
        plain = next((o for o in (kind, *options) if o in (int, float, str, bool)), str)
        names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        settings: dict[str, Any] = {"dest": f"of_{name}", "help": field.metadata["help"], "default": None}
        if plain is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            choices = [o for option in (kind, *options) for o in _literals(option)]
            settings |= {"type": plain, "metavar": None if choices else "VALUE"}
            if choices:
                settings["choices"] = choices
            if typing.get_origin(kind) is list:
                settings |= {"nargs": "+", "type": options[0]}
        parser.add_argument(*names, **settings)


def _literals(kind: Any) -> tuple:
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


def _settings(args: argparse.Namespace, config: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the YAML file says, without the model, and what the flags say."""
    file = read_yaml(args.config) if args.config else {}
    model = file.pop("model", file.pop("pretrained_model_name_or_path", None))
    args.model = args.model or model or "emoji-flux"
    flags = {k.removeprefix("of_"): v for k, v in vars(args).items() if k.startswith("of_") and v is not None}
    return file, flags


def _sample(args: argparse.Namespace) -> int:
    config = merge(SampleConfig, *_settings(args, SampleConfig))
    from ..distill.data.sample import read_prompts, sample

    prompts = read_prompts(config.prompts) if config.prompts else []
    if not prompts and config.train_data_dir is None:
        prompts = _built_in(args.model)
        prompts = _spread(prompts, config.num_samples or len(prompts))
    pipe = load_pipeline(args)
    with _progress("samples") as update:
        store = sample(pipe, prompts, config, model=args.model, on_progress=lambda done, total: update(done, total, ""))
    _out({"samples": len(store), "folder": config.output_dir})
    return 0


def _train(args: argparse.Namespace) -> int:
    file, flags = _settings(args, TrainConfig)
    if (chosen := chosen_mechanism(args)) is not None:
        flags["mechanism"] = chosen.to_dict()
    whole = merge(TrainConfig, file, flags)
    from ..distill.train import finished, train

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("linfusion").setLevel(logging.INFO)
    stages = whole.stages or [{}]
    folder, before = Path(whole.output_dir), whole.init_adapter
    adapter: Path | None = None
    configs = []
    for number, changes in enumerate(stages, start=1):
        config = merge(TrainConfig, file, changes, flags, {"stages": []}, where=f"stage {number}")
        configs.append(config)
    for number, config in enumerate(configs, start=1):
        place = folder / f"{number}-{config.stage}" if len(configs) > 1 else folder
        config = merge(TrainConfig, vars(config), {"output_dir": str(place), "init_adapter": before})
        adapter = finished(config) if config.resume_from_checkpoint == "latest" else None
        if adapter is None:
            pipe = load_pipeline(argparse.Namespace(model=args.model, device="cpu", dtype=args.dtype or "float32"))
            with _progress(f"{config.stage}") as update:
                adapter = train(pipe, config, model=args.model, on_progress=update)
        before = str(adapter)
    _out({"adapter": str(adapter)})
    return 0


def _eval(args: argparse.Namespace) -> int:
    config = merge(EvalConfig, *_settings(args, EvalConfig))
    from .. import apply, load
    from ..adapter import read_adapter
    from ..distill.data.sample import read_prompts
    from ..distill.evaluate import evaluate

    source = adapter_source(args.adapter, args.model)
    adapter = read_adapter(source)
    measures = {}
    if config.retrieval_data:
        from ..demos.emoji.evaluate import top_1

        measures["retrieval top-1"] = top_1(config.retrieval_data)
    if config.output_dir is None and (source != args.adapter or not Path(source).is_dir()):
        raise ValueError("Give --output_dir: the adapter is not in a folder of your own.")
    folder = Path(config.output_dir or source)
    prompts = read_prompts(config.prompts) if config.prompts else _spread(_built_in(args.model), config.num_samples)
    pipe = load_pipeline(args)
    students: dict[str, Callable[[Any], Any]] = {}
    if args.untrained:
        students["untrained"] = lambda pipe: apply(pipe, adapter.layers)
    students["student"] = lambda pipe: load(pipe, source)
    with _progress("evaluation") as update:
        figures = evaluate(
            pipe, prompts, config, students, folder=folder, measures=measures,
            on_progress=lambda words: update(0, 0, words),
        )  # fmt: skip
    _out(figures | {"folder": str(folder)})
    return 0


def _built_in(model: str) -> list[str]:
    """The captions that an embedded model was trained on."""
    from ..demos.embedded import PIPELINES, captions

    if model not in PIPELINES:
        raise ValueError(f"--prompts is needed: {model} has no built-in prompts ({', '.join(PIPELINES)} have).")
    return captions()


def _spread(prompts: list[str], count: int) -> list[str]:
    """Evenly chosen, not the first of an alphabetical list."""
    count = min(count, len(prompts))
    return [prompts[(2 * i + 1) * len(prompts) // (2 * count)] for i in range(count)]


def _out(content: dict[str, Any]) -> None:
    from rich.console import Console

    Console().out(json.dumps(content), highlight=False)


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error; of the first process only."""
    from accelerate import PartialState
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(), progress.TimeRemainingColumn(), progress.TextColumn("{task.fields[words]}"),
    )  # fmt: skip
    quiet = not PartialState().is_main_process
    with progress.Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task(name, total=None, words="")
        yield lambda done, total, words: bar.update(task, completed=done, total=total or None, words=words)
