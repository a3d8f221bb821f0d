"""Train and measure students of an embedded model on one GPU: `python -m linfusion.demos.train_students --help`."""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

import linfusion as lf
from linfusion.adapter import read_adapter
from linfusion.demos.embedded import HOME, PIPELINES, captions, demo_pipeline
from linfusion.demos.emoji.evaluate import top_1
from linfusion.distill import config as settings
from linfusion.distill.data.store import write_text
from linfusion.distill.evaluate import evaluate

STUDENTS = ("linfusion", "clear", "sla", "lit", "agent")
TRIAL = 14  # steps after which the trainer tells its speed


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m linfusion.demos.train_students",
        description="Train the committed configs side by side, then draw and measure one after the other. The same "
        "command goes on with what is there.",
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(STUDENTS)} (default all)")
    parser.add_argument("--model", choices=tuple(PIPELINES), default=HOME, help="the teacher (default %(default)s)")
    parser.add_argument("--minutes", type=float, help="of training; the configs' stages are scaled to fit")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="the teacher's samples, drawn if missing")
    parser.add_argument("--output_dir", type=Path, default=Path("out"), help="(default %(default)s)")
    parser.add_argument("--samples", type=int, help="that the teacher draws (default one for each of its captions)")
    parser.add_argument("--configs", type=Path, default=Path(settings.__file__).parent / "configs", help="of training")
    parser.add_argument("--only_train", action="store_true", help="measure another time")
    parser.add_argument("--retrieval_data", help="pictures of the teacher's data, for retrieval top-1")
    parser.add_argument("--num_samples", type=int, default=512, help="captions to measure on (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="pictures drawn at a time (default %(default)s)")
    parser.add_argument("--workers", type=int, default=3, help="that read data, a student (default %(default)s)")
    parser.add_argument("--steps", type=int, help="of the sampler (default the model's own)")
    args = parser.parse_args(argv)
    args.names = args.names or list(STUDENTS)
    try:
        if unknown := set(args.names) - set(STUDENTS):
            raise ValueError(f"no config for {', '.join(sorted(unknown))}; there are {', '.join(STUDENTS)}")
        args.output_dir.mkdir(parents=True, exist_ok=True)
        _train(args)
        if not args.only_train:
            _measure(args)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _train(args: argparse.Namespace) -> None:
    started = time.monotonic()
    sample = ["sample", "--model", args.model, "--output_dir", args.data_dir, "--sample_batch_size", args.batch]
    for flag, value in (("--num_inference_steps", args.steps), ("--num_samples", args.samples)):
        sample += [] if value is None else [flag, value]
    _together(args, {"sample": sample})
    print(f"sampled: {time.monotonic() - started:.0f} s", flush=True)
    files = {name: args.output_dir / f"{name}.yaml" for name in args.names}
    missing = [name for name, file in files.items() if not file.is_file()]
    configs = {name: _read(args, name) for name in missing}
    if missing and args.minutes is not None:
        trials = {name: args.output_dir / f"{name}.trial.yaml" for name in missing}
        for name, file in trials.items():
            _write(file, _with_steps(configs[name], [TRIAL] * len(configs[name]["stages"])))
        _together(args, {f"{n}.trial": _command(args, file, f"{n}.trial") for n, file in trials.items()})
        for name in missing:
            configs[name] = _with_steps(configs[name], _fitting(args, name, configs[name]))
        print(f"speeds known: {time.monotonic() - started:.0f} s", flush=True)
    for name in missing:
        _write(files[name], configs[name])
    _together(args, {name: _command(args, file, name) for name, file in files.items()})
    print(f"trained: {time.monotonic() - started:.0f} s", flush=True)


def _read(args: argparse.Namespace, name: str) -> dict[str, Any]:
    prefix = "" if args.model == HOME else f"{args.model}-"
    return settings.read_yaml(args.configs / f"{prefix}{name}.yaml") | {"dataloader_num_workers": args.workers}


def _with_steps(config: dict[str, Any], steps: list[int]) -> dict[str, Any]:
    """The config with other lengths; pictures only at the end of a stage, since they take time from training."""
    stages = zip(config["stages"], steps, strict=True)
    return config | {"stages": [s | {"max_train_steps": n, "validation_steps": max(n, 100)} for s, n in stages]}


def _fitting(args: argparse.Namespace, name: str, config: dict[str, Any]) -> list[int]:
    """Steps of the stages, in the config's proportion, that take `minutes` at the speed of the trial."""
    seconds = [float(s) for s in re.findall(r"([\d.]+) s a step", _log(args, f"{name}.trial").read_text())]
    steps = [stage["max_train_steps"] for stage in config["stages"]]
    share = 60 * args.minutes / sum(n * s for n, s in zip(steps, seconds, strict=True))
    found = [max(1, round(n * share)) for n in steps]
    print(f"{name}: {seconds} s a step, so {found} steps", flush=True)
    return found


def _command(args: argparse.Namespace, config: Path, name: str) -> list[Any]:
    return ["train", "--config", config, "--data_dir", args.data_dir, "--output_dir", args.output_dir / name]


def _log(args: argparse.Namespace, name: str) -> Path:
    return args.output_dir / f"{name}.log"


def _together(args: argparse.Namespace, commands: dict[str, list[Any]]) -> None:
    """Run `linfusion distill ...` in processes side by side; ValueError with the end of its log if one fails."""
    running = {}
    for name, command in commands.items():
        with _log(args, name).open("w") as log:
            line = [sys.executable, "-m", "linfusion", "distill", *map(str, command)]
            running[name] = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT)
    failed = [name for name, process in running.items() if process.wait() != 0]
    if failed:
        raise ValueError(f"{', '.join(failed)} failed: {_log(args, failed[0]).read_text()[-1000:]}")


