"""The page in a real browser, as people use it."""

import re
import time
from urllib.parse import parse_qs

import numpy as np
import pytest
from PIL import Image

import linfusion as lf
from linfusion.cli import main
from linfusion.demos.page import tiles
from linfusion.pipelines.settings import Settings, read, save

from .test_jobs import until

SECONDS = 60_000
"""Milliseconds that anything may take at most, on a machine that is busy with other tests."""


@pytest.fixture
def open_page(site, browser):
    """`open_page(query) -> page`, in a browser profile of its own; nothing may fail there, or ask other servers."""
    contexts, wrong = [], []

    def note(request):
        if not request.url.startswith((site[0], "data:", "blob:")):
            wrong.append(f"asked {request.url}")

    def go(query="", **settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SECONDS)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", note)
        page.on("response", lambda r: wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.goto(f"{site[0]}/?{query}")
        page.wait_for_selector("#draw")
        steps = parse_qs(query).get("steps", ["28"])[0]
        page.wait_for_function("n => document.querySelector('#steps input[type=number]')?.value === n", arg=steps)
        return page

    yield go
    for context in contexts:
        context.close()
    until(lambda: idle(site[1]), 20)
    assert not wrong


def idle(desk):
    return desk.runner.running is None and not desk.runner.waiting


def says(page, where, text):
    """Wait until the element says so."""
    page.locator(where).get_by_text(re.compile(text)).first.wait_for()


def filled(page, where, value):
    """Wait until the field holds it."""
    page.wait_for_function(
        "([where, value]) => document.querySelector(where)?.value === value",
        arg=[f"{where} textarea, {where} input", value],
    )


def slow(page):
    """Start what takes a while, and wait until it runs."""
    page.click("#draw")
    says(page, "#status", r"step \d+ of 60")


def test_draw(open_page, tmp_path):
    """From the address to the picture, and from its file to the same picture on the command line."""
    page = open_page("prompt=rocket&steps=3&seed=7&attention=clear&radius=5&size=99999&guidance=x")
    filled(page, "#prompt", "rocket")
    filled(page, "#seed", "7")
    page.click("#draw")
    page.wait_for_selector("#picture img")
    says(page, "#figures", r"CLEAR\(radius=5\)")
    for text in ("Time a step", "Peak memory", r"MiB|GiB", "Attention work left", r"\d+ %"):
        says(page, "#figures", text)
    assert "prompt=rocket" in page.url and "seed=7" in page.url and "radius=5" in page.url and "size=256" in page.url
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "rocket-7.png"
    file = tmp_path / "rocket.png"
    download.value.save_as(file)
    settings = read(file)
    assert (settings.prompt, settings.size, settings.steps, settings.seed) == ("rocket", 256, 3, 7)
    assert main(["generate", "--from", str(file), "--device", "cpu", "--out", str(tmp_path / "again.png")]) == 0
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(tmp_path / "again.png")))


def test_compare(open_page):
    page = open_page("prompt=rocket&steps=2")
    page.get_by_role("tab", name="Compare").click()
    page.click("#compare")
    says(page, "#compare-table", "PSNR")
    rows = page.locator("#compare-table tbody tr")
    assert rows.count() == 3
    for row, label in enumerate(("Original", "CLEAR", "SLA")):
        text = rows.nth(row).inner_text()
        assert label in text and re.search(r"\d+ ms|\d s", text) and ("dB" in text) == (row > 0)
    slider = page.locator("#slider")
    slider.scroll_into_view_if_needed()
    page.wait_for_function("() => [...document.querySelectorAll('#slider img')].filter(i => i.naturalWidth).length > 1")
    before = slider.locator("[style*=clip-path]").first.get_attribute("style")
    box = slider.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 80, middle[1], steps=4)
    page.mouse.up()
    assert slider.locator("[style*=clip-path]").first.get_attribute("style") != before
    right = slider.locator("img").nth(1).get_attribute("src")
    page.locator("#which label", has_text="SLA").click()
    says(page, "#slider", r"Original \| SLA")
    page.wait_for_function(
        "src => ![...document.querySelectorAll('#slider img')].some(i => i.getAttribute('src') === src)", arg=right
    )
    page.get_by_role("button", name="Zoom into a picture").click()
    page.locator("#zoom-which label", has_text="Original").click()
    page.wait_for_selector("lf-viewer img")


