"""What the tabs share: the settings on the left, a mechanism with its sliders, running a job for a visitor."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from linfusion.pipelines.settings import Settings, public_name

from .choices import CONTROLS, ORIGINAL, mechanism
from .jobs import Job, Runner
from .studio import MAX_PROMPT, MAX_STEPS, Studio

NAMES = ("prompt", "size", "steps", "seed", "guidance")
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
"""How all events here are: they show their own progress, are for this page alone, and wait in our own queue."""
EXAMPLES = ["red apple", "rocket", "cat with tears of joy", "man cook dark skin tone", "hot beverage", "sunflower"]


class Shelf:
    """The latest results of the latest visitors; older ones make room."""

    def __init__(self, room: int) -> None:
        self.room, self.kept = room, OrderedDict[str, Any]()

    def put(self, visitor: str, value: Any) -> None:
        self.kept[visitor] = value
        self.kept.move_to_end(visitor)
        while len(self.kept) > self.room:
            self.kept.popitem(last=False)

    def get(self, visitor: str) -> Any:
        return self.kept.get(visitor)

    def drop(self, visitor: str) -> None:
        self.kept.pop(visitor, None)


@dataclass
class Desk:
    """The page's back: one studio, one queue, and what visitors have looked at."""

    studio: Studio
    runner: Runner = field(default_factory=Runner)
    looked: Shelf = field(default_factory=lambda: Shelf(8))
    compared: Shelf = field(default_factory=lambda: Shelf(64))

    def stop(self, request: gr.Request) -> None:
        """End all jobs of who asks."""
        self.runner.leave(str(request.session_hash))

    def leave(self, request: gr.Request) -> None:
        """Forget a visitor who has closed the page."""
        self.stop(request)
        for shelf in (self.looked, self.compared):
            shelf.drop(str(request.session_hash))

    async def follow(self, visitor: str, work: Callable[[Job], Any], total: int) -> AsyncIterator[tuple[Job, int]]:
        """Queue a job and give it, with how many are before it, whenever something changed; the last is finished.

        Whoever stops listening (a closed page) ends the job.

        Raises:
            Busy: the queue is full.
        """
        job = self.runner.submit(visitor, work, total)
        seen: tuple[int, int] | None = None
        try:
            while not job.finished:
                now = job.version, self.runner.ahead(job)
                if now != seen:
                    seen = now
                    yield job, now[1]
                await asyncio.sleep(0.1)
            yield job, 0
        finally:
            self.runner.cancel(job)


def settings_of(studio: Studio, prompt: Any, size: Any, steps: Any, seed: Any, guidance: Any) -> Settings:
    """The form as settings, checked.

    Raises:
        ValueError: with what would be allowed.
    """
    text = str(seed).strip()
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"The seed must be a whole number that is not negative, got {text[:40]!r}.")
    settings = Settings(
        prompt, model=public_name(studio.model), size=size, steps=steps, seed=int(text[:40]),
        guidance=None if studio.guidance is None else guidance, dtype=str(studio.pipe.dtype).removeprefix("torch."),
    )  # fmt: skip
    studio.check(settings)
    return settings


@dataclass
class Form:
    """The settings that all tabs use."""

    prompt: gr.Textbox
    size: gr.Dropdown
    steps: gr.Slider
    seed: gr.Textbox
    guidance: gr.Slider

    @property
    def named(self) -> dict[str, Any]:
        """By the names in an address and in `Settings`."""
        return {name: getattr(self, name) for name in NAMES}

    @property
    def inputs(self) -> list[Any]:
        return list(self.named.values())


def form(studio: Studio) -> Form:
    """Build it, in the column that is open."""
    prompt = gr.Textbox(
        label="What to draw", value=EXAMPLES[0], lines=2, max_lines=4, max_length=MAX_PROMPT, elem_id="prompt"
    )
    with gr.Row(elem_classes="lf-examples"):
        for example in EXAMPLES:
            gr.Button(example, size="sm", min_width=40, scale=0).click(
                None, None, prompt, js=f"() => {json.dumps(example)}", api_visibility="private"
            )
    size = gr.Dropdown(
        [(f"{s} x {s}", s) for s in studio.sizes()], value=studio.size, label="Size in pixels", elem_id="size",
        filterable=False,
    )  # fmt: skip
    seed = gr.Textbox(label="Seed", value="0", max_lines=1, max_length=40, elem_id="seed")
    again = gr.Button("New seed", size="sm", elem_id="new-seed")
    again.click(None, None, seed, js="() => String(Math.floor(Math.random() * 2 ** 32))", api_visibility="private")
    steps = gr.Slider(1, MAX_STEPS, value=studio.steps, step=1, precision=0, label="Steps", elem_id="steps")
    low, high = studio.guidances
    guidance = gr.Slider(
        low, high, value=studio.guidance or low, step=0.1, label="Guidance", info="how closely the prompt is followed",
        visible=studio.guidance is not None, elem_id="guidance",
    )  # fmt: skip
    return Form(prompt, size, steps, seed, guidance)


