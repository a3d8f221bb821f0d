"""Tab Compare: the original and up to three mechanisms from the same noise, under one slider."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from . import render
from .forms import NAMES, QUIET, Desk, Form, Picker, picker, settings_of, share
from .tiles import viewer

SLOTS = ("clear", "sla", "")
SHOWN = 1024
"""Pixels a side of what the slider gets at most; the viewer shows every pixel."""


def compare(desk: Desk, form: Form) -> list[Picker]:
    """Build the tab that is open; gives its mechanisms."""
    pickers = []
    with gr.Row():
        for i, name in enumerate(SLOTS):
            with gr.Column(min_width=200):
                pickers.append(
                    picker(desk.studio, name, label=f"Against the original, {i + 1}", original=False, none=True,
                           key=f"compare{i}-")
                )  # fmt: skip
    with gr.Row():
        start = gr.Button("Compare", variant="primary", elem_id="compare")
        cancel = gr.Button("Cancel", visible=False, elem_id="compare-cancel")
    status = gr.HTML(render.note(), elem_id="compare-status")
    which = gr.Radio([], label="Right of the slider", visible=False, elem_id="which")
    slider = gr.ImageSlider(
        label="Original | mechanism", type="filepath", format="png", interactive=False, height=520, visible=False,
        buttons=["fullscreen"], elem_id="slider",
    )  # fmt: skip
    table = gr.HTML(elem_id="compare-table")
    with gr.Accordion("Zoom into a picture", open=False, visible=False, elem_id="zoom") as zoom:
        side = gr.Radio([], label="Picture", elem_id="zoom-which")
        tiles = gr.HTML(elem_id="zoom-view")
    outputs = [status, which, slider, table, zoom, side, start, cancel]
    width = len(pickers[0].inputs)

    async def run(request: gr.Request, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        studio, visitor = desk.studio, str(request.session_hash)
        try:
            settings = settings_of(studio, *values[: len(NAMES)])
            slots = [values[len(NAMES) + i * width :][:width] for i in range(len(pickers))]
            wanted = [p.read(v) for p, v in zip(pickers, slots, strict=True) if v[0]]
            mechanisms: list[dict[str, Any]] = []
            for one in wanted:
                if one is not None and one not in mechanisms:
                    mechanisms.append(one)
            if not mechanisms:
                raise ValueError("Choose at least one mechanism to compare with the original.")
            assert settings.steps is not None
            yield {start: gr.update(visible=False), cancel: gr.update(visible=True)}
            total = settings.steps * (1 + len(mechanisms))
            async for job, ahead in desk.follow(visitor, lambda j: studio.compare(j, settings, mechanisms), total):
                update: dict[Any, Any] = {status: render.progress(job, ahead)}
                if job.state == "done":
                    update |= await asyncio.to_thread(finished, visitor, job.result)
                yield update
        except ValueError as error:
            yield {status: render.error(str(error))}
        yield {start: gr.update(visible=True), cancel: gr.update(visible=False)}

    def finished(visitor: str, drawn: list[Any]) -> dict[Any, Any]:
        files = [(d.label, d.file) for d in drawn]
        desk.compared.put(visitor, files)
        labels = [label for label, _ in files]
        return {
            table: render.comparison(drawn),
            which: gr.update(choices=labels[1:], value=labels[1], visible=len(labels) > 2),
            slider: pair(visitor, labels[1]),
            zoom: gr.update(visible=True),
            side: gr.update(choices=labels, value=None),
        }

    def file_of(visitor: str, label: Any) -> Path | None:
        return next((file for name, file in desk.compared.get(visitor) or [] if name == label), None)

    def pair(visitor: str, label: Any) -> Any:
        right = file_of(visitor, label)
        if right is None:
            return gr.update()
        left = desk.compared.get(visitor)[0][1]
        return gr.update(value=(small(left), small(right)), label=f"Original | {label}", visible=True)

    def turn(label: Any, request: gr.Request) -> Any:
        return pair(str(request.session_hash), label)

    def look(label: Any, request: gr.Request) -> str:
        file = file_of(str(request.session_hash), label)
        if file is None:
            return ""
        with Image.open(file) as image:
            return viewer(image, desk.studio.folder, str(label))

    inputs = [*form.inputs, *(i for p in pickers for i in p.inputs)]
    start.click(run, inputs, outputs, **QUIET)
    start.click(None, form.inputs, None, js=share(NAMES), api_visibility="private")
    which.input(turn, which, slider, **QUIET)
    side.input(look, side, tiles, **QUIET)
    cancel.click(desk.stop, None, None, **QUIET)
    return pickers


def small(file: Path) -> str:
    """The picture's file, or for a large picture that of a reduced copy."""
    with Image.open(file) as image:
        if max(image.size) <= SHOWN:
            return str(file)
        copy = file.with_name(f"{file.stem}-small.png")
        if not copy.exists():
            image.reduce(-(-max(image.size) // SHOWN)).save(copy)
        return str(copy)
