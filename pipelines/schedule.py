"""Steering a stock pipeline's schedule from outside: start late, stop early, start from given latents, watch each step.

Every text-to-image pipeline of diffusers asks its scheduler for timesteps, draws noise in `prepare_latents`, and calls
`scheduler.step` once a step, in whatever order. Those three, replaced on the instance for the length of one call, turn
any of them into its own image-to-image pipeline, whatever its latents look like.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Start = Callable[[Tensor, Any], Tensor]
Change = Callable[[Tensor, int], Tensor]
MOST_STEPS = 1000  # of a schedule of which the last few are run; a shifted flow needs many to reach a low level


@dataclass
class Steering:
    """What became of a call: the level that it started from and how many times the scheduler stepped."""

    level: float = 1.0
    total: int = 0
    done: int = 0


@contextmanager
def steered(
    pipe: Any,
    steps: int,
    level: float = 1.0,
    *,
    stop: float = 0.0,
    shift: float | None = None,
    start: Start | None = None,
    change: Change | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Iterator[Steering]:
    """Within the block, a call of `pipe` runs the last `steps` steps of a schedule that begin nearest to `level`.

    Args:
        level: the first timestep as a share of the training schedule: for flow models the noise level sigma itself,
            exactly; for others SDEdit's `t0 / T`, as near as steps of equal size allow. 1.0: the pipeline's own start.
        stop: flow models only: the noise level at which to stop, such as for continuing on another grid.
        shift: flow models only: `sigma = s u / (1 + (s - 1) u)` (arXiv 2403.03206, eq. 23), not the pipeline's own.
        start: `(noise, scheduler) -> latents` to begin with, in the pipeline's own form; default the noise itself.
        change: `(latents after a step, steps done) -> latents`.
        on_step: called with the steps done and their total.

    Raises:
        ValueError: `shift` or `stop` for a scheduler that is not of the flow kind, timesteps given by the caller.
        NotImplementedError: a scheduler whose schedule cannot be cut.
    """
    scheduler, found = pipe.scheduler, Steering()
    check_scheduler(scheduler, flow=shift is not None or stop > 0)
    own = {name: getattr(scheduler, name) for name in ("set_timesteps", "step")}
    own_prepare, own_shift = pipe.prepare_latents, getattr(scheduler, "_shift", None)
    drawn: Tensor | None = None  # where latents come before the schedule, they are filled in once it is known

    @functools.wraps(own["set_timesteps"])
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        given = inspect.signature(own["set_timesteps"]).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        if given.get("timesteps") is not None:
            raise ValueError("timesteps are what the cascade chooses; leave them out.")
        _set_shift(scheduler, given, shift)
        found.level = _set(scheduler, own["set_timesteps"], given, steps, level, stop)
        found.total, found.done = len(scheduler.timesteps), 0
        if drawn is not None and start is not None:
            drawn.copy_(start(_noise(drawn, scheduler), scheduler))

    @functools.wraps(own_prepare)
    def prepare_latents(*args: Any, **kwargs: Any) -> Any:
        nonlocal drawn
        result = own_prepare(*args, **kwargs)
        latents = result[0] if isinstance(result, tuple) else result
        if found.total and start is not None:
            latents.copy_(start(_noise(latents, scheduler), scheduler))
        drawn = latents
        return result

    @functools.wraps(own["step"])
    def step(*args: Any, **kwargs: Any) -> Any:
        result = own["step"](*args, **kwargs)
        found.done += 1
        if change is not None and found.done < found.total:
            if isinstance(result, tuple):
                result = (change(result[0], found.done), *result[1:])
            else:
                result.prev_sample = change(result.prev_sample, found.done)
        if on_step is not None:
            on_step(found.done, found.total)
        return result

    scheduler.set_timesteps, scheduler.step, pipe.prepare_latents = set_timesteps, step, prepare_latents
    try:
        yield found
    finally:
        del scheduler.set_timesteps, scheduler.step, pipe.prepare_latents
        if own_shift is not None:
            scheduler.set_shift(own_shift)


def check_scheduler(scheduler: Any, flow: bool = False) -> None:
    """NotImplementedError for a schedule that cannot be cut; with `flow`, ValueError for one that is no flow."""
    name = type(scheduler).__name__
    if hasattr(scheduler, "sigmas_interpol") or getattr(scheduler.config, "skip_prk_steps", True) is False:
        raise NotImplementedError(
            f"{name}'s schedule cannot be entered in the middle; use another, such as "
            "EulerDiscreteScheduler.from_config(pipe.scheduler.config)."
        )
    if flow and not is_flow(scheduler):
        raise ValueError(f"shift and early stops are for flow-matching schedulers, and this pipeline has {name}.")


def is_flow(scheduler: Any) -> bool:
    """Whether latents are (1 - sigma) x + sigma noise."""
    return hasattr(scheduler, "scale_noise")


def noised(scheduler: Any, clean: Tensor, noise: Tensor, done: int = 0) -> Tensor:
    """`clean` with `noise` at the level of the schedule after `done` steps."""
    time = scheduler.timesteps[done : done + 1].to(clean.device)
    if is_flow(scheduler):
        return scheduler.scale_noise(clean, time, noise)
    return scheduler.add_noise(clean, noise, time)


def _noise(latents: Tensor, scheduler: Any) -> Tensor:
    """Unit noise: pipelines of other schedulers than flows scale what they draw."""
    return latents.clone() if is_flow(scheduler) else latents / scheduler.init_noise_sigma


def _set(scheduler: Any, own: Callable, given: dict[str, Any], steps: int, level: float, stop: float) -> float:
    """Set a schedule whose last `steps` begin nearest to `level`, cut to them; where it begins.

    The level at which the last steps begin falls as the whole schedule grows, so its length is found by bisection.
    """
    begins: dict[int, float] = {}

    def begin(total: int) -> float:
        if total not in begins:
            begins[total] = _set_whole(scheduler, own, given, total, steps)
        return begins[total]

    low = high = steps
    if level < 1:
        try:
            while begin(high) > level and high < MOST_STEPS:
                low, high = high, min(2 * high, MOST_STEPS)
        except ValueError:  # some schedulers know only so many timesteps
            high = low
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if begin(middle) > level else (low, middle)
    total = min((low, high), key=lambda n: abs(begin(n) - level))
    result = _set_whole(scheduler, own, given, total, steps)
    _cut(scheduler, _first(scheduler, total, steps))
    if level < 1 and is_flow(scheduler):  # the sigmas are ours to choose, so the first is exact
        scheduler.sigmas[0], result = level, level
        scheduler.timesteps[0] = level * scheduler.config.num_train_timesteps
    if stop > 0:
        _end(scheduler, stop)
    return result


def _set_whole(scheduler: Any, own: Callable, given: dict[str, Any], total: int, steps: int) -> float:
    """Set a whole schedule of `total` steps; the level at which its last `steps` begin."""
    given = dict(given)
    if given.get("sigmas") is not None:  # as FLUX-like pipelines make them for so many steps
        given["sigmas"] = np.linspace(1.0, 1 / total, total)
        given.pop("num_inference_steps", None)
    else:
        given["num_inference_steps"] = total
    own(**given)
    return float(scheduler.timesteps[_first(scheduler, total, steps)]) / scheduler.config.num_train_timesteps


def _first(scheduler: Any, total: int, steps: int) -> int:
    """Where the last steps begin: a step of a second-order scheduler has two timesteps, but the last one."""
    return 0 if total == steps else len(scheduler.timesteps) - (steps - 1) * scheduler.order - 1


def _cut(scheduler: Any, first: int) -> None:
    if first == 0:
        return
    times = scheduler.timesteps[first:]
    if hasattr(scheduler, "plms_timesteps"):  # PNDM takes its first step twice
        times = torch.cat((times[:2], times[1:]))
    scheduler.timesteps = times
    if isinstance(sigmas := getattr(scheduler, "sigmas", None), Tensor):
        scheduler.sigmas = sigmas[first:]


def _end(scheduler: Any, stop: float) -> None:
    """End at the first level that is not above `stop`, which becomes exactly that."""
    count = max(1, int((scheduler.sigmas[:-1] > stop).sum()))
    scheduler.timesteps = scheduler.timesteps[:count]
    scheduler.sigmas = torch.cat((scheduler.sigmas[:count], scheduler.sigmas.new_tensor([stop])))


def _set_shift(scheduler: Any, given: dict[str, Any], shift: float | None) -> None:
    """Put the wanted shift where the scheduler reads it; keep the pipeline's own from running away.

    FLUX-like pipelines draw a line through the shift's logarithm at two numbers of tokens. Beyond the larger one, what
    the model was made for, that line would give e^45 at 8192 pixels; there the shift grows with the square root of the
    tokens instead (arXiv 2403.03206, eq. 23), which joins the line where it ends.
    """
    config = scheduler.config
    dynamic = bool(getattr(config, "use_dynamic_shifting", False))
    exponential = getattr(config, "time_shift_type", "exponential") == "exponential"
    if shift is not None:
        if not 0 < shift < math.inf:
            raise ValueError(f"shift must be a positive number, got {shift}.")
        if dynamic:
            given["mu"] = math.log(shift) if exponential else shift
        else:
            scheduler.set_shift(shift)
    elif dynamic and exponential and given.get("mu") is not None and given["mu"] > config.max_shift:
        slope = (config.max_image_seq_len - config.base_image_seq_len) / (config.max_shift - config.base_shift)
        tokens = config.base_image_seq_len + (given["mu"] - config.base_shift) * slope
        given["mu"] = config.max_shift + math.log(tokens / config.max_image_seq_len) / 2
