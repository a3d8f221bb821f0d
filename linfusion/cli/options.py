"""Options that several commands share: which model, which mechanism with which settings."""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

from ..mechanisms import MechanismConfig, config_from_dict, mechanisms

DEFAULT_MODEL = "emoji-flux"
DTYPES = ("float32", "bfloat16", "float16")
ADAPTER_HELP = "a trained adapter: one that ships for an embedded model, such as clear, a folder or a Hub id"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model, --device, --dtype."""
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="NAME",
        help=f"an embedded model, a folder or a Hub id; default the embedded {DEFAULT_MODEL}",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, mps; default cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default bfloat16 on cuda, float32 elsewhere")


def add_mechanism_options(parser: argparse.ArgumentParser, adapters: bool = True) -> None:
    """--mechanism, one option for every setting of every mechanism; with `adapters` --adapter, --untrained."""
    group = parser.add_argument_group("mechanism")
    group.add_argument("--mechanism", metavar="NAME", help=f"{', '.join(mechanisms())}; default the model's own")
    settings: dict[str, list[str]] = {}
    for name, config in mechanisms().items():
        for field in dataclasses.fields(config):
            need = "needed" if field.default is dataclasses.MISSING else f"default {field.default}"
            settings.setdefault(field.name, []).append(f"{name} ({need})")
    for setting, users in settings.items():
        flag = "--" + setting.replace("_", "-")
        group.add_argument(flag, dest=f"set_{setting}", metavar="VALUE", help=f"of {', '.join(users)}")
    if not adapters:
        parser.set_defaults(adapter=None, untrained=False, fuse_prologue=True)
        return
    group.add_argument(
        "--no-fuse-prologue", dest="fuse_prologue", action="store_false",
        help="leave norms and rotation to the model's own code: its bits, and slower where a kernel could do them",
    )  # fmt: skip
    group.add_argument("--adapter", metavar="NAME", help=ADAPTER_HELP)
    group.add_argument("--untrained", action="store_true", help="the adapter's mechanism without its weights")


def chosen_mechanism(args: argparse.Namespace) -> MechanismConfig | None:
    """The config that --mechanism and its settings ask for, None without --mechanism."""
    given = {k.removeprefix("set_"): v for k, v in vars(args).items() if k.startswith("set_")}
    settings = {k: _value(v) for k, v in given.items() if v is not None}
    if args.adapter is not None:
        if args.mechanism is not None or settings:
            raise ValueError("--adapter brings its own mechanism and settings; give one or the other.")
        return None
    if args.untrained:
        raise ValueError("--untrained goes with --adapter.")
    if args.mechanism is None:
        if not args.fuse_prologue:
            raise ValueError("--no-fuse-prologue goes with --mechanism or --adapter.")
        if settings:
            raise ValueError(
                f"--{next(iter(settings)).replace('_', '-')} is a setting of a mechanism: add --mechanism."
            )
        return None
    return config_from_dict({"name": args.mechanism, **settings})


def _value(text: str) -> Any:
    """`8`, `0.5`, `4,8` (one per axis), `none`, `true`, or a word."""
    if "," in text:
        return tuple(_value(part.strip()) for part in text.split(","))
    if text.lower() in ("none", "null"):
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def change(pipe: Any, args: argparse.Namespace, config: MechanismConfig | None) -> None:
    """Put in what --adapter or --mechanism asks for; the model stays as it is without them."""
    from .. import apply, load
    from ..adapter import read_adapter

    if args.adapter is not None:
        source = adapter_source(args.adapter, args.model)
        if args.untrained:
            apply(pipe, read_adapter(source).layers, fuse_prologue=args.fuse_prologue)
        else:
            load(pipe, source, fuse_prologue=args.fuse_prologue)
    elif config is not None:
        apply(pipe, config, fuse_prologue=args.fuse_prologue)


def adapter_source(name: str, model: str) -> str:
    """The folder of an adapter that ships for `model`, else `name` itself, a folder or a Hub id.

    Raises:
        ValueError: it is none of them.
    """
    from ..demos.embedded import adapters

    shipped = adapters(model)
    if name in shipped:
        return str(shipped[name])
    if "/" not in name and not Path(name).exists():
        known = f" ({', '.join(shipped)})" if shipped else ""
        raise ValueError(f"--adapter {name} is no folder here, no Hub id, and none that ships for {model}{known}.")
    return name


def load_pipeline(args: argparse.Namespace) -> Any:
    """The pipeline of --model on --device in --dtype.

    Raises:
        ValueError: there is no such model or device.
    """
    import torch

    device = args.device or _default_device()
    try:
        usable = torch.empty(0, device=device).device.type != "meta"  # which has shapes, but no numbers to draw with
        reason = "it computes nothing"
    except (RuntimeError, AssertionError) as error:
        usable, reason = False, str(error).splitlines()[0]
    if not usable:
        raise ValueError(f"--device {device} cannot be used here: {reason}")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    _quiet()
    from ..demos.embedded import PIPELINES, demo_pipeline

    if args.model in PIPELINES:
        pipe: Any = demo_pipeline(args.model, torch_dtype=dtype)
    else:
        from diffusers import DiffusionPipeline

        _check_source(args.model, list(PIPELINES))
        try:
            pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype)
        except Exception as error:  # loading fails in as many ways as there are broken folders
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"--model {args.model} cannot be loaded: {reason}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _check_source(name: str, embedded: list[str]) -> None:
    """ValueError unless `name` is a folder or may be a Hub id, whose refusal would not speak of folders."""
    path = Path(name)
    if path.is_dir():
        return
    if path.is_file():
        raise ValueError(f"--model {name} is a file; a pipeline is a folder with a model_index.json.")
    if "/" not in name and not name.startswith((".", "~")):
        raise ValueError(f"--model {name} is no embedded model ({', '.join(embedded)}), no folder here and no Hub id.")
    if name.startswith((".", "~")) or path.is_absolute() or name.count("/") != 1 or path.parent.is_dir():
        raise ValueError(f"--model {name}: no such folder.")


def _default_device() -> str:
    """Never mps: the windows compute in float64 without a kernel of their own, which Apple's GPUs lack."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _quiet() -> None:
    """Loading bars and advice of the host libraries are theirs, not this command's."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers|transformers")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