def _write(path: Path, config: dict[str, Any]) -> None:
    write_text(path, yaml.safe_dump(config, sort_keys=False))


def _measure(args: argparse.Namespace) -> None:
    """Step 0 and the adapter of every stage against the teacher; figures and sheet go beside the last adapter."""
    import torch

    cuda = torch.cuda.is_available()
    pipe = demo_pipeline(args.model, dtype=torch.bfloat16 if cuda else torch.float32).to("cuda" if cuda else "cpu")
    measures = {"retrieval top-1": top_1(args.retrieval_data)} if args.retrieval_data else {}
    # those that the teacher was measured on
    order = torch.randperm(len(captions()), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [captions()[i] for i in order[: args.num_samples]]
    config = settings.EvalConfig(
        num_samples=args.num_samples, eval_batch_size=args.batch, features="none", num_inference_steps=args.steps
    )
    table = Table(title=f"students of {args.model}, {len(prompts)} captions")
    for column in ("student", "stage", "PSNR", *measures, "attention work left"):
        table.add_column(column)
    for name in args.names:
        adapters = sorted((args.output_dir / name).glob("*/adapter"))
        first = read_adapter(adapters[0])
        students = {"untrained": lambda pipe, layers=first.layers: lf.apply(pipe, layers)}
        for adapter in adapters:
            students[adapter.parent.name] = lambda pipe, adapter=adapter: lf.load(pipe, adapter)
        figures = evaluate(pipe, prompts, config, students, folder=adapters[-1], measures=measures)
        found = next(iter(figures["sizes"].values()))
        table.add_row(name, "teacher", "", *(f"{found[f'teacher {m}']:.1%}" for m in measures), "")
        for label in students:
            shares = [f"{found[f'{label} {m}']:.1%}" for m in measures]
            work = found[f"{label} attention work left"]
            table.add_row("", label, f"{found[f'{label} psnr']:.1f} dB", *shares, "" if work is None else f"{work:.1%}")
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
