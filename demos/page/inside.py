"""Tab Look inside: where each layer attends, the original next to a mechanism, and what that costs by size."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import gradio as gr

from . import charts, render
from .forms import NAMES, QUIET, Desk, Form, Picker, picker, settings_of, share
from .studio import Looked

MOMENTS = {"Early (noise)": 0.1, "Middle": 0.5, "Late (details)": 0.9}
MEAN = "Mean of all heads"


def inside(desk: Desk, form: Form) -> tuple[Picker, gr.CheckboxGroup]:
    """Build the tab that is open; gives its mechanism and the sizes to measure."""
    chosen = picker(desk.studio, "clear", label="Next to the original", original=False, key="inside-")
    moment = gr.Radio(list(MOMENTS), value="Middle", label="When in the drawing", elem_id="moment")
    with gr.Row():
        start = gr.Button("Look", variant="primary", elem_id="look")
        cancel = gr.Button("Cancel", visible=False, elem_id="inside-cancel")
    status = gr.HTML(render.note(), elem_id="inside-status")
    with gr.Column(visible=False) as results:
        with gr.Row():
            layer = gr.Dropdown([], label="Layer", elem_id="layer", filterable=False)
            head = gr.Dropdown([], label="Head", elem_id="head", filterable=False)
        place = gr.State((0.5, 0.5))
        with gr.Row():
            sides = [
                gr.Image(type="pil", format="png", interactive=False, buttons=["fullscreen"], label=label, elem_id=i)
                for label, i in (("Original: click a patch", "attends-original"), ("Mechanism", "attends-changed"))
            ]
        reads = gr.HTML(elem_id="reads")
        gr.HTML('<div class="lf-about">How far each head looks on average, in patches, by layer:</div>')
        chart = gr.HTML(elem_id="distances")
        with gr.Accordion("Which layers were replaced", open=False):
            table = gr.HTML(elem_id="described")
    with gr.Accordion("Speed over size, measured here", open=False, elem_id="speed"):
        gr.HTML(
            '<div class="lf-about">Three steps at each size, with the attention as it is and replaced. The larger '
            "sizes take a while on a CPU.</div>"
        )
        sizes = gr.CheckboxGroup(
            [(f"{s}", s) for s in desk.studio.sizes()], value=desk.studio.sizes()[:3], label="Sizes", elem_id="sizes"
        )
        with gr.Row():
            measure = gr.Button("Measure", elem_id="measure")
            stop = gr.Button("Cancel", visible=False)
        speed_status = gr.HTML(render.note(), elem_id="speed-status")
        speed = gr.HTML(elem_id="curves")

    def asked(values: tuple[Any, ...]) -> Any:
        settings = settings_of(desk.studio, *values[: len(NAMES)])
        settings = replace(settings, mechanism=chosen.read(values[len(NAMES) : len(NAMES) + len(chosen.inputs)]))
        desk.studio.check(settings)
        return settings

    async def run(request: gr.Request, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        studio, visitor = desk.studio, str(request.session_hash)
        try:
            settings = asked(values)
            step = min(int(MOMENTS[values[-1]] * settings.steps), settings.steps - 1)
            yield {start: gr.update(visible=False), cancel: gr.update(visible=True)}
            async for job, ahead in desk.follow(visitor, lambda j: studio.look(j, settings, step), settings.steps):
                update: dict[Any, Any] = {status: render.progress(job, ahead)}
                if job.state == "done":
                    looked: Looked = job.result
                    desk.looked.put(visitor, looked)
                    names = [(f"{i + 1}: {one.name}", i) for i, one in enumerate(looked.original)]
                    update |= {
                        results: gr.update(visible=True),
                        layer: gr.update(choices=names, value=0),
                        head: gr.update(choices=heads(looked, 0), value=0),
                        table: render.described(looked.report),
                        place: (0.5, 0.5),
                    }
                    values = await asyncio.to_thread(shown, looked, 0, 0, (0.5, 0.5))
                    update |= dict(zip([*sides, reads, chart], values, strict=True))
                yield update
        except ValueError as error:
            yield {status: render.error(str(error))}
        yield {start: gr.update(visible=True), cancel: gr.update(visible=False)}

    def show(which: Any, one: Any, at: Any, request: gr.Request) -> tuple[Any, ...]:
        looked = desk.looked.get(str(request.session_hash))
        if looked is None:
            return gr.update(), gr.update(), render.error("Press Look again: this was too long ago."), gr.update()
        return shown(looked, which, one, at)

    def other(which: Any, at: Any, request: gr.Request) -> tuple[Any, ...]:
        """Another layer may have other heads."""
        looked = desk.looked.get(str(request.session_hash))
        choices = gr.update() if looked is None else gr.update(choices=heads(looked, which), value=0)
        return choices, *show(which, 0, at, request)

    def click(which: Any, one: Any, request: gr.Request, event: gr.SelectData) -> tuple[Any, ...]:
        looked = desk.looked.get(str(request.session_hash))
        at = (0.5, 0.5)
        if looked is not None:
            width, height = charts.shown_size(looked.image)
            at = tuple(min(max(float(a) / b, 0.0), 0.999) for a, b in zip(event.index, (width, height), strict=True))
        return at, *show(which, one, at, request)

    async def measured(request: gr.Request, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        studio, visitor = desk.studio, str(request.session_hash)
        try:
            settings, wanted = asked(values), sorted(values[-1])
            if not wanted or not set(wanted) <= set(studio.sizes()):
                raise ValueError("Choose at least one size.")
            yield {measure: gr.update(visible=False), stop: gr.update(visible=True)}
            follow = desk.follow(visitor, lambda j: studio.measure(j, settings, wanted), 2 * len(wanted))
            async for job, ahead in follow:
                update: dict[Any, Any] = {speed_status: render.progress(job, ahead)}
                rows = job.result if job.state == "done" else job.partial
                if rows:
                    update[speed] = charts.curves(rows, studio.choices[settings.mechanism["name"]].label)
                yield update
        except ValueError as error:
            yield {speed_status: render.error(str(error))}
        yield {measure: gr.update(visible=True), stop: gr.update(visible=False)}

    inputs = [*form.inputs, *chosen.inputs]
    start.click(
        run, [*inputs, moment], [status, results, layer, head, table, place, *sides, reads, chart, start, cancel],
        **QUIET,
    )  # fmt: skip
    start.click(None, form.inputs, None, js=share(NAMES), api_visibility="private")
    view = [*sides, reads, chart]
    layer.input(other, [layer, place], [head, *view], **QUIET)
    head.input(show, [layer, head, place], view, **QUIET)
    for side in sides:
        side.select(click, [layer, head], [place, *view], **QUIET)
    measure.click(measured, [*inputs, sizes], [speed_status, speed, measure, stop], **QUIET)
    for button in (cancel, stop):
        button.click(desk.stop, None, None, **QUIET)
    return chosen, sizes


def heads(looked: Looked, layer: int) -> list[tuple[str, int]]:
    """The choices of a layer's heads; 0 is the mean."""
    return [(MEAN, 0), *((f"Head {i + 1}", i + 1) for i in range(len(looked.distances[0][layer])))]


