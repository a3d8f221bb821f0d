"""How a pipeline calls its denoiser, found out by watching one: so that no file here knows a model family.

The sampler and the trainer need to know which arguments belong to each sample and which to all, what the model is told
of the time, and what its answer means to the scheduler. A short run of the pipeline itself shows all of that.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..apply import named_denoisers
from ..pipelines.facts import call_defaults, made_for, text_reader

Leaves = dict[str, Any]
# what models are told of the scheduler's time t, which runs from 1000 (noise) to 0
CLOCKS: dict[str, Callable[[Any], Any]] = {
    "t": lambda t: t,
    "t/1000": lambda t: t / 1000,
    "1-t/1000": lambda t: 1 - t / 1000,
    "1000-t": lambda t: 1000 - t,
}
TIMES = ("timestep", "t")


class Stop(Exception):
    """Ends a pipeline's call once its denoiser's arguments are known."""


@dataclass
class Step:
    """One step of the sampler: the denoiser's calls, and what the scheduler was given and gave back."""

    calls: list[Leaves] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    time: float = 0.0
    prediction: Tensor | None = None
    latents: Tensor | None = None
    result: Tensor | None = None


@dataclass(frozen=True)
class Convention:
    """What the trainer must know to call the denoiser as the pipeline does.

    Attributes:
        sample, time: names of the two arguments that the trainer makes itself.
        clock: key of `CLOCKS`.
        time_dtype: of that argument.
        sign: -1 where the model answers with the opposite of what its scheduler wants.
        variance: whether the second half of the answer's channels is a variance.
        guided: whether the pipeline runs a second pass without caption; "batch" in one call, "calls" in two, or "".
        rows: arguments with one row for each sample.
        repeated: lists with one and the same entry for each sample.
    """

    sample: str
    time: str
    clock: str
    time_dtype: str
    sign: int
    variance: bool
    guided: str
    rows: list[str]
    repeated: list[str]


def denoiser(pipe: Any) -> tuple[str, nn.Module]:
    """The pipeline's one denoiser and the component's name."""
    found = named_denoisers(pipe)
    if len(found) != 1:
        raise NotImplementedError(
            f"{type(pipe).__name__} has {len(found)} denoisers ({', '.join(found)}); distill one at a time, with a "
            "pipeline that holds only that one."
        )
    return next(iter(found.items()))


def call_arguments(pipe: Any, size: int | None, steps: int | None, guidance: float | None) -> dict[str, Any]:
    """Arguments of the pipeline's call besides prompts and noise, where it takes them."""
    size = size or made_for(pipe)
    given = {"height": size, "width": size, "num_inference_steps": steps, "guidance_scale": guidance}
    known, reader = call_defaults(pipe), text_reader(pipe)
    if reader is not None and reader.t5:
        given["max_sequence_length"] = reader.tokens
    if size is not None:
        given["use_resolution_binning"] = False  # PixArt's, which draws at another size and resizes
    if "num_frames" in known:
        raise NotImplementedError(f"{type(pipe).__name__} makes videos, which distillation does not sample yet.")
    return {k: v for k, v in given.items() if v is not None and k in known}


@torch.no_grad()
def probe(pipe: Any, prompt: str, arguments: dict[str, Any]) -> tuple[Convention, Step]:
    """Watch two calls that stop at the denoiser (one prompt, two prompts) and one run of three steps."""
    one, two = (stopped(pipe, [prompt] * n, arguments)[0] for n in (1, 2))
    steps: list[Step] = []
    quick = arguments | {"num_inference_steps": 3, "output_type": "latent"}
    with watched(pipe, steps):
        pipe([prompt], generator=[generator(0)], **quick)
    step = steps[0]
    if step.latents is None or step.prediction is None or not step.calls:
        raise NotImplementedError(f"{type(pipe).__name__} does not step its scheduler once after each denoiser call.")
    _, model = denoiser(pipe)
    sample, time = _own_names(model, one)
    count = len(step.latents)
    guided = {(1, 2 * count): "batch", (2, count): "calls", (1, count): ""}.get((len(step.calls), len(one[sample])))
    if guided is None or one[sample].shape[1:] != step.latents.shape[1:]:
        raise NotImplementedError(
            f"{type(pipe).__name__} hands its denoiser {tuple(one[sample].shape)} in {len(step.calls)} calls for "
            f"latents {tuple(step.latents.shape)}: neither one pass nor a guided pair."
        )
    rows, repeated = _per_sample(one, two, skip=(sample, time))
    clock = _clock([(s.time, float(s.calls[-1][time].flatten()[-1])) for s in steps])
    answers = [half for output in step.outputs for half in output.split(count)]
    sign, variance = _meaning(answers, step.prediction)
    dtype = str(one[time].dtype).removeprefix("torch.")
    return Convention(sample, time, clock, dtype, sign, variance, guided, rows, repeated), step


def stopped(pipe: Any, prompts: list[str], arguments: dict[str, Any], calls: int = 1) -> list[Leaves]:
    """The denoiser's arguments for these prompts, without running it more often than needed to see them."""
    steps: list[Step] = []
    with watched(pipe, steps, stop_at=calls):
        try:
            pipe(prompts, generator=[generator(0) for _ in prompts], output_type="latent", **arguments)
        except Stop:
            return steps[0].calls
    raise NotImplementedError(f"{type(pipe).__name__} ended without calling its denoiser {calls} times in a step.")


