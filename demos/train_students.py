"""Train and measure students of an embedded model on one GPU: `python -m linfusion.demos.train_students --help`."""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

import linfusion as lf
from linfusion.adapter import read_adapter
from linfusion.demos.embedded import HOME, PIPELINES, captions, demo_pipeline
from linfusion.demos.emoji.evaluate import top_1
from linfusion.distill import card
from linfusion.distill import config as settings
from linfusion.distill.data.store import Store, write_json, write_text
from linfusion.distill.evaluate import evaluate

RETRIEVAL = "retrieval top-1"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m linfusion.demos.train_students",
        description="Train configs side by side, then draw and measure one after the other. The same command goes on "
        "with what is there.",
    )
    parser.add_argument("names", nargs="*", help="of configs, without the model's name (default all of the model)")
    parser.add_argument("--model", choices=tuple(PIPELINES), default=HOME, help="the teacher (default %(default)s)")
    parser.add_argument("--configs", type=Path, default=Path(settings.__file__).parent / "configs", help="a folder")
    parser.add_argument("--minutes", type=float, help="of training, divided as the config does (default as it says)")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="the teacher's samples, drawn if missing")
    parser.add_argument("--output_dir", type=Path, default=Path("out"), help="(default %(default)s)")
    parser.add_argument("--samples", type=int, help="that the teacher draws (default one for each of its captions)")
    parser.add_argument("--only", choices=("train", "measure"), help="do the other at another time")
    parser.add_argument("--retrieval_data", help="pictures of the teacher's data, for retrieval top-1")
    parser.add_argument("--num_samples", type=int, default=512, help="captions to measure on (default %(default)s)")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="multiples of 256 pixels to draw at")
    parser.add_argument("--last_stage", action="store_true", help="measure only that, and not step 0")
    parser.add_argument("--figures", type=Path, help="folder of figures and sheet (default OUTPUT_DIR)")
    parser.add_argument("--batch", type=int, default=64, help="pictures drawn at a time (default %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="that read data, a student (default %(default)s)")
    parser.add_argument("--steps", type=int, help="of the sampler (default the model's own)")
    args = parser.parse_args(argv)
    try:
        if args.minutes is not None and args.minutes <= 0:
            raise ValueError(f"--minutes must be positive, got {args.minutes:g}")
        configs = _configs(args)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        if args.only != "measure":
            _train(args, configs)
        if args.only != "train":
            _measure(args, list(configs))
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _configs(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The settings that were asked for, by name."""
    read = {path.stem: settings.read_yaml(path) for path in sorted(args.configs.glob("*.yaml"))}
    found = {k.removeprefix(f"{args.model}-"): v for k, v in read.items() if v.get("model") == args.model}
    if unknown := [name for name in args.names if name not in found]:
        raise ValueError(f"no config for {', '.join(unknown)} of {args.model}; there are {', '.join(found)}")
    if not found:
        raise ValueError(f"{args.configs} has no config of {args.model}")
    names = args.names or list(found)
    return {name: _settings(args, found[name]) for name in names}


def _settings(args: argparse.Namespace, content: dict[str, Any]) -> dict[str, Any]:
    """A config for this command: pictures during training would take time from it."""
    stages = content["stages"]
    if args.minutes is not None:
        share = args.minutes / sum(stage["max_train_minutes"] for stage in stages)
        stages = [stage | {"max_train_minutes": share * stage["max_train_minutes"]} for stage in stages]
    return content | {"stages": stages, "dataloader_num_workers": args.workers, "validation_prompts": []}


def _train(args: argparse.Namespace, configs: dict[str, dict[str, Any]]) -> None:
    started = time.monotonic()
    if not _sampled(args.data_dir):
        _sample(args)
        print(f"sampled: {time.monotonic() - started:.0f} s", flush=True)
    files = {name: args.output_dir / f"{name}.yaml" for name in configs}
    for name, file in files.items():
        if not file.is_file():
            write_text(file, yaml.safe_dump(configs[name], sort_keys=False))
    _together(args, {name: _command(args, file, name) for name, file in files.items()})
    print(f"trained: {time.monotonic() - started:.0f} s", flush=True)


def _sampled(folder: Path) -> bool:
    try:
        return len(Store(folder)) > 0
    except ValueError:
        return False


def _sample(args: argparse.Namespace) -> None:
    command = ["sample", "--model", args.model, "--output_dir", args.data_dir, "--sample_batch_size", args.batch]
    for flag, value in (("--num_inference_steps", args.steps), ("--num_samples", args.samples)):
        command += [] if value is None else [flag, value]
    _together(args, {"sample": command})


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


def _measure(args: argparse.Namespace, names: list[str]) -> None:
    """Step 0 and the adapter of every stage against the teacher: together, and beside each last adapter its own."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = demo_pipeline(args.model, dtype=torch.bfloat16 if device == "cuda" else torch.float32).to(device)
    measures = {RETRIEVAL: top_1(args.retrieval_data, device)} if args.retrieval_data else {}
    # those that the teacher was measured on
    order = torch.randperm(len(captions()), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [captions()[i] for i in order[: args.num_samples]]
    config = settings.EvalConfig(
        num_samples=args.num_samples, eval_batch_size=args.batch, features="none", num_inference_steps=args.steps,
        scales=args.scales, resolution=pipe.vae.config.sample_size,
    )  # fmt: skip
    last: dict[str, Path] = {}
    students: dict[str, Callable[[Any], Any]] = {}
    for name in names:
        adapters = sorted((args.output_dir / name).glob("*/adapter"))
        if not adapters:
            raise ValueError(f"{args.output_dir / name} holds no adapter; train it first.")
        last[name] = adapters[-1]
        if not args.last_stage:
            layers = read_adapter(adapters[0]).layers
            students[f"{name} untrained"] = lambda pipe, layers=layers: lf.apply(pipe, layers)
        for adapter in adapters[-1:] if args.last_stage else adapters:
            students[f"{name} {adapter.parent.name}"] = lambda pipe, adapter=adapter: lf.load(pipe, adapter)
    folder = args.figures or args.output_dir
    figures = evaluate(pipe, prompts, config, students, folder=folder, measures=measures, on_progress=_say)
    for name, adapter in last.items() if not args.last_stage else ():
        others = tuple(f"{n} " for n in names if n != name)
        own = {
            size: {k.removeprefix(f"{name} "): v for k, v in found.items() if not k.startswith(others)}
            for size, found in figures["sizes"].items()
        }
        write_json(adapter / card.FIGURES, figures | {"sizes": own})
        card.write(adapter)
    text = table(figures, list(students))
    write_text(folder / "table.md", text)
    print(text, flush=True)


def table(figures: dict[str, Any], students: list[str]) -> str:
    """Markdown of `evaluate`'s figures: a row for the teacher at each size, and for each of `students` (labels)."""
    rows = [["pixels", "student", "work left", "top-1", "PSNR"], ["---"] * 5]
    for size, found in figures["sizes"].items():
        rows.append([size, "teacher", "100.0 %", _percent(found.get(f"teacher {RETRIEVAL}")), "-"])
        for label in students:
            work, share = (found.get(f"{label} {name}") for name in ("attention work left", RETRIEVAL))
            rows.append([size, label, _percent(work), _percent(share), f"{found[f'{label} psnr']:.1f} dB"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _say(words: str) -> None:
    print(words, flush=True)


if __name__ == "__main__":
    sys.exit(main())
