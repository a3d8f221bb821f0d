"""One server and one browser for all tests of the page."""

import json
import os
import shutil

import pytest

import linfusion as lf

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
REQUIRED = os.environ.get("LINFUSION_BROWSER") == "required"
"""Set in CI, where nothing may be skipped."""


def need(module):
    if REQUIRED:
        return __import__(module)
    return pytest.importorskip(module, reason=f"{module} is not installed (pip install 'linfusion[test]')")


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The running page with the embedded model: its address and its back."""
    need("gradio")
    from linfusion.demos.page.app import serve
    from linfusion.demos.page.studio import Studio

    pipe = lf.demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    studio = Studio(pipe, folder=tmp_path_factory.mktemp("site"))
    with serve(studio) as (address, desk):
        yield address.rstrip("/"), desk
    assert not studio.folder.exists()


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None and not REQUIRED:
        pytest.skip("no Chromium here (Debian: apt install chromium)")
    assert CHROMIUM is not None, "CI has to install Chromium"
    need("playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield browser
        browser.close()


class Visitor:
    """Speaks gradio's protocol as its page does, but sends whatever it likes."""

    def __init__(self, address, client, name):
        self.address, self.client, self.name = address, client, name

    async def event(self, button):
        """Number and inputs of what a click on the element `button` starts on the server."""
        config = (await self.client.get(f"{self.address}/config")).json()
        ids = {c["id"]: c for c in config["components"]}
        (event,) = [
            d for d in config["dependencies"]
            if d["backend_fn"] and any(ids[t[0]]["props"].get("elem_id") == button for t in d["targets"] if t[0] in ids)
        ]  # fmt: skip
        inputs = [ids[i]["props"] for i in event["inputs"]]
        return event["id"], {p.get("elem_id") or str(n): p.get("value") for n, p in enumerate(inputs)}

    async def send(self, button, **changed):
        """The server's last message for a click with these inputs, others as they stand in the page."""
        number, inputs = await self.event(button)
        data = [changed.get(name, value) for name, value in inputs.items()]
        assert changed.keys() <= inputs.keys()
        body = {"data": data, "fn_index": number, "session_hash": self.name, "event_data": None, "trigger_id": None}
        answer = await self.client.post(f"{self.address}/gradio_api/queue/join", json=body)
        if answer.status_code != 200:
            return {"msg": "refused", "output": answer.text}
        messages = []
        url = f"{self.address}/gradio_api/queue/data?session_hash={self.name}"
        async with self.client.stream("GET", url) as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data: "):
                    messages.append(json.loads(line.removeprefix("data: ")))
                    if messages[-1]["msg"] in ("process_completed", "close_stream"):
                        break
        return messages[-1] | {"all": json.dumps(messages)}


@pytest.fixture(scope="session")
def visitor():
    return Visitor
