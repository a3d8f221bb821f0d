"""What the stages of a cascade are told, and the folder in which finished ones wait for a run that was cut short."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..apply import Choice
from .facts import call_defaults, check_pipeline, native_size, size_multiple

UPSCALES = ("latent", "pixel")
Size = int | tuple[int, int]


@dataclass(frozen=True)
class Stage:
    """One size of a cascade.

    Args:
        size: of the picture in pixels, one number or height and width.
        steps: denoising steps that are run; None for the pipeline's own number, times `strength` after the first stage.
        strength: how far back on the model's noise schedule the stage begins (`t0 / T` of SDEdit, arXiv 2108.01073; for
            flow models the noise level sigma itself); the first stage of a picture from a prompt begins at 1.
        guidance: guidance scale; None for the pipeline's own.
        mechanism: a mechanism's config, a dict of patterns to configs, or an adapter's folder or Hub id, for this stage
            only; None for what the pipeline came with.
        shift: flow models: `sigma = s u / (1 + (s - 1) u)`; None for the pipeline's own rule for the size.
        upscale: how the stage before is brought to this size: its pixels ("pixel", Lanczos between decoding and
            encoding) or its latents ("latent", bicubic: no decoding, but softer and less clean).
        skip: 0 to 1, how much of the noised upscaled picture is mixed in at first (DemoFusion's skip residual,
            arXiv 2311.16973); it falls as a cosine's cube.
        low: 0 to 1, how far at first the low frequencies, those that the stage before can hold, are pulled to the
            noised upscaled picture's (ILVR, arXiv 2108.02938, fading as a cosine; I-Max, arXiv 2410.07536, does so for
            flows): against repeated objects and blocks far above the trained size.
        ntk: rotary embeddings' base is multiplied by it (CLEAR uses 10); 1 leaves it.
        positions: rotary positions are multiplied by it; the trained size by this one keeps them in the range that the
            model knows (position interpolation, arXiv 2306.15595).
        proportional: multiply attention scores by `sqrt(log N / log N0)` for N tokens where the first stage had N0
            (arXiv 2306.08645).
    """

    size: Size
    steps: int | None = None
    strength: float = 0.3
    guidance: float | None = None
    mechanism: Choice | str | Path | None = None
    shift: float | None = None
    upscale: str = "pixel"
    skip: float = 0.0
    low: float = 0.0
    ntk: float = 1.0
    positions: float = 1.0
    proportional: bool = False

    def __post_init__(self) -> None:
        if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in self.shape):
            raise ValueError(f"size must be a number of pixels, or height and width, got {self.size!r}.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}.")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {self.strength}.")
        if self.upscale not in UPSCALES:
            raise ValueError(f"upscale must be one of {', '.join(UPSCALES)}, got {self.upscale!r}.")
        for name in ("skip", "low"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}.")
        for name in ("ntk", "positions"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}.")

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)  # type: ignore[return-value]

    def to_dict(self) -> dict[str, Any]:
        """Settings that JSON can hold."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        mechanism = self.mechanism
        if isinstance(mechanism, Mapping):
            settings["mechanism"] = {name: str(config) for name, config in mechanism.items()}
        elif mechanism is not None:
            settings["mechanism"] = str(mechanism)
        return settings | {"size": list(self.shape)}


def stages(sizes: Sequence[Size | Stage], **settings: Any) -> list[Stage]:
    """Stages of these sizes; each setting of `Stage` is one value for all, or a list or tuple with one for each.

    Raises:
        ValueError: no sizes, a setting that `Stage` does not have, or as many values as there are no stages.
    """
    if not sizes:
        raise ValueError("A cascade needs at least one size, such as sizes=(1024, 2048).")
    names = [f.name for f in dataclasses.fields(Stage) if f.name != "size"]
    result = [dataclasses.replace(s) if isinstance(s, Stage) else Stage(s) for s in sizes]
    for name, value in settings.items():
        if name not in names:
            raise ValueError(f"Stages have no setting {name!r}; they have {', '.join(names)}.")
        values = list(value) if isinstance(value, (list, tuple)) else [value] * len(result)
        if len(values) != len(result):
            raise ValueError(f"{name} has {len(values)} values for {len(result)} stages.")
        result = [dataclasses.replace(s, **{name: v}) for s, v in zip(result, values, strict=True)]
    return result