@contextmanager
def watched(pipe: Any, steps: list[Step], stop_at: int | None = None) -> Iterator[None]:
    """Record every step of the pipeline within the block into `steps`."""
    _, model = denoiser(pipe)
    signature = inspect.signature(type(model).forward)
    own_step = pipe.scheduler.step
    fresh = True

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal fresh
        if fresh:
            steps.append(Step())
            fresh = False
        bound = signature.bind(module, *args, **kwargs).arguments
        bound = {k: v for k, v in list(bound.items())[1:] if k != "return_dict"}
        steps[-1].calls.append(flatten(bound | bound.pop("kwargs", {})))
        if stop_at is not None and len(steps[-1].calls) == stop_at:
            raise Stop

    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        steps[-1].outputs.append(output[0] if isinstance(output, tuple) else output.sample)

    @functools.wraps(own_step)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal fresh
        result = own_step(model_output, timestep, sample, *args, **kwargs)
        last, fresh = steps[-1], True
        last.time, last.prediction, last.latents = float(timestep), model_output, sample
        last.result = result[0] if isinstance(result, tuple) else result.prev_sample
        return result

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    pipe.scheduler.step = step
    try:
        yield
    finally:
        del pipe.scheduler.step
        for hook in hooks:
            hook.remove()


def generator(seed: int) -> torch.Generator:
    """On the CPU, so that every device starts alike."""
    return torch.Generator("cpu").manual_seed(seed)


def flatten(arguments: dict[str, Any], above: str = "") -> Leaves:
    """Nested dicts and tuples of tensors as one dict, `a/b` for `{"a": {"b": ...}}`; the rest must fit into JSON."""
    leaves: Leaves = {}
    for name, value in arguments.items():
        path = f"{above}{name}"
        if isinstance(value, dict):
            leaves |= flatten(value, f"{path}/")
        elif isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
            leaves |= flatten({f"#{i}": v for i, v in enumerate(value)}, f"{path}/")
        elif isinstance(value, (Tensor, type(None), bool, int, float, str, tuple, list)):
            leaves[path] = value
        else:
            raise NotImplementedError(f"The denoiser's argument {path} is a {type(value).__name__}: cannot be stored.")
    return leaves


def unflatten(leaves: Leaves) -> dict[str, Any]:
    """The inverse of `flatten`; lists of tensors come back as tuples."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return _tuples(tree)


def _tuples(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    if tree and all(name.startswith("#") for name in tree):
        return tuple(_tuples(tree[f"#{i}"]) for i in range(len(tree)))
    return {name: _tuples(value) for name, value in tree.items()}


def _own_names(model: nn.Module, leaves: Leaves) -> tuple[str, str]:
    sample = list(inspect.signature(type(model).forward).parameters)[1]
    time = next((name for name in TIMES if isinstance(leaves.get(name), Tensor)), None)
    if time is None or not isinstance(leaves.get(sample), Tensor):
        raise NotImplementedError(
            f"{type(model).__name__} takes no tensor {sample} with a tensor {' or '.join(TIMES)}."
        )
    return sample, time


def _per_sample(one: Leaves, two: Leaves, skip: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Which arguments grow with the number of prompts."""
    rows, repeated = [], []
    for path, value in one.items():
        other = two[path]
        if path in skip:
            continue
        if isinstance(value, Tensor) and value.shape != other.shape:
            rows.append(path)
        elif isinstance(value, (list, tuple)) and len(value) != len(other):
            repeated.append(path)
    return rows, repeated


def _clock(pairs: list[tuple[float, float]]) -> str:
    """Within what bf16 rounds away."""
    for name, told in CLOCKS.items():
        if all(abs(told(t) - seen) <= 0.01 * max(abs(told(t)), abs(seen)) + 0.002 for t, seen in pairs):
            return name
    raise NotImplementedError(f"The denoiser is told {pairs[0][1]:g} at time {pairs[0][0]:g}: an unknown clock.")


def _meaning(answers: list[Tensor], prediction: Tensor) -> tuple[int, bool]:
    """Sign of the model's answers against what the scheduler gets, and whether variances follow them.

    Guided pipelines hand on `a + g (b - a)` of two answers: what is fitted is `x a + y b`, and `x + y` has the sign.
    """
    variance = answers[0].ndim > 1 and answers[0].shape[1] == 2 * prediction.shape[1]
    parts = [(a.chunk(2, dim=1)[0] if variance else a).flatten().double() for a in answers]
    wanted = prediction.flatten().double()
    if parts[0].shape != wanted.shape:
        raise NotImplementedError(f"The denoiser answers {tuple(answers[0].shape)} to {tuple(prediction.shape)}.")
    columns = torch.stack(parts, dim=1)
    shares = torch.linalg.pinv(columns) @ wanted
    rest = float((columns @ shares - wanted).norm() / wanted.norm())
    if not rest < 0.3:  # bf16 rounds, and some rescale guidance
        raise NotImplementedError(f"The denoiser's answer is not what its scheduler gets ({rest:.0%} is different).")
    return (1 if shares.sum() > 0 else -1), variance
