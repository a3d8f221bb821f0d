"""The page, put together, and its server."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from linfusion.pipelines.settings import read

from . import render
from .choices import chosen
from .compare import compare
from .create import create
from .forms import Desk, form, query
from .guard import Guard
from .inside import inside
from .studio import Studio

HERE = Path(__file__).parent
MAX_UPLOAD = 32 * 2**20
KEEP = 3600
"""Seconds that files of a visit are kept."""

FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


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
                        name = gr.Textbox(value=studio.model, label="Folder or Hub id", max_lines=1, elem_id="model")
                        load = gr.Button("Load", size="sm", elem_id="load")
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                with gr.Tab("Create", id="create"):
                    tab = create(desk, fields)
                with gr.Tab("Compare", id="compare"):
                    compare(desk, fields)
                with gr.Tab("Look inside", id="inside"):
                    inside(desk, fields)

        named = {
            "prompt": fields.prompt, "size": fields.size, "steps": fields.steps, "seed": fields.seed,
            "guidance": fields.guidance, "attention": tab.picker.name, **tab.picker.sliders,
        }  # fmt: skip
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}

        def arrive(request: gr.Request) -> dict[Any, Any]:
            """What the address says; and what the model offers, which may have changed since the page was made."""
            found = query(dict(request.query_params), studio)
            return (
                {each: gr.update() for each in named.values()}
                | offers()
                | {named[key]: gr.update(value=value) for key, value in found.items()}
            )

        def offers() -> dict[Any, Any]:
            if studio.load is None:
                return {}
            low, high = studio.guidances
            updates: dict[Any, Any] = {
                fields.size: gr.update(choices=[(f"{s} x {s}", s) for s in studio.sizes()], value=studio.size),
                fields.steps: gr.update(value=studio.steps),
                fields.guidance: gr.update(
                    minimum=low, maximum=high, value=studio.guidance or low, visible=studio.guidance is not None
                ),
            }
            return updates

        page.load(arrive, None, list(named.values()), **quiet)
        page.unload(desk.leave)

        def fill(file: str) -> dict[Any, Any]:
            """Into the form, the settings of an uploaded picture, which is not kept."""
            try:
                settings = read(file)
                attention, values = chosen(settings.mechanism)
            except (ValueError, OSError) as error:
                return {tab.status: render.error(str(error))}
            finally:
                Path(file).unlink(missing_ok=True)
            asked = {
                "size": settings.size,
                "steps": settings.steps,
                "guidance": settings.guidance,
                "seed": settings.seed,
            }
            known = {key: str(value) for key, value in asked.items() if value is not None}
            known |= {key: str(value) for key, value in values.items()}
            found = query(known | {"prompt": settings.prompt, "attention": attention}, studio)
            remark = f"The settings of “{settings.prompt[:80]}” are filled in."
            if settings.model != studio.model:
                remark += f" It was drawn by {settings.model[:80]}, here it will be {studio.model}."
            return {named[key]: gr.update(value=value) for key, value in found.items()} | {
                tab.status: render.note(remark)
            }

        upload.upload(fill, upload, [*named.values(), tab.status], **quiet)

        if studio.load is not None:

            async def open_model(value: str, request: gr.Request) -> Any:
                try:
                    async for job, ahead in desk.follow(str(request.session_hash), lambda j: studio.open(j, value), 1):
                        update: dict[Any, Any] = {tab.status: render.progress(job, ahead)}
                        yield update | (offers() if job.state == "done" else {})
                except ValueError as error:
                    yield {tab.status: render.error(str(error))}

            load.click(open_model, name, [tab.status, fields.size, fields.steps, fields.guidance], **quiet)
    page.queue(default_concurrency_limit=None, max_size=256, api_open=False)
    return page


@contextmanager
def serve(
    studio: Studio, *, host: str = "127.0.0.1", port: int | None = None, share: bool = False, quiet: bool = True
) -> Iterator[tuple[str, Desk]]:
    """The running page: its address and its back. Leaving the block ends all jobs and removes all files.

    Raises:
        OSError: the port is taken.
    """
    desk = Desk(studio)
    before = {name: os.environ.get(name) for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED")}
    os.environ |= {"GRADIO_TEMP_DIR": str(studio.folder), "GRADIO_ANALYTICS_ENABLED": "False"}
    page = None
    over = threading.Event()
    sweeper = threading.Thread(target=sweep, args=(studio.folder, over), daemon=True)
    sweeper.start()
    try:
        page = build(desk)
        theme = gr.themes.Default(
            primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=MONO, spacing_size="sm", radius_size="md"
        )
        _, local, public = page.launch(
            server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=quiet, ssr_mode=False,
            theme=theme, css=(HERE / "page.css").read_text(), head=f"<script>{(HERE / 'page.js').read_text()}</script>",
            footer_links=[], max_file_size=MAX_UPLOAD, enable_monitoring=False, state_session_capacity=512,
            app_kwargs={"middleware": [Middleware(Guard, folder=studio.folder)]}, mcp_server=False, pwa=False,
        )  # fmt: skip
        yield public or local, desk
    finally:
        over.set()
        desk.runner.close()
        if page is not None:
            page.close(verbose=False)
        shutil.rmtree(studio.folder, ignore_errors=True)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def sweep(folder: Path, over: threading.Event, keep: float = KEEP) -> None:
    """Until `over`, remove files that are older than `keep` seconds: pictures, tiles, uploads, previews."""
    while not over.wait(min(60.0, keep)):
        for file in list(folder.rglob("*")):
            try:
                if file.is_file() and time.time() - file.stat().st_mtime > keep:
                    file.unlink()
            except OSError:  # somebody else removed it
                continue