def test_a_large_picture_is_shown_in_tiles(open_page, site):
    """8192 x 8192 pixels: a few tiles are in the page whatever is done, and it answers at once."""
    page = open_page()
    ramp = np.add.outer(np.arange(512), np.arange(512))
    image = Image.fromarray((ramp % 256).astype(np.uint8)).resize((8192, 8192), Image.Resampling.NEAREST)
    html = tiles.viewer(image, site[1].studio.folder, 'a "large" one')
    page.evaluate(
        "html => { const d = document.createElement('div'); d.innerHTML = html; document.body.prepend(d); }", html
    )
    viewer = page.locator("lf-viewer")
    images = "[...document.querySelectorAll('lf-viewer img')]"
    loaded = f"() => {images}.length && {images}.every(i => i.complete && i.naturalWidth)"
    page.wait_for_function(loaded)
    assert viewer.get_attribute("aria-label").startswith('a "large" one, 8192 by 8192 pixels')
    viewer.focus()
    for keys in ("+++++++", ["ArrowRight"] * 9, "-", "0", "++"):
        for key in keys:
            page.keyboard.press(key)
        page.wait_for_function(loaded)
        assert viewer.locator("img").count() <= 40
    start = time.perf_counter()
    page.evaluate("() => new Promise(done => requestAnimationFrame(done))")
    assert time.perf_counter() - start < 2
    deepest = page.evaluate(f"{images}.map(i => i.src).sort().at(-1)")
    assert re.search(r"/[1-4]-\d+-\d+\.jpg$", deepest)


def test_cancel(open_page, site):
    page = open_page("steps=60&size=384")
    slow(page)
    job = site[1].runner.running
    page.click("#cancel")
    says(page, "#status", r"Cancelled\.")
    assert job.state == "cancelled" and job.done < 60
    page.wait_for_selector("#draw")
    assert lf.describe(site[1].studio.pipe).replaced == 0, "the model is as it was"


def test_look_inside(open_page):
    page = open_page("steps=3")
    page.get_by_role("tab", name="Look inside").click()
    page.click("#look")
    page.wait_for_selector("#distances circle")
    assert page.locator("#distances circle").count() == 2 * 8 * 4  # two attentions, eight layers, four heads
    says(page, "#reads", r"Patch 9, 9 of 16 x 16")
    sides = [page.locator(f"#attends-{name} img") for name in ("original", "changed")]
    before = [side.get_attribute("src") for side in sides]
    box = sides[0].bounding_box()
    sides[0].click(position={"x": box["width"] * 3.5 / 16, "y": box["height"] * 1.5 / 16})
    says(page, "#reads", r"Patch 4, 2 of 16 x 16")
    assert all(side.get_attribute("src") != old for side, old in zip(sides, before, strict=True))
    page.click("#head input")
    page.get_by_role("option", name="Head 2").click()
    page.click("#layer input")
    page.get_by_role("option", name=re.compile("^3:")).click()
    page.wait_for_function("document.querySelector('#head input').value === 'Mean of all heads'")
    page.get_by_role("button", name="Which layers were replaced").click()
    says(page, "#described", "8 of 8 attention layers replaced")


def test_measure(open_page):
    page = open_page("steps=2")
    page.get_by_role("tab", name="Look inside").click()
    page.get_by_role("button", name="Speed over size, measured here").click()
    for size in ("384", "512"):
        page.locator("#sizes label", has_text=size).click()
    page.click("#measure")
    says(page, "#curves", "256 x 256")
    says(page, "#speed-status", "Done in")


