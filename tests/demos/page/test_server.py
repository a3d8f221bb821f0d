"""What the page's server does with those who do not use the page: strange paths, sizes, files, and crowds."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from linfusion.demos.page import studio as studio_module
from linfusion.demos.page.studio import MAX_STEPS
from linfusion.pipelines.generate import Picture
from linfusion.pipelines.settings import Settings

from .conftest import need
from .test_jobs import until

httpx = need("httpx")


@pytest.fixture
def folder(site):
    return site[1].studio.folder


@pytest.fixture
def get(site):
    with httpx.Client(timeout=30) as client:
        yield lambda path, method="GET", **more: client.request(method, site[0] + path, **more)


def test_only_its_own_files_are_read(get, folder, tmp_path):
    (folder / "mine.txt").write_text("mine")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    assert get(f"/gradio_api/file={folder}/mine.txt").text == "mine"
    up = "/".join([".."] * 12)
    for name in (
        "/etc/passwd", "//etc/passwd", f"{folder}/{up}/etc/passwd", f"{folder}/%2e%2e/%2e%2e/secret.txt",
        "%2fetc%2fpasswd", f"{folder}/..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd", tmp_path / "secret.txt",
        f"{folder}/link.txt",
        "README.md", "pyproject.toml", studio_module.__file__, folder, "a%00b", "x" * 5000, "~/.bashrc",
        "http://127.0.0.1:1/", "file:///etc/passwd", "\\\\host\\share",
    ):  # fmt: skip
        answer = get(f"/gradio_api/file={name}")
        assert answer.status_code == 404 and "secret" not in answer.text and "root:" not in answer.text, name
    (folder / "link.txt").unlink()


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/proxy=http://127.0.0.1:1/", "/static/../../../../etc/passwd", "/assets/%2e%2e/%2e%2e/%2e%2e/app.py",
     "/gradio_api/info", "/openapi.json", "/docs", "/monitoring", "/dev/reload", "/gradio_api/vibe-edit/",
     "/file=/etc/passwd", "/gradio_api/run/predict", "/gradio_api/call/run", "/gradio_api/component_server",
     "/custom_component/1/client/a/b"],
)  # fmt: skip
def test_nothing_else_answers(get, path):
    for method in ("GET", "POST", "PUT", "DELETE"):
        assert get(path, method).status_code == 404


def upload(get, name, content):
    return get("/gradio_api/upload", "POST", files={"files": (name, content)})


def test_uploads_stay_in_the_folder(get, folder):
    for name in ("../../evil.png", "/etc/evil.png", "..\\..\\evil.png", "%2e%2e/evil.png"):
        (path,) = upload(get, name, b"x").json()
        assert str(folder) in path and path.endswith("evil.png") and ".." not in path.split("/")
        assert (folder / path).resolve().is_relative_to(folder)
    assert upload(get, "large.png", bytes(33 * 2**20)).status_code == 413


def ask(site, visitor, *arguments, **changed):
    async def one():
        async with httpx.AsyncClient(timeout=60) as client:
            return await visitor(site[0], client, "stranger").send(*arguments, **changed)

    return run(one())


def run(coroutine):
    """In a thread of its own: a browser's driver may have a loop running in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"size": 99999}, "99999"), ({"size": -256}, "-256"), ({"size": 300}, "300"), ({"size": "256"}, "256"),
        ({"steps": 10**9}, "1000000000"), ({"steps": 0}, "0"), ({"steps": "many"}, ""),
        ({"seed": "abc"}, "seed must be a whole number"), ({"seed": "9" * 30}, "seed must be between"),
        ({"seed": None}, ""),
        ({"prompt": " "}, "prompt is empty"), ({"prompt": "x" * 10**5}, "1000"),
        ({"guidance": 1e9}, ""), ({"attention": "magic"}, "magic"), ({"attention": "agent-sd"}, "agent-sd"),
        ({"attention": "clear", "radius": 1e12}, ""), ({"attention": "sla", "block": 7}, ""),
    ],
    ids=str,
)  # fmt: skip
def test_bounds_hold_on_the_server(site, visitor, monkeypatch, changed, says):
    """Whatever the page would have refused before sending."""
    _, desk = site
    monkeypatch.setattr(desk.studio, "draw", lambda job, settings: pytest.fail(f"drew {settings}"))
    answer = ask(site, visitor, "draw", **changed)
    refused = not answer.get("success") or "lf-error" in answer["all"]
    assert refused and "It failed" not in answer["all"] and says in answer["all"], answer["all"]
    assert desk.runner.running is None


