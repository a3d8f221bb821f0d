"""Settings in a picture's file, and what becomes of files that hold none, or too much."""

import json
import struct
import zlib

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from linfusion.pipelines.settings import KEY, Settings, read, save

FULL = Settings(
    "rouge, \u00e9t\u00e9 \u2603", mechanism={"name": "clear", "radius": [2, 3], "pool": 1}, size=64, steps=3,
    guidance=2.5, seed=2**64 - 1, dtype="bfloat16",
)  # fmt: skip


@pytest.mark.parametrize("settings", [FULL, Settings("x")], ids=["full", "defaults"])
def test_round_trip(tmp_path, settings):
    image = Image.new("RGB", (8, 8), "red")
    save(image, tmp_path / "a.png", settings)
    assert read(tmp_path / "a.png") == settings
    assert Image.open(tmp_path / "a.png").tobytes() == image.tobytes()
    save(image, tmp_path / "a.jpg", settings)
    with pytest.raises(ValueError, match="a.jpg holds no settings"):
        read(tmp_path / "a.jpg")


def header(width, height):
    """A PNG of that size as far as its header goes."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 99) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + data


@pytest.mark.parametrize(("size", "wants"), [((10000, 10000), "10000 x 10000 pixels"), ((60000, 60000), "too many")])
def test_large_pictures_are_refused_before_they_are_decoded(tmp_path, size, wants):
    """100 megapixels; and so many that Pillow itself refuses. Nothing follows the header, so decoding would fail."""
    (tmp_path / "a.png").write_bytes(header(*size))
    with pytest.raises(ValueError, match=f"a.png has .*{wants}"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"no picture", b"<svg/>", header(8, 8)[:20]])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="a.png is not a picture"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "null", "{}", '{"prompt": 3}', '{"prompt": "x", "seed": true}', '{"prompt": "x", "seed": 1.5}',
     '{"prompt": "x", "steps": "9"}', '{"prompt": "x", "mechanism": "clear"}', '{"prompt": "x", "device": "cuda"}'],
)  # fmt: skip
def test_settings_of_another_kind_are_refused(tmp_path, text):
    info = PngInfo()
    info.add_itxt(KEY, text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match="a.png holds settings that cannot be read"):
        read(tmp_path / "a.png")


def test_settings_are_json_that_others_can_read(tmp_path):
    save(Image.new("RGB", (8, 8)), tmp_path / "a.png", FULL)
    assert json.loads(Image.open(tmp_path / "a.png").text[KEY])["mechanism"]["radius"] == [2, 3]
