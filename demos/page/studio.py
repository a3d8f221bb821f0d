"""What the page's jobs do with the pipeline: draw, compare, look inside, measure. Knows no gradio."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

import linfusion as lf
from linfusion.apply import denoisers
from linfusion.describe import Description
from linfusion.mechanisms import MechanismConfig, config_from_dict
from linfusion.pipelines.facts import (
    call_defaults,
    check_pipeline,
    check_request,
    made_for,
    native_size,
    remarks,
    size_multiple,
)
from linfusion.pipelines.generate import generate, psnr
from linfusion.pipelines.preview import Preview
from linfusion.pipelines.settings import Settings, public_name, save

from .attention import Layer, Step, layers
from .choices import CHOICES, Choice, choices_for
from .jobs import Job
from .memory import Peak

MAX_STEPS = 60
MAX_PROMPT = 1000
"""Characters; more than any text encoder here reads."""


@dataclass(frozen=True)
class Drawn:
    """A picture with its figures. `file` is a PNG with `settings` in it; `work` a share, `memory` in MiB."""

    image: Image.Image
    file: Path
    settings: Settings
    label: str
    seconds_per_step: float
    seconds: float
    memory: float | None
    report: Description | None
    psnr: float | None = None

    @property
    def work(self) -> float | None:
        return 1.0 if self.report is None else self.report.attention_work_left


@dataclass(frozen=True)
class Looked:
    """One step of a drawing: its picture, and every layer's attention, the original's and a mechanism's."""

    image: Image.Image
    label: str
    original: list[Layer]
    changed: list[Layer]
    distances: tuple[list[list[float]], list[list[float]]]
    report: Description


@dataclass(frozen=True)
class Measured:
    """A size in pixels with seconds a step and MiB, of the original and of a mechanism."""

    size: int
    seconds: tuple[float, float]
    memory: tuple[float | None, float | None]