@dataclass
class Picker:
    """A mechanism and its sliders, of which those show that it has."""

    name: Any
    sliders: dict[str, gr.Slider]
    original: bool
    none: bool

    def offers(self, studio: Studio) -> list[tuple[str, str]]:
        """The choices that the studio's model has."""
        known = [(c.label, n) for n, c in studio.choices.items() if self.original or n != ORIGINAL]
        return [("None", ""), *known] if self.none else known

    @property
    def inputs(self) -> list[Any]:
        return [self.name, *self.sliders.values()]

    def read(self, values: tuple[Any, ...]) -> dict[str, Any] | None:
        """The mechanism from the values of `inputs`, as `Settings.mechanism` has it.

        Raises:
            ValueError: a value out of range.
        """
        config = mechanism(values[0], dict(zip(self.sliders, values[1:], strict=True)))
        return None if config is None else config.to_dict()


def picker(
    studio: Studio, value: str, *, label: str, original: bool = True, none: bool = False, key: str = ""
) -> Picker:
    """Build it. `original` offers the model's own attention, `none` nothing at all; `key` makes element ids."""
    made = Picker(None, {}, original, none)
    choices = made.offers(studio)
    if value not in [name for _, name in choices]:
        value = choices[0][1]
    name = made.name = (gr.Dropdown if none else gr.Radio)(
        choices, value=value, label=label, elem_id=f"{key}attention"
    )  # fmt: skip
    about = gr.HTML(_about(studio, value))
    mine = {c.name for c in studio.choices[value].controls} if value else set()
    sliders = made.sliders = {
        c.name: gr.Slider(
            c.low, c.high, value=c.value, step=c.step, precision=0 if isinstance(c.step, int) else None, label=c.label,
            info=c.info, visible=c.name in mine, elem_id=f"{key}{c.name}",
        )
        for c in CONTROLS.values()
    }  # fmt: skip

    def show(chosen: str) -> list[Any]:
        used = {c.name for c in studio.choices[chosen].controls} if chosen in studio.choices else set()
        return [_about(studio, chosen), *(gr.update(visible=n in used) for n in sliders)]

    name.change(show, name, [about, *sliders.values()], show_progress="hidden", api_visibility="private")
    return made


def _about(studio: Studio, name: str) -> str:
    text = studio.choices[name].about if name in studio.choices else ""
    return f'<div class="lf-about">{text}</div>'


def share(names: Sequence[str]) -> str:
    """JavaScript that writes an event's inputs into the address, under these names."""
    return f"(...values) => window.linfusion.share({json.dumps(list(names))}, values)"


def query(values: Mapping[str, str], studio: Studio) -> dict[str, Any]:
    """Values of the form and of one picker from an address; what is not valid is left out."""
    found: dict[str, Any] = {}
    for name in ("prompt", "seed"):
        if name in values:
            found[name] = values[name][:MAX_PROMPT]
    for name, allowed in (
        ("size", lambda v: v in studio.sizes()),
        ("steps", lambda v: 1 <= v <= MAX_STEPS),
        ("guidance", lambda v: studio.guidances[0] <= v <= studio.guidances[1]),
        *((c.name, lambda v, c=c: c.low <= v <= c.high) for c in CONTROLS.values()),
    ):
        try:
            value = float(values[name])
            whole = name in ("size", "steps") or (name in CONTROLS and isinstance(CONTROLS[name].step, int))
            value = int(value) if whole else value
        except (KeyError, ValueError, OverflowError):
            continue
        if allowed(value):
            found[name] = value
    if values.get("attention") in studio.choices:
        found["attention"] = values["attention"]
    return found
