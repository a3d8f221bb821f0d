"""What the server answers: the addresses that the page uses, and files of its own folder; everything else is 404.

gradio's server can do much more (run any event by name, fetch addresses, edit code in development). A list of what is
allowed needs no knowledge of what that is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

FILE = "/gradio_api/file="
EXACT = {
    "GET": {
        "/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/gradio_api/queue/data",
        "/gradio_api/startup-events", "/gradio_api/app_id", "/gradio_api/upload_progress", "/gradio_api/token",
    },
    "POST": {"/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/upload"},
}  # fmt: skip
BELOW = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")


class Guard:
    """ASGI middleware around gradio's app.

    Args:
        folder: the one folder whose files may be read.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], folder: Path) -> None:
        self.app, self.folder = app, folder.resolve()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket") and not self.allows(scope):
            await send({"type": "http.response.start", "status": 404, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"Not found"})
            return
        await self.app(scope, receive, send)

    def allows(self, scope: dict[str, Any]) -> bool:
        method = {"HEAD": "GET"}.get(scope.get("method", ""), scope.get("method", ""))
        path = scope["path"]
        if method == "GET" and path.startswith(FILE):
            return self.inside(path.removeprefix(FILE))
        below = method == "GET" and path.startswith(BELOW) and ".." not in path.split("/")
        return below or path in EXACT.get(method, ())

    def inside(self, name: str) -> bool:
        """Whether `name` is a file of the folder, links followed."""
        try:
            file = Path(name).resolve()
            return file.is_relative_to(self.folder) and file.is_file()
        except (OSError, ValueError):  # names that no file can have
            return False
