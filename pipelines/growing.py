"""One generation on a growing grid: early steps, which only lay out the picture, cost a quarter on half the grid.

At a switch the latents' spectrum is kept and finer frequencies are filled with noise of the same level. On `s` times
the grid a frequency's amplitude grows `s` times, its noise with it, while unit noise on the finer grid has amplitude
one: against the picture the old frequencies are noisier by `s`. In a flow, where latents are
`(1 - sigma) x + sigma noise`, that is the level `sigma* = s sigma / (1 + (s - 1) sigma)`, the very shift of arXiv
2403.03206, eq. 23, so the schedule goes on from `sigma*` and all frequencies agree.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cascade import Cascade, StageReport, call_arguments
from .generate import best_backend
from .latents import dct_resize, pack, to_vae, unpack
from .schedule import check_scheduler, steered
from .stages import Size, Stage, check_stages, stages, steps_of
from .vae import decode


@torch.no_grad()
def grow(
    pipe: Any,
    prompt: str | None,
    sizes: Sequence[Size],
    switches: Sequence[float],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    arguments: dict[str, Any] | None = None,
    on_step: Callable[[int, int, int], None] | None = None,
) -> Cascade:
    """Draw one picture, its first steps on coarser grids.

    Args:
        pipe: a flow-matching text-to-image pipeline of diffusers.
        sizes: in pixels, growing, the last is the picture's.
        switches: the noise levels at which to go on with the next size, falling; one fewer than sizes.
        steps: of all sizes together; None for the pipeline's own.
        arguments, on_step, seed: as for `cascade`.

    Raises:
        ValueError: another kind of scheduler, or switches that do not fit.
    """
    plan = stages(list(sizes), guidance=guidance)
    check_stages(pipe, plan)
    check_scheduler(pipe.scheduler, flow=True)
    levels = [1.0, *switches]
    if len(levels) != len(plan) or any(not 0 < b < a for a, b in zip(levels, levels[1:], strict=False)):
        raise ValueError(f"switches must fall from 1 towards 0, one fewer than sizes, got {list(switches)}.")
    left, begin, level = steps_of(pipe, Stage(plan[0].shape, steps=steps), whole=True), 1.0, 1.0
    result, size, latents = Cascade(torch.empty(0)), plan[0].shape, None
    for number, (stage, stop) in enumerate(zip(plan, [*switches, 0.0], strict=True), 1):
        start = None
        if latents is not None:
            finer = math.sqrt(math.prod(stage.shape) / math.prod(size))
            begin = matched_level(level, finer)
            start = functools.partial(_start, pipe, latents, level, stage.shape)

        def tell(done: int, total: int, number: int = number) -> None:
            if on_step is not None:
                on_step(number, done, total)

        own = call_arguments(pipe, stage, left, seed + number - 1) | dict(arguments or {})
        started = time.perf_counter()
        with best_backend(pipe), steered(pipe, left, begin, stop=stop, start=start, on_step=tell) as steering:
            latents = unpack(pipe, pipe(prompt, **own)[0], stage.shape)
        left = max(1, left - steering.done)
        size, level = stage.shape, stop
        result.stages.append(StageReport(stage, steering.done, steering.level, time.perf_counter() - started))
    assert latents is not None
    result.latents, started = latents, time.perf_counter()
    result.image = decode(pipe.vae, to_vae(pipe.vae, latents))
    result.decode_seconds = time.perf_counter() - started
    return result


def matched_level(level: float, finer: float) -> float:
    """The noise level of a flow's latents once they stand on a grid `finer` times as fine along each side."""
    return finer * level / (1 + (finer - 1) * level)


def to_finer(latents: Tensor, level: float, noise: Tensor) -> Tensor:
    """Latents `[B, C, h, w]` of noise level `level` on the grid of `noise` `[B, C, H, W]`, at the matched level."""
    height, width = noise.shape[2:]
    after = matched_level(level, math.sqrt(height * width / (latents.shape[2] * latents.shape[3])))
    factor = (1 - after) / (1 - level)
    return factor * dct_resize(latents, (height, width), noise * (after / factor))


def _start(pipe: Any, latents: Tensor, level: float, shape: tuple[int, int], noise: Tensor, scheduler: Any) -> Tensor:
    return pack(pipe, to_finer(latents, level, unpack(pipe, noise, shape).to(latents)), noise)
