"""The page's server."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from .forms import Desk
from .guard import Guard
from .layout import build
from .studio import Studio

HERE = Path(__file__).parent
MAX_UPLOAD = 32 * 2**20
KEEP = 3600
"""Seconds that files of a visit are kept."""

SET = ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED")
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


@contextmanager
def serve(
    studio: Studio, *, host: str = "127.0.0.1", port: int | None = None, share: bool = False, quiet: bool = True
) -> Iterator[tuple[str, Desk]]:
    """The running page: its address and its back. Leaving the block ends all jobs and removes all files.

    Raises:
        OSError: the port is taken.
    """
    desk = Desk(studio)
    before = {name: os.environ[name] for name in SET if name in os.environ}
    os.environ |= dict(zip(SET, (str(studio.folder), "False"), strict=True))
    page = None
    over = threading.Event()
    sweeper = threading.Thread(target=sweep, args=(studio.folder, over), daemon=True)
    sweeper.start()
    try:
        page = build(desk)
        theme = gr.themes.Default(
            primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=MONO, spacing_size="sm", radius_size="md"
        ).set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")  # to be read on white
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
        for name in SET:
            del os.environ[name]
        os.environ |= before


def sweep(folder: Path, over: threading.Event, keep: float = KEEP) -> None:
    """Until `over`, remove files that are older than `keep` seconds: pictures, tiles, uploads, previews."""
    while not over.wait(min(60.0, keep)):
        for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
            with suppress(OSError):  # somebody else removed it, or the folder is not empty
                if time.time() - path.stat().st_mtime > keep:
                    path.rmdir() if path.is_dir() else path.unlink()