@dataclass
class Studio:
    """One pipeline and what may be asked of it.

    Args:
        pipe: any text-to-image pipeline that linfusion knows.
        model: its name, as `--model` takes it.
        load: opens another model by name; None where visitors may not choose one.
        max_size: largest height and width in pixels; None is the model's own limit, or twice its default.
    """

    pipe: Any
    model: str = "emoji-flux"
    load: Callable[[str], Any] | None = None
    max_size: int | None = None
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="linfusion-demo-")))

    def __post_init__(self) -> None:
        self._learn()

    def _learn(self) -> None:
        """What the pipeline offers: mechanisms, sizes, defaults."""
        pipe = self.pipe
        denoisers(pipe)  # raises for what is no pipeline
        check_pipeline(pipe, None)
        self.choices: dict[str, Choice] = choices_for(pipe)
        defaults = call_defaults(pipe)
        self.size: int = made_for(pipe) or defaults.get("height") or native_size(pipe) or 512
        low, high = getattr(pipe, "size_limits", (min(256, self.size), 2 * self.size))
        self.low, self.high = low, min(high, self.max_size or high)
        self.multiple = math.lcm(size_multiple(pipe), 32)
        self.steps = min(MAX_STEPS, defaults.get("num_inference_steps") or 28)
        guidance = defaults.get("guidance_scale")
        self.guidance = float(guidance) if isinstance(guidance, (int, float)) else None
        self.guidances = getattr(pipe, "guidance_range", (1.0, 15.0))

    def sizes(self) -> list[int]:
        """Heights and widths in pixels that are offered."""
        offered = {self.size} | {s for s in (256, 384, 512, 768, 1024, 1536, 2048) if self.low <= s <= self.high}
        return sorted(s for s in offered if s % self.multiple == 0)

    def check(self, settings: Settings) -> None:
        """Bounds that hold whatever the page sends.

        Raises:
            ValueError: with what would be allowed.
        """
        if not isinstance(settings.prompt, str):
            raise ValueError("The prompt must be text.")
        if len(settings.prompt) > MAX_PROMPT:
            raise ValueError(f"The prompt has {len(settings.prompt)} characters; at most {MAX_PROMPT} are taken.")
        for name in ("size", "steps", "seed"):
            if isinstance(value := getattr(settings, name), bool) or not isinstance(value, int):
                raise ValueError(f"The {name} must be a whole number, got {value!r}.")
        check_request(settings.prompt, settings.size, settings.steps, settings.guidance, settings.seed)
        assert settings.size is not None and settings.steps is not None
        if not self.low <= settings.size <= self.high or settings.size % self.multiple:
            raise ValueError(
                f"The size must be between {self.low} and {self.high} pixels and a multiple of {self.multiple}, "
                f"got {settings.size}."
            )
        if settings.steps > MAX_STEPS:
            raise ValueError(f"At most {MAX_STEPS} steps are drawn here, got {settings.steps}.")
        if settings.guidance is not None and not self.guidances[0] <= settings.guidance <= self.guidances[1]:
            low, high = self.guidances
            raise ValueError(f"The guidance must be between {low:g} and {high:g}, got {settings.guidance:g}.")
        if settings.mechanism is not None and settings.mechanism.get("name") not in self.choices:
            raise ValueError(f"{settings.mechanism.get('name')!r} cannot be used with {self.model}.")

    def remarks(self, settings: Settings) -> list[str]:
        """What will be drawn, but not as asked."""
        return remarks(self.pipe, settings.prompt, settings.size, settings.guidance)

    def draw(self, job: Job, settings: Settings, before: int = 0) -> Drawn:
        """One picture, with previews in `job.partial`; `before` steps of the job were done for others."""
        assert settings.size is not None and settings.steps is not None
        if settings.model != public_name(self.model):
            raise ValueError(f"The model was changed to {public_name(self.model)} meanwhile. Draw again.")
        config = None if settings.mechanism is None else config_from_dict(settings.mechanism)
        label = label_of(config)
        preview, shown, start = Preview(self.pipe, settings.size, settings.size), 0.0, time.monotonic()

        def on_step(done: int) -> None:
            doing = f"step {done} of {settings.steps}" if done != settings.steps else "finishing the picture"
            job.report(before + done, f"{label}: {doing}")

        def on_latents(latents: Any) -> None:
            nonlocal shown
            now = time.monotonic()
            due = now - shown > 0.25
            image = preview(latents, wanted=due)
            if image is not None:
                # at most about a third of the time goes into previews, however slow decoding is
                shown = time.monotonic() + 2 * (time.monotonic() - now)
                job.report(partial=image)

        job.report(before, f"{label}: reading the prompt")
        if config is not None:
            lf.apply(self.pipe, config)
        try:
            peak = Peak(self.pipe.device)
            picture = generate(
                self.pipe, settings.prompt, size=settings.size, steps=settings.steps, guidance=settings.guidance,
                seed=settings.seed, on_step=on_step, on_latents=on_latents,
            )  # fmt: skip
            memory = peak.mib()
            report = lf.describe(self.pipe) if config is not None else None
        finally:
            if config is not None:
                lf.restore(self.pipe)
        file = self._file(settings)
        save(picture.image, file, settings)
        seconds = time.monotonic() - start
        return Drawn(picture.image, file, settings, label, picture.seconds_per_step, seconds, memory, report)

    def compare(self, job: Job, settings: Settings, mechanisms: list[dict[str, Any]]) -> list[Drawn]:
        """The original and each mechanism from the same noise; `job.partial` holds what is finished and the preview."""
        assert settings.steps is not None
        drawn: list[Drawn] = []
        for mechanism in (None, *mechanisms):
            one = self.draw(job, replace(settings, mechanism=mechanism), before=len(drawn) * settings.steps)
            drawn.append(replace(one, psnr=psnr(drawn[0].image, one.image)) if drawn else one)
        return drawn

    def look(self, job: Job, settings: Settings, step: int) -> Looked:
        """The original's drawing, and at its `step` (from 0) the attention of it and of the settings' mechanism."""
        assert settings.mechanism is not None
        config = config_from_dict(settings.mechanism)
        with Step(self.pipe, step) as noted:

            def on_step(done: int) -> None:
                noted.on_step(done)
                job.report(done, f"Drawing: step {done} of {settings.steps}")

            image = generate(
                self.pipe, settings.prompt, size=settings.size, steps=settings.steps, guidance=settings.guidance,
                seed=settings.seed, on_step=on_step,
            ).image  # fmt: skip
        assert noted.arguments is not None
        args, kwargs = noted.arguments
        job.report(note="Reading the attention")
        original, _ = layers(self.pipe, lf.Softmax(), args, kwargs)
        changed, report = layers(self.pipe, config, args, kwargs)
        distances: list[list[list[float]]] = []
        for group in (original, changed):
            distances.append([layer.distance(job.check).tolist() for layer in group])
        return Looked(image, label_of(config), original, changed, (distances[0], distances[1]), report)

    def measure(self, job: Job, settings: Settings, sizes: list[int]) -> list[Measured]:
        """Time and memory of both attentions over sizes; `job.partial` holds what is finished."""
        assert settings.mechanism is not None
        config, rows = config_from_dict(settings.mechanism), []

        def once(size: int) -> tuple[float, float | None]:
            peak = Peak(self.pipe.device)
            picture = generate(self.pipe, settings.prompt, size=size, steps=3, on_step=lambda done: job.check())
            return picture.seconds_per_step, peak.mib()

        for index, size in enumerate(sizes):
            job.report(2 * index, f"{size} x {size}: original")
            exact = once(size)
            job.report(2 * index + 1, f"{size} x {size}: {label_of(config)}")
            with lf.applied(self.pipe, config):
                changed = once(size)
            rows.append(Measured(size, (exact[0], changed[0]), (exact[1], changed[1])))
            job.report(2 * index + 2, partial=list(rows))
        return rows

    def open(self, job: Job, name: str) -> str:
        """Put another model in place of this one."""
        if self.load is None:
            raise ValueError("Another model can only be chosen where the page was started with --allow-models.")
        if not isinstance(name, str) or not 0 < len(name.strip()) <= 200:
            raise ValueError("Give the folder or Hub id of a model.")
        job.report(0, f"Loading {name.strip()}")
        before = self.pipe, self.model
        self.pipe, self.model = self.load(name.strip()), name.strip()
        try:
            self._learn()
        except BaseException:
            self.pipe, self.model = before
            self._learn()
            raise
        return self.model

    def _file(self, settings: Settings) -> Path:
        """A new name, readable where the prompt is; never a path of the visitor's making."""
        words = "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in settings.prompt).split())[:40]
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        return folder / f"{words or 'picture'}-{settings.seed}.png"


def label_of(config: MechanismConfig | None) -> str:
    """As the page shows it."""
    return CHOICES["original"].label if config is None else str(config)
