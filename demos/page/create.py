"""Tab Create: one picture, while it is drawn and after."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import gradio as gr

from . import render
from .forms import NAMES, QUIET, Desk, Form, Picker, picker, settings_of, share
from .tiles import viewer

LARGE = 1024
"""Pixels a side up to which the browser gets a picture as it is; beyond it, tiles."""


def create(desk: Desk, form: Form) -> tuple[Picker, gr.HTML]:
    """Build the tab that is open; gives its mechanism, and where remarks go."""
    chosen = picker(desk.studio, "clear", label="Attention")
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", elem_id="draw")
        cancel = gr.Button("Cancel", visible=False, elem_id="cancel")
    status = gr.HTML(render.note(), elem_id="status")
    image = gr.Image(
        label="Picture", type="filepath", format="png", interactive=False, buttons=["fullscreen"], height=520,
        elem_id="picture",
    )  # fmt: skip
    large = gr.HTML(visible=False, elem_id="large")
    figures = gr.HTML(elem_id="figures")
    download = gr.DownloadButton(
        "Download PNG with its settings", visible=False, elem_id="download", size="sm", variant="secondary"
    )
    outputs = [image, large, status, figures, download, draw, cancel]

    async def run(request: gr.Request, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        studio, visitor = desk.studio, str(request.session_hash)
        try:
            settings = settings_of(studio, *values[: len(NAMES)])
            settings = replace(settings, mechanism=chosen.read(values[len(NAMES) :]))
            studio.check(settings)
            assert settings.steps is not None
            yield {
                draw: gr.update(visible=False), cancel: gr.update(visible=True), download: gr.update(visible=False),
                figures: "",
            }  # fmt: skip
            async for job, ahead in desk.follow(visitor, lambda job: studio.draw(job, settings), settings.steps):
                update: dict[Any, Any] = {status: render.progress(job, ahead)}
                if job.partial is not None:
                    update |= {image: gr.update(value=job.partial, visible=True), large: gr.update(visible=False)}
                if job.state == "done":
                    update |= await asyncio.to_thread(finished, job.result, studio.remarks(settings))
                yield update
        except ValueError as error:
            yield {status: render.error(str(error))}
        yield {draw: gr.update(visible=True), cancel: gr.update(visible=False)}

    def finished(drawn: Any, remarks: list[str]) -> dict[Any, Any]:
        big = max(drawn.image.size) > LARGE
        shown: dict[Any, Any] = {
            image: gr.update(value=None if big else str(drawn.file), visible=not big),
            large: gr.update(value=viewer(drawn.image, desk.studio.folder, "Picture") if big else "", visible=big),
            figures: render.figures(drawn), download: gr.update(value=str(drawn.file), visible=True),
        }  # fmt: skip
        if remarks:
            shown[status] = render.note(" ".join([f"Done in {render.duration(drawn.seconds)}.", *remarks]))
        return shown

    inputs = [*form.inputs, *chosen.inputs]
    started = [draw.click, form.prompt.submit]
    gr.on(started, run, inputs, outputs, **QUIET)
    gr.on(started, None, inputs, None, js=share([*NAMES, "attention", *chosen.sliders]), api_visibility="private")
    cancel.click(desk.stop, None, None, **QUIET)
    return chosen, status
