"""Teacher and student on the same prompts and noise: how near the pictures are, and what a step costs."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..apply import restore
from ..describe import describe
from ..pipelines.facts import made_for
from ..pipelines.generate import generate
from . import card
from .config import EvalConfig
from .data.store import write_json
from .metrics import distances, feature_network, lpips, psnr, ssim
from .pictures import draw, sheet

logger = logging.getLogger(__name__)

Measure = Callable[[Tensor, Sequence[str]], float]


def evaluate(
    pipe: Any,
    prompts: Sequence[str],
    config: EvalConfig,
    students: Mapping[str, Callable[[Any], Any]],
    *,
    folder: Path,
    measures: Mapping[str, Measure] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Draw with the teacher and with each student, measure, and write `figures.json`, `sheet.png` and the card.

    Args:
        pipe: the teacher's pipeline; restored in the end.
        students: label to a function that puts the student's attention into the pipeline.
        folder: where the files go.
        measures: more figures by name: a function of pictures `[N, 3, H, W]` in [0, 1] and their prompts.
        on_progress: called with a few words before each part.

    Returns:
        `sizes` by pixels, in each the figures of the teacher and of the students, as in `figures.json`.

    Raises:
        ValueError: no prompts, or settings that the pipeline cannot draw with.
    """
    if not prompts or config.num_samples < 1:
        raise ValueError("There are no prompts to evaluate on.")
    if any(not 0 < s < math.inf for s in config.scales):
        raise ValueError(f"scales must be positive numbers, got {config.scales}.")
    prompts = list(prompts[: config.num_samples])
    say = on_progress or (lambda words: None)
    pipe.set_progress_bar_config(disable=True)
    features = feature_network(config.features, getattr(pipe, "vae", None))
    base = config.resolution or made_for(pipe)
    sizes = [None if base is None else round(base * s) for s in config.scales]
    if base is None and config.scales != [1.0]:
        raise ValueError("Give --resolution: this pipeline does not tell the size that scales are multiples of.")
    settings: dict[str, Any] = {"steps": config.num_inference_steps, "guidance": config.guidance_scale}
    figures: dict[str, Any] = {"prompts": len(prompts), "seed": config.seed, "features": config.features, "sizes": {}}
    rows: list[tuple[str, Tensor]] = []
    folder.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        restore(pipe)
        say(f"teacher at {size or 'its own'} pixels")
        drawing = settings | {"seed": config.seed, "size": size, "batch": config.eval_batch_size}
        theirs = draw(pipe, prompts, **drawing)
        pixels = theirs.shape[-1]
        found: dict[str, Any] = {"teacher seconds a step": _seconds(pipe, prompts[0], size, settings)}
        found |= {f"teacher {name}": measure(theirs, prompts) for name, measure in (measures or {}).items()}
        figures["sizes"][str(pixels)] = found
        rows.append((f"teacher\n{pixels} px", theirs))
        for label, put_in in students.items():
            say(f"{label} at {pixels} pixels")
            put_in(pipe)
            ours = draw(pipe, prompts, **drawing)
            found |= {f"{label} {k}": v for k, v in _compare(theirs, ours, features, pipe.device).items()}
            found[f"{label} seconds a step"] = _seconds(pipe, prompts[0], size, settings)
            found[f"{label} attention work left"] = describe(pipe).attention_work_left
            found |= {f"{label} {name}": measure(ours, prompts) for name, measure in (measures or {}).items()}
            rows.append((f"{label}\n{pixels} px", ours))
            restore(pipe)
            write_json(folder / card.FIGURES, figures)  # who stops a long evaluation keeps what was measured so far
    write_json(folder / card.FIGURES, figures)
    sheet(rows, prompts[:8], folder / card.SHEET)
    if (folder / card.FACTS).is_file():
        card.write(folder)
    return figures


def _compare(theirs: Tensor, ours: Tensor, features: Any, device: torch.device) -> dict[str, float | None]:
    """PSNR is the mean over pictures, equal ones counted as 100 dB."""
    near: list[float] = []
    alike = 0.0
    for parts in zip(theirs.split(32), ours.split(32), strict=True):  # in float64, many times their memory
        a, b = (part.to(device) for part in parts) if device.type == "cuda" else parts
        near += [min(p, 100.0) for p in psnr(a, b)]
        alike += ssim(a, b) * len(a)
    found: dict[str, float | None] = {"psnr": statistics.fmean(near), "ssim": alike / len(theirs)}
    if features is not None:
        found["lpips"] = lpips(theirs, ours)
        if len(theirs) > 1:
            found |= distances(theirs, ours, features)
    return found


def _seconds(pipe: Any, prompt: str, size: int | None, settings: Mapping[str, Any]) -> float | None:
    """Median of one picture's steps; None for pipelines that cannot be timed."""
    try:
        steps = min(settings["steps"] or 8, 8)
        return generate(pipe, prompt, size=size, steps=steps, guidance=settings["guidance"]).seconds_per_step
    except ValueError as error:
        logger.info("not timed: %s", error)
        return None