def shown(looked: Looked, layer: Any, head: Any, at: tuple[float, float]) -> tuple[Any, ...]:
    """Both pictures, what they say in a sentence, and the chart. Numbers that do not exist count as the first.

    `at` is where the picture was clicked, across and down, as shares of its size.
    """
    layer = layer if isinstance(layer, int) and 0 <= layer < len(looked.original) else 0
    head = head if isinstance(head, int) and 0 <= head <= len(looked.distances[0][layer]) else 0
    pairs = (looked.original[layer], looked.changed[layer])
    rows, columns = pairs[0].grid[-2:]
    row, column = int(at[1] * rows), int(at[0] * columns)
    maps = []
    for one in pairs:
        image, text = one.row(row * columns + column)
        maps.append((image.mean(0), text.mean()) if head == 0 else (image[head - 1], text[head - 1]))
    scale = max(float(m.max()) for m, _ in maps)
    pictures = [charts.heat(looked.image, m.cpu(), (rows, columns), scale, (row, column)) for m, _ in maps]
    names = ("Original", looked.label)
    words = [f"{100 * float(text):.0f} % ({name})" for name, (_, text) in zip(names, maps, strict=True)]
    said = f"Patch {column + 1}, {row + 1} of {columns} x {rows}. From the text it takes {' and '.join(words)}."
    updates = [gr.update(value=picture, label=label) for picture, label in
               zip(pictures, ("Original: click a patch", looked.label), strict=True)]  # fmt: skip
    return *updates, render.note(said), charts.distances(looked, layer)