def test_mistakes(open_page):
    """Said where it happened, and the page goes on."""
    page = open_page("steps=2&size=99999&attention=none&seed=%3Cb%3E")
    filled(page, "#seed", "<b>")
    page.click("#draw")
    says(page, "#status .lf-error", r"seed must be a whole number .*, got '<b>'")
    page.fill("#seed textarea, #seed input", "abc")
    page.click("#draw")
    says(page, "#status .lf-error", "got 'abc'")
    page.fill("#seed textarea, #seed input", "1")
    page.fill("#prompt textarea", "  ")
    page.click("#draw")
    says(page, "#status .lf-error", "prompt is empty")
    assert page.input_value("#size input") == "256 x 256"
    page.fill("#steps input[type=number]", "9999")
    page.press("#steps input[type=number]", "Tab")
    page.wait_for_function("Number(document.querySelector('#steps input[type=number]').value) <= 60")
    page.fill("#steps input[type=number]", "2")
    page.press("#steps input[type=number]", "Tab")
    page.fill("#prompt textarea", "a zorp")
    page.click("#draw")
    says(page, "#status", "does not know: zorp")


def test_settings_of_a_picture(open_page, tmp_path):
    page = open_page()
    mechanism = {"name": "sla", "topk": 0.5, "block_q": 32, "block_k": 32, "feature_map": "softmax", "linear": "all"}
    settings = Settings("sunflower", mechanism=mechanism | {"skip": 0.0}, size=384, steps=9, guidance=2.0, seed=2**60)
    save(Image.new("RGB", (8, 8)), tmp_path / "a.png", settings)
    page.set_input_files("#from-picture input, input[type=file]", tmp_path / "a.png")
    says(page, "#status", "settings of “sunflower” are filled in")
    filled(page, "#prompt", "sunflower")
    filled(page, "#seed", str(2**60))
    filled(page, "#size", "384 x 384")
    filled(page, "#topk", "0.5")
    filled(page, "#block", "32")
    (tmp_path / "b.png").write_text("no picture")
    page.set_input_files("#from-picture input, input[type=file]", tmp_path / "b.png")
    says(page, "#status .lf-error", "is not a picture")


def test_two_visitors(open_page):
    """The second waits, sees how long, and gets its turn."""
    first, second = open_page("steps=60&size=384"), open_page("steps=1&prompt=rocket")
    slow(first)
    second.click("#draw")
    says(second, "#status", "Waiting")
    says(second, "#status", "1 before you")
    first.click("#cancel")
    says(first, "#status", "Cancelled")
    says(second, "#status", "Done in")
    assert second.locator("#picture img").count() == 1 and first.locator("#figures dd").count() == 0


def test_reload_while_running(open_page, site):
    """Whoever leaves makes room: the job ends, and the page that comes back works, with the same settings."""
    page = open_page("steps=60&size=384&prompt=rocket")
    slow(page)
    job = site[1].runner.running
    page.reload()
    filled(page, "#prompt", "rocket")
    until(lambda: job.finished, 20)
    assert job.state == "cancelled" and job.done < 60
    page.fill("#steps input[type=number]", "1")
    page.press("#steps input[type=number]", "Tab")
    page.click("#draw")
    says(page, "#status", "Done in")
    page.wait_for_url("**steps=1&**", timeout=10_000)  # the address follows the picture


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_in_either_light(open_page, scheme):
    """Nothing is wider than the screen, and what is written can be read."""
    page = open_page("steps=1", viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.click("#draw")
    says(page, "#status", "Done in")
    for tab in ("Compare", "Look inside", "Create"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    colours = page.evaluate(
        "[[document.querySelector('#figures dd'), 'color'], [document.body, 'backgroundColor']]"
        ".map(([element, name]) => getComputedStyle(element)[name])"
    )
    text, ground = (np.mean([int(n) for n in re.findall(r"\d+", c)[:3]]) for c in colours)
    assert abs(text - ground) > 120 and (ground < 128) == (scheme == "dark")
