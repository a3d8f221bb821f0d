"""`linfusion generate` far above the model's own size, and `linfusion upscale`: stages, files, mistakes."""

import json

import pytest
from PIL import Image

from .test_cli import draw, flux, run, sd  # noqa: F401  (fixtures)


def test_large_pictures_by_stages(run, flux):  # noqa: F811
    """The size that the model was made for, then twice that; kept stages are not drawn again."""
    more = ["--size", 128, "--steps", 2, "--stage-steps", 1, "--strength", "0.4", "--stages", "kept", "--json"]
    code, out, err = run(*draw(flux, *more, "--mechanism", "clear", "--radius", 2))
    figures = json.loads(out)
    assert code == 0 and Image.open("out.png").size == (128, 128) and figures["out"] == "out.png"
    assert [s["size"] for s in figures["stages"]] == [[64, 64], [128, 128]]
    assert [(s["steps"], s["resumed"]) for s in figures["stages"]] == [(2, False), (1, False)]
    assert figures["stages"][1]["level"] == pytest.approx(0.4)
    assert "64 x 64" in err and "128 x 128" in err and "2/2" in err and "1/1" in err
    other, _, err = run(*draw(flux, *more, "--out", "b.tif"))
    assert other == 2 and "stages of another picture" in err
    code, out, _ = run(*draw(flux, *more, "--out", "b.tif", "--mechanism", "clear", "--radius", 2))
    assert all(s["resumed"] for s in json.loads(out)["stages"]) and Image.open("b.tif").size == (128, 128)
    assert run(*draw(flux, "--size", 128, "--direct", "--json"))[1].count('"stages"') == 0


def test_upscale(run, flux):  # noqa: F811
    Image.effect_noise((64, 48), 80).save("a.png")
    more = ["--model", flux, "--device", "cpu", "--stage-steps", "2,1", "--low-guidance", "1"]
    code, out, err = run("upscale", "a.png", "red apple", "--size", 160, *more, "--out", "large.png")
    assert code == 0 and Image.open("large.png").size == (160, 128)  # 120 is no multiple of 16
    text = " ".join(out.split())
    assert "large.png" in text and "80 x 64" in text and "160 x 128" in text and "2/2" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.png", "x", "--size", "64"], "size must be above the 64 pixels"),
        (["a.png", "x", "--size", "100"], "size must be a multiple of 16 pixels"),
        (["b.png", "x", "--size", "128"], "b.png cannot be read as a picture"),
        (["a.png", "", "--size", "128"], "prompt is empty"),
        (["a.png", "x", "--size", "128", "--stage-steps", "1,2,3"], "--stage-steps has 3 values for 1 stages"),
        (["a.png", "x", "--size", "128", "--skip-residual", "2"], "skip must be between 0 and 1"),
        (["a.png", "x", "--size", "128", "--shift", "-1"], "shift must be a positive number"),
        (["a.png", "x", "--size", "128", "--memory", "much"], "memory must be a size such as 24GiB"),
        (["a.png", "x", "--size", "128", "--out", "a.xyz"], "--out a.xyz must be an image file"),
    ],
)
def test_mistakes(run, flux, arguments, said):  # noqa: F811
    Image.effect_noise((64, 48), 80).save("a.png")
    code, out, err = run("upscale", *arguments, "--model", flux, "--device", "cpu")
    assert code == 2 and out == "" and said in err.splitlines()[-1] and err.splitlines()[-1].startswith("linfusion:")


def test_stage_options_of_a_picture_without_stages(run, flux):  # noqa: F811
    more = ["--memory", "24GiB", "--low-guidance", "1", "--direct", "--size", 128]
    code, _, err = run(*draw(flux, *more))
    assert code == 2 and "--low-guidance, --memory is for pictures drawn by stages" in err