def test_no_model_of_the_visitors_choice(site):
    from linfusion.demos.page.jobs import Job

    _, desk = site
    with pytest.raises(ValueError, match="only be chosen where the page was started with --allow-models"):
        desk.studio.open(Job("a", lambda job: None), "/some/model")
    with pytest.raises(ValueError, match="magic"):
        desk.studio.check(Settings("x", size=256, steps=2, mechanism={"name": "magic"}))
    with pytest.raises(ValueError, match=f"At most {MAX_STEPS} steps"):
        desk.studio.check(Settings("x", size=256, steps=MAX_STEPS + 1))


@pytest.mark.parametrize("path", ["/etc/passwd", "{folder}/../secret.png", "http://127.0.0.1:1/a.png"])
def test_a_file_is_not_taken_by_its_path(site, visitor, folder, path):
    """The button that reads a picture's settings, told to read what was never uploaded: neither read nor removed."""
    secret = folder.parent / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    path = path.format(folder=folder)
    file = {"path": path, "orig_name": "a.png", "size": 1, "meta": {"_type": "gradio.FileData"}}
    answer = ask(site, visitor, "from-picture", **{"from-picture": file})
    assert not answer.get("success") and "holds no settings" not in answer["all"] and "root:" not in answer["all"]
    assert secret.exists()


def bomb():
    """A picture of 100 megapixels in a few kB."""
    file = BytesIO()
    Image.new("1", (10000, 10000)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no picture", "is not a picture"),
        (b"<svg onload=alert(1)>", "is not a picture"),
        (None, "10000 x 10000 pixels"),
    ],
    ids=["text", "svg", "100 megapixels"],
)
def test_what_is_no_picture_is_refused(site, visitor, get, monkeypatch, content, says):
    content = bomb() if content is None else content
    monkeypatch.setattr(Image.Image, "load", lambda *a: pytest.fail("decoded"))
    (path,) = upload(get, "a.png", content).json()
    file = {"path": path, "orig_name": "a.png", "size": 1, "meta": {"_type": "gradio.FileData"}}
    answer = ask(site, visitor, "from-picture", **{"from-picture": file})
    assert "lf-error" in answer["all"] and says in answer["all"]
    assert get(f"/gradio_api/file={path}").status_code == 404, "it was removed"


def test_fifty_at_once(site, visitor, monkeypatch):
    """All get a picture or are told that the queue is full, nobody twice; the page answers meanwhile and after."""
    address, desk = site
    image = Image.new("RGB", (256, 256), "red")

    def generate(pipe, prompt, *, on_step, **settings):
        time.sleep(0.05)
        on_step(1)
        return Picture(image, 0.05)

    monkeypatch.setattr(studio_module, "generate", generate)
    monkeypatch.setattr(desk.runner, "places", 40)

    async def crowd():
        # a kept connection may be closed by the server just when it is used again, which browsers try anew
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            asked = [visitor(address, client, f"visitor{i}").send("draw", steps=1) for i in range(50)]

            async def watch():
                slowest = 0.0
                for _ in range(10):
                    start = time.perf_counter()
                    assert (await client.get(f"{address}/config")).status_code == 200
                    slowest = max(slowest, time.perf_counter() - start)
                    await asyncio.sleep(0.1)
                return slowest

            *answers, slowest = await asyncio.gather(*asked, watch())
            last = await visitor(address, client, "late").send("draw", steps=1)
            return answers, slowest, last

    answers, slowest, last = run(crowd())
    done = [a for a in answers if "Done in" in a["all"]]
    busy = [a for a in answers if "are waiting already" in a["all"]]
    assert len(done) + len(busy) == 50 and len(done) >= 40
    assert "Done in" in last["all"] and slowest < 10
    assert desk.runner.running is None and not desk.runner.waiting


def test_old_files_go(tmp_path):
    need("gradio")
    from linfusion.demos.page.app import sweep

    over, old, new = threading.Event(), tmp_path / "a" / "old.png", tmp_path / "new.png"
    old.parent.mkdir()
    old.write_text("x")
    thread = threading.Thread(target=sweep, args=(tmp_path, over, 0.2))
    time.sleep(0.3)
    new.write_text("x")
    thread.start()
    until(lambda: not old.exists())
    over.set()
    thread.join()


def test_the_space_installs_what_the_package_does():
    """Spaces read requirements.txt before there is a package to install."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    root = Path(__file__).parents[3]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["demo"]
    listed = (root / "requirements.txt").read_text().splitlines()
    assert [line for line in listed if not line.startswith("#")] == wanted