def needs_cascade(pipe: Any, size: int | None) -> bool:
    """Whether a picture of `size` is far enough above the model's own to be drawn by stages: half as large again."""
    native = native_size(pipe)
    return size is not None and native is not None and size >= 1.5 * native


def sizes_up_to(start: Size, end: int, multiple: int) -> list[Size]:
    """Sizes from `start`, left out, up to `end` pixels of the longer side, each at most twice the one before.

    Raises:
        ValueError: `end` is not above `start`, or no multiple of what the model's sizes are multiples of.
    """
    if end % multiple:
        raise ValueError(f"size must be a multiple of {multiple} pixels for this model, got {end}.")
    height, width = (start, start) if isinstance(start, int) else start
    longer = max(height, width)
    if end <= longer:
        raise ValueError(f"size must be above the {longer} pixels that there are, got {end}.")
    count = math.ceil(math.log2(end / longer))
    factors = [end / 2**k / longer for k in reversed(range(count))]
    return [(_round(height * f, multiple), _round(width * f, multiple)) for f in factors]


def _round(pixels: float, multiple: int) -> int:
    return max(1, round(pixels / multiple)) * multiple


def check_stages(pipe: Any, plan: Sequence[Stage]) -> None:
    """ValueError for sizes that the pipeline cannot draw or that shrink."""
    check_pipeline(pipe, None)
    multiple = size_multiple(pipe)
    for before, stage in zip((None, *plan), plan, strict=False):
        if any(n % multiple for n in stage.shape):
            raise ValueError(f"sizes must be multiples of {multiple} pixels for this model, got {stage.size}.")
        if before is not None and any(b > n for b, n in zip(before.shape, stage.shape, strict=True)):
            raise ValueError(f"sizes must grow, got {before.size} before {stage.size}.")


def steps_of(pipe: Any, stage: Stage, whole: bool) -> int:
    """How many steps a stage runs; `whole` for one that starts from noise."""
    if stage.steps is not None:
        return stage.steps
    own = call_defaults(pipe).get("num_inference_steps")
    default = own if isinstance(own, int) else 50
    return default if whole else max(2, round(default * stage.strength))


class Shelf:
    """Finished stages in a folder: `stage-N.safetensors`, the clean latents `[1, C, h, w]`, with what made them.

    Args:
        folder: made where it does not exist; None keeps nothing.
        run: what the stages have in common, such as the prompt, as JSON can hold it.

    Raises:
        ValueError: when a stage is asked for that other settings made.
    """

    def __init__(self, folder: str | Path | None, run: dict[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.run = run
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"stage-{number}.safetensors"

    def get(self, number: int, plan: Sequence[Stage]) -> Tensor | None:
        """The latents of stage `number`, from 1, or None."""
        if self.folder is None or not self.path(number).exists():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path(number), "pt") as file:
                made, latents = (file.metadata() or {}).get("made", ""), file.get_tensor("latents")
        except SafetensorError as error:
            raise ValueError(f"{self.path(number)} cannot be read ({error}); remove it.") from None
        if made != self._made(number, plan):
            raise ValueError(f"{self.folder} holds stages of another picture; give another folder or empty it.")
        return latents

    def put(self, number: int, plan: Sequence[Stage], latents: Tensor, preview: Image.Image) -> None:
        """Keep the latents and `stage-N.png`, a small preview."""
        if self.folder is None:
            return
        from safetensors.torch import save_file

        path = self.path(number)
        part = path.with_suffix(".part")
        save_file({"latents": latents.cpu().contiguous()}, part, {"made": self._made(number, plan)})
        preview.save(path.with_suffix(".png"))
        part.replace(path)  # at once: what is there is whole

    def _made(self, number: int, plan: Sequence[Stage]) -> str:
        return json.dumps(self.run | {"stages": [s.to_dict() for s in plan[:number]]}, sort_keys=True)


def digest(value: Any) -> Any:
    """Tells one picture, tensor or setting from another, in JSON."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous().view(torch.uint8).numpy()
    if isinstance(value, (Image.Image, np.ndarray)):
        return hashlib.sha256(value.tobytes()).hexdigest()
    return {k: digest(v) for k, v in value.items()} if isinstance(value, dict) else repr(value)


def on_white(image: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """A picture in RGB at (height, width), transparency on white."""
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    picture = canvas.convert("RGB")
    height, width = shape
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.LANCZOS)
