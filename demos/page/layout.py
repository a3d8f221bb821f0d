"""The page, put together: one form, three tabs, and what fills the form in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr

from linfusion.pipelines.settings import public_name, read

from . import render
from .choices import chosen
from .compare import compare
from .create import create
from .forms import QUIET, Desk, form, query
from .inside import inside


def build(desk: Desk) -> gr.Blocks:
    """All tabs around one form."""
    studio = desk.studio
    with gr.Blocks(title="linfusion", analytics_enabled=False) as page:
        gr.HTML(
            '<div class="lf-head"><h1>linfusion</h1><p>The same picture with other attention: how it looks, what it '
            "costs, where it attends.</p></div>"
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                fields = form(studio)
                upload = gr.UploadButton(
                    "Use the settings of a PNG", size="sm", file_types=[".png"], elem_id="from-picture"
                )
                if studio.load is not None:
                    with gr.Accordion("Model", open=False):
                        model = gr.Textbox(value=studio.model, label="Folder or Hub id", max_lines=1, elem_id="model")
                        load = gr.Button("Load", size="sm", elem_id="load")
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                with gr.Tab("Create"):
                    picker, status = create(desk, fields)
                with gr.Tab("Compare"):
                    pickers = [picker, *compare(desk, fields)]
                with gr.Tab("Look inside"):
                    looked, sizes = inside(desk, fields)
                    pickers.append(looked)
        named = {**fields.named, "attention": picker.name, **picker.sliders}
        shown = [*named.values(), *(p.name for p in pickers[1:]), sizes]

        def offers() -> dict[Any, Any]:
            """What the model can do, which only changes where visitors may open others."""
            if studio.load is None:
                return {each: gr.update() for each in shown}
            guidance = {"visible": studio.guidance is not None, "value": studio.guidance or studio.guidances[0]}
            return {each: gr.update() for each in shown} | {
                fields.size: gr.update(choices=[(f"{s} x {s}", s) for s in studio.sizes()], value=studio.size),
                fields.steps: gr.update(value=studio.steps),
                fields.guidance: gr.update(minimum=studio.guidances[0], maximum=studio.guidances[1], **guidance),
                sizes: gr.update(choices=[(str(s), s) for s in studio.sizes()], value=studio.sizes()[:3]),
                **{p.name: gr.update(choices=p.offers(studio)) for p in pickers},
            }

        def fill(values: dict[str, Any]) -> dict[Any, Any]:
            return {named[name]: gr.update(value=value) for name, value in query(values, studio).items()}

        def arrive(request: gr.Request) -> dict[Any, Any]:
            """What the address says."""
            return offers() | fill(dict(request.query_params))

        def from_picture(file: str) -> dict[Any, Any]:
            """What an uploaded picture says, which is not kept."""
            try:
                settings = read(file)
                attention, values = chosen(settings.mechanism)
            except (ValueError, OSError) as error:
                return {status: render.error(str(error))}
            finally:
                Path(file).unlink(missing_ok=True)
            asked = {name: getattr(settings, name) for name in fields.named}
            known = {name: str(value) for name, value in {**asked, **values}.items() if value is not None}
            remark = f"The settings of “{settings.prompt[:80]}” are filled in."
            if settings.model != public_name(studio.model):
                remark += f" It was drawn by {settings.model[:80]}, here it will be {public_name(studio.model)}."
            return fill(known | {"attention": attention}) | {status: render.note(remark)}

        async def open_model(name: str, request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
            try:
                async for job, ahead in desk.follow(str(request.session_hash), lambda j: studio.open(j, name), 1):
                    yield {status: render.progress(job, ahead)} | (offers() if job.state == "done" else {})
            except ValueError as error:
                yield {status: render.error(str(error))}

        page.load(arrive, None, shown, **QUIET)
        page.unload(desk.leave)
        upload.upload(from_picture, upload, [*named.values(), status], **QUIET)
        if studio.load is not None:
            load.click(open_model, model, [*shown, status], **QUIET)
    page.queue(default_concurrency_limit=None, max_size=256, api_open=False)
    return page
