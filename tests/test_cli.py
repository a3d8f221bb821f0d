"""The command line, on tiny pipelines saved to disk: what goes where, what comes out, and one line for each mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)
from PIL import Image
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

import linfusion as lf
from linfusion.cli import main
from linfusion.cli.options import _default_device
from linfusion.demos import embedded

from .models import HOSTS, TINY
from .models.parts import clip, stable_diffusion, tokenizer, vae
from .models.wan import wan_pipeline

FIGURES = {
    "mechanism", "layers", "attention_work_left", "seconds_per_step", "psnr", "original_seconds_per_step", "size", "out"
}  # fmt: skip


@pytest.fixture(scope="session")
def sd(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-sd")
    stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flux(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-flux")
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=6, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    FluxPipeline(
        vae=vae(), text_encoder=clip(24), tokenizer=tokenizer(), text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=tokenizer(), transformer=TINY["flux"].build(), scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def wan(tmp_path_factory) -> Path:
    """As Wan 2.2: two models of one class."""
    folder = tmp_path_factory.mktemp("tiny-wan")
    pipe = wan_pipeline(HOSTS["wan"].build(), HOSTS["wan"].build())
    t5 = UMT5Config(vocab_size=6, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipe.register_modules(vae=vae, text_encoder=UMT5EncoderModel(t5), tokenizer=tokenizer())
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(params=["sd", "flux"])
def folder(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """`run(*arguments) -> exit code, standard output, standard error`, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # tables do not break words

    def call(*arguments):
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


def draw(folder, *more):
    return ["generate", "red apple", "--model", folder, "--size", 64, "--steps", 3, "--device", "cpu", *more]


def test_a_picture(run, folder):
    code, out, err = run(*draw(folder))
    assert code == 0
    image = Image.open("out.png")
    assert image.size == (64, 64) and image.mode == "RGB"
    assert np.asarray(image).std() > 1
    assert "out.png, 64 x 64 pixels" in out and "original" in out
    assert "3/3" in err and "original" in err  # the bar


def test_compare_as_json(run, folder):
    code, out, err = run(*draw(folder, "--mechanism", "clear", "--radius", 2, "--compare", "--json", "--out", "a.png"))
    assert code == 0
    assert out.count("\n") == 1  # one object, one line, nothing else
    figures = json.loads(out)
    assert figures.keys() == FIGURES
    assert figures["mechanism"] == "clear"
    assert figures["layers"] == 4
    assert 0 < figures["attention_work_left"] < 1
    assert figures["seconds_per_step"] > 0 and figures["original_seconds_per_step"] > 0
    assert 0 < figures["psnr"] < 60
    assert figures["size"] == 64 and figures["out"] == "a.png"
    assert "warm-up" in err and "original" in err and str(lf.CLEAR(2)) in err and "3/3" in err
    width, height = Image.open("a.png").size
    assert width == 128 and height > 64  # two pictures over their labels


def test_the_pictures_of_a_comparison(run, folder):
    """The original is the untouched pipeline: both halves are what each draws alone, and the PSNR is theirs."""
    settings = ["--mechanism", "clear", "--radius", 2]
    figures = json.loads(run(*draw(folder, *settings, "--compare", "--json", "--out", "both.png"))[1])
    run(*draw(folder, *settings, "--out", "replaced.png"))
    run(*draw(folder, "--out", "original.png"))
    both, replaced, original = (
        np.asarray(Image.open(f"{n}.png").convert("RGB")) for n in ("both", "replaced", "original")
    )
    assert (both[:64, :64] == original).all() and (both[:64, 64:] == replaced).all()
    error = ((original.astype(float) - replaced) ** 2).mean()
    assert figures["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-6)


def test_compare_as_a_table(run, flux):
    code, out, _ = run(*draw(flux, "--mechanism", "clear", "--radius", 2, "--compare"))
    assert code == 0
    text = " ".join(out.split())
    for part in ("attention", "layers replaced", "work left", "seconds", "PSNR", "original", "100.0 %", "dB"):
        assert part in text, part
    assert "CLEAR" in text


def test_exact_attention_is_identical(run, flux):
    arguments = draw(flux, "--mechanism", "softmax", "--compare")
    figures = json.loads(run(*arguments, "--json")[1])
    assert figures["psnr"] is None and figures["attention_work_left"] == 1.0
    assert "identical" in run(*arguments)[1]


def test_json_without_comparison(run, flux):
    figures = json.loads(run(*draw(flux, "--json"))[1])
    assert figures.keys() == FIGURES
    assert (figures["mechanism"], figures["layers"], figures["attention_work_left"]) == (None, 0, 1.0)
    assert figures["psnr"] is None and figures["original_seconds_per_step"] is None


def test_the_seed_decides(run, sd):
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        assert run(*draw(sd, "--seed", seed, "--out", f"{name}.png"))[0] == 0
    a, b, c = (np.asarray(Image.open(f"{n}.png")) for n in "abc")
    assert (a == b).all() and not (a == c).all()


def test_guidance_prompt_and_dtype_arrive(run, sd):
    plain = ["--guidance", 1, "--out"]
    run(*draw(sd, *plain, "a.png"))
    run(*draw(sd, "--guidance", 7, "--out", "b.png"))
    run("generate", "green", *draw(sd, *plain, "c.png")[2:])
    run(*draw(sd, *plain, "d.jpg", "--dtype", "bfloat16"))
    a, b, c, d = (np.asarray(Image.open(n)) for n in ("a.png", "b.png", "c.png", "d.jpg"))
    assert not (a == b).all() and not (a == c).all() and not (a == d).all()


def test_a_picture_is_drawn_again_from_its_file(run, flux):
    """--from: pixel for pixel, whatever was asked; what is given besides comes first."""
    asked = ["--mechanism", "clear", "--radius", 2, "--seed", 5, "--guidance", 2.5]
    run(*draw(flux, *asked, "--out", "a.png"))
    run(*draw(flux, "--out", "plain.png"))
    again = ["generate", "--model", flux, "--from", "a.png", "--device", "cpu"]
    for name, more in (("b", []), ("c", ["--seed", 6]), ("d", ["--mechanism", "softmax"])):
        code, _, err = run(*again, *more, "--out", f"{name}.png")
        assert code == 0, err
    a, b, c, d, plain = (np.asarray(Image.open(f"{n}.png")) for n in ("a", "b", "c", "d", "plain"))
    assert (a == b).all() and not (a == c).all() and not (a == d).all() and not (a == plain).all()


def test_the_demo_says_what_it_needs(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "linfusion.demos.page.app", raising=False)
    code, _, err = run("demo")
    assert code == 2 and "linfusion demo needs gradio: pip install 'linfusion[demo]'" in err


def test_a_picture_chooses_no_model(run, flux):
    """A file may come from anyone: the model that it names is only loaded where that is asked for here too."""
    run(*draw(flux, "--out", "a.png"))
    code, _, err = run("generate", "--from", "a.png", "--out", "b.png")
    assert code == 2 and f"a.png was drawn with --model {flux.name}; add that if you trust it" in err
    code, _, err = run("generate", "--from", "missing.png")
    assert code == 2 and "missing.png" in err
    code, _, err = run("generate")
    assert code == 2 and "The prompt is missing" in err


def test_adapters(run, tmp_path, flux):
    """--adapter brings mechanism, settings and weights; --untrained leaves the weights out, those of the host too."""
    pipe = FluxPipeline.from_pretrained(flux)
    lf.apply(pipe, lf.CLEAR(2, pool=2))
    with torch.no_grad():
        for name, p in pipe.transformer.named_parameters():
            if "pool_weight" in name or "to_v" in name:
                p.mul_(0.3)
    lf.save(pipe, tmp_path / "mine", host=["*to_v.weight"])
    for name, more in (
        ("trained", ["--adapter", tmp_path / "mine"]),
        ("untrained", ["--adapter", tmp_path / "mine", "--untrained"]),
        ("plain", ["--mechanism", "clear", "--radius", 2, "--pool", 2]),
    ):
        code, out, _ = run(*draw(flux, *more, "--json", "--out", f"{name}.png"))
        figures = json.loads(out)
        assert code == 0, out
        assert figures["layers"] == 4
        assert figures["mechanism"] == "clear"
    trained, untrained, plain = (np.asarray(Image.open(f"{n}.png")) for n in ("trained", "untrained", "plain"))
    assert (untrained == plain).all() and not (trained == plain).all()


def test_adapters_that_ship(run, monkeypatch, tmp_path, flux):
    """Of an embedded model only, by name; another model's folder is full of config.json, too."""
    from linfusion.cli.options import adapter_source
    from linfusion.demos import embedded

    monkeypatch.setattr(embedded, "ADAPTERS", tmp_path)
    lf.save(lf.apply(FluxPipeline.from_pretrained(flux), lf.CLEAR(2)), tmp_path / "clear")
    (tmp_path / "emoji-flux").mkdir()
    (tmp_path / "clear").rename(tmp_path / "emoji-flux" / "clear")
    assert adapter_source("clear", "emoji-flux") == str(tmp_path / "emoji-flux" / "clear")
    code, _, err = run(*draw(flux, "--adapter", "transformer"))
    assert code == 2 and "none that ships for" in err
    with pytest.raises(ValueError, match=r"sla is no folder here, no Hub id, and none that ships .*-flux \(clear\)"):
        adapter_source("sla", "emoji-flux")


def test_adapters_are_read_once(run, monkeypatch, tmp_path, sd):
    """And without their weights nothing is loaded into the host, to be thrown out again."""
    from linfusion import adapter, weights

    pipe = StableDiffusionPipeline.from_pretrained(sd)
    lf.apply(pipe, {"*up*": lf.CLEAR(2), "*": lf.Softmax()})
    lf.save(pipe, tmp_path / "mine")
    reads, loads = [], []

    def counted(calls, function):
        return lambda *arguments, **settings: (calls.append(arguments), function(*arguments, **settings))[1]

    read = counted(reads, adapter.read_adapter)
    for module in (adapter, weights):
        monkeypatch.setattr(module, "read_adapter", read)
    monkeypatch.setattr(lf, "load", counted(loads, lf.load))
    for more, loaded in (([], 1), (["--untrained"], 0)):
        reads.clear(), loads.clear()
        code, out, err = run(*draw(sd, "--adapter", tmp_path / "mine", "--json", *more))
        assert code == 0 and (len(reads), len(loads)) == (1, loaded), err
        assert set(json.loads(out)["mechanism"].split("+")) == {"clear", "softmax"}


def test_warm_ups(run, monkeypatch, sd):
    """Each pipeline is warmed up right before it is timed, as it is then, and only where times are compared."""
    from linfusion.apply import record_of
    from linfusion.pipelines import generate

    drawn = []

    def fake(pipe, prompt, *, steps, **settings):
        drawn.append(("original" if record_of(pipe.unet) is None else "changed", steps))
        return generate.Picture(Image.new("RGB", (64, 64)), len(drawn))

    monkeypatch.setattr(generate, "generate", fake)
    figures = json.loads(run(*draw(sd, "--mechanism", "softmax", "--compare", "--json"))[1])
    assert drawn == [("changed", 2), ("changed", 3), ("original", 2), ("original", 3)]
    assert (figures["seconds_per_step"], figures["original_seconds_per_step"]) == (2, 4)
    drawn.clear()
    run(*draw(sd, "--mechanism", "softmax"))
    assert drawn == [("changed", 3)]


EMOJI = Path(embedded.__file__).parent / "models" / "emoji-flux"
"""The embedded model as a folder, so opened as any other: by plain FluxPipeline."""


def test_the_embedded_model_as_a_folder(run):
    """The same picture by its name and by its folder: 256 pixels, and no more padding than it was trained with."""
    drawing = ["generate", "red apple", "--steps", 2, "--device", "cpu", "--json"]
    by_name = json.loads(run(*drawing, "--out", "name.png")[1])
    code, out, err = run(*drawing, "--model", EMOJI, "--guidance", 3, "--out", "folder.png")
    assert code == 0 and by_name["size"] == json.loads(out)["size"] == 256
    assert "does not know" not in err and "made for" not in err and "too long" not in err
    name, folder = (np.asarray(Image.open(f"{n}.png")) for n in ("name", "folder"))
    assert (name == folder).all()
    # what plain FluxPipeline draws by itself is not that picture: 512 tokens, nearly all of them padding
    plain = FluxPipeline.from_pretrained(EMOJI)
    noise, size = torch.Generator().manual_seed(0), {"height": 256, "width": 256}
    garbage = plain("red apple", num_inference_steps=2, guidance_scale=3.0, generator=noise, **size).images[0]
    assert np.abs(np.asarray(garbage).astype(float) - name).mean() > 2


def test_remarks(run, monkeypatch):
    """What the model cannot serve as asked is said on standard error, by name as by folder."""
    from linfusion.pipelines import generate

    monkeypatch.setattr(generate, "generate", lambda *a, **k: generate.Picture(Image.new("RGB", (256, 256)), 1.0))
    fifteen = " ".join(["red"] * 15)

    def said(prompt, *more):
        code, out, err = run("generate", prompt, "--device", "cpu", "--json", *more)
        assert code == 0 and out.count("\n") == 1
        return err

    for model in ([], ["--model", EMOJI]):
        err = said(fifteen, "--size", 256, "--guidance", 5, *model)
        assert not any(word in err for word in ("know", "long", "made for", "guidance"))
        err = said(fifteen + " Zorp apple [/zyx]", "--size", 272, "--guidance", 5.5, *model)
        assert "The model does not know: Zorp, zyx." in err
        assert "only its first 15 tokens (words, or parts) count. Cut: Zorp apple [/zyx]" in err
        assert "made for 256 x 256 pixels" in err
        assert ("learned guidance from 1 to 5; 5.5 is outside" in err) == (not model)  # a folder does not tell it
    assert "learned guidance from 1 to 5; 0.5 is outside" in said("red", "--guidance", 0.5)


def test_the_default_device(monkeypatch):
    for cuda, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=cuda: answer)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        assert _default_device() == device


def test_a_numbered_cpu_is_the_cpu(run, sd):
    for device in ("cpu", "cpu:3"):
        code, _, err = run(*draw(sd, "--device", device, "--out", f"{device[-1]}.png"))  # the last --device counts
        assert code == 0, err
    a, b = (np.asarray(Image.open(f"{n}.png")) for n in "u3")
    assert (a == b).all()


def test_settings_on_the_command_line(run, sd):
    def mechanism(*more):
        code, out, err = run("describe", "--model", sd, "--device", "cpu", "--json", *more)
        assert code == 0, err
        return next(r["mechanism"] for r in json.loads(out)["layers"] if r["mechanism"])

    assert mechanism("--mechanism", "clear", "--radius", "2.5") == str(lf.CLEAR(radius=2.5, pool=1))
    assert mechanism("--mechanism", "clear", "--radius", "4,8", "--pool", "2") == str(lf.CLEAR(radius=(4, 8), pool=2))
    assert mechanism("--mechanism", "lit") == str(lf.LiT())
    assert mechanism("--mechanism", "lit", "--kernel-size", "3", "--heads", "4", "--text", "linear") == str(
        lf.LiT(kernel_size=3, heads=4, text="linear")
    )
    assert mechanism("--mechanism", "agent", "--agents", "2,3", "--bias", "false") == str(lf.Agent((2, 3), bias=False))
    assert mechanism("--mechanism", "agent", "--agents", "9") == str(lf.Agent(9))
    assert mechanism("--mechanism", "linfusion") == str(lf.LinFusion(mid_dim=None, eps=0.0001))
    assert mechanism("--mechanism", "linfusion", "--mid-dim", "4", "--eps", "1e-3") == str(
        lf.LinFusion(mid_dim=4, eps=0.001)
    )
    assert mechanism("--mechanism", "linfusion", "--mid-dim", "none") == str(lf.LinFusion(mid_dim=None, eps=0.0001))
    assert mechanism("--mechanism", "softmax") == str(lf.Softmax())
    assert mechanism("--mechanism", "sla", "--topk", "0.25") == str(lf.SLA(topk=0.25))
    sizes = ("--block-q", "64", "--block-k", "32", "--feature-map", "elu1")
    assert mechanism("--mechanism", "sla", "--topk", "1", *sizes, "--linear", "marginal", "--skip", "0") == str(
        lf.SLA(topk=1, block_q=64, block_k=32, feature_map="elu1", linear="marginal", skip=0)
    )


# describe


def test_describe(run, folder):
    code, out, _ = run("describe", "--model", folder, "--device", "cpu")
    assert code == 0 and "0 of" in out and "not chosen" in out
    code, out, _ = run("describe", "--model", folder, "--device", "cpu", "--mechanism", "clear", "--radius", 2)
    assert code == 0 and re.search(r"4 of \d+ attention layers replaced", " ".join(out.split()))
    settings = ("--device", "cpu", "--mechanism", "clear", "--radius", 2, "--json")
    code, out, _ = run("describe", "--model", folder, *settings)
    report = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert report["replaced"] == 4 and {"layer", "mechanism", "reason"} <= report["layers"][0].keys()


def test_describe_names_both_models_of_a_video_pipeline(run, wan):
    more = ["--mechanism", "clear", "--radius", "2,4,4", "--json"]
    code, out, err = run("describe", "--model", wan, "--device", "cpu", *more)
    report = json.loads(out)
    assert code == 0, err
    assert report["model"] == "WanTransformer3DModel" and report["replaced"] == 4
    layers = {r["layer"]: r["reason"] for r in report["layers"]}
    assert len(layers) == len(report["layers"]) == 8
    for part in ("transformer", "transformer_2"):
        assert layers[f"{part}.blocks.1.attn1"] == "replaced" and layers[f"{part}.blocks.1.attn2"] == "cross-attention"


# mistakes


OK = object()
"""Stands for a command that would draw a picture, so that only what follows it can be wrong."""

MISTAKES = {
    "empty-prompt": (["generate", ""], "prompt is empty"),
    "blank-prompt": (["generate", "  "], "prompt is empty"),
    "no-output-folder": ([OK, "--out", "missing/a.png"], r"--out: the folder .*missing does not exist"),
    "no-extension": ([OK, "--out", "picture"], r"--out picture must be an image file, such as out\.png"),
    "bad-extension": ([OK, "--out", "a.txt"], r"--out a\.txt must be an image file"),
    "read-only-format": ([OK, "--out", "a.psd"], r"--out a\.psd must be an image file"),
    "output-is-a-folder": ([OK, "--out", "picture.png"], r"--out picture\.png must be an image file"),
    "size-the-vae-cannot-divide": ([OK, "--size", "60"], r"--size must be a multiple of (8|16) pixels.*got 60"),
    "size-zero": ([OK, "--size", "0"], "--size must be positive, got 0"),
    "size-negative": ([OK, "--size", "-64"], "--size must be positive, got -64"),
    "steps-zero": ([OK, "--steps", "0"], "--steps must be at least 1, got 0"),
    "seed-negative": ([OK, "--seed", "-1"], r"--seed must be between 0 and 2\*\*64 - 1, got -1"),
    "seed-too-large": (
        [OK, "--seed", str(2**64)],
        r"--seed must be between 0 and 2\*\*64 - 1, got 18446744073709551616",
    ),
    "guidance-negative": ([OK, "--guidance", "-1"], "--guidance must be finite and not negative, got -1"),
    "guidance-infinite": ([OK, "--guidance", "inf"], "--guidance must be finite and not negative, got inf"),
    "guidance-no-number": ([OK, "--guidance", "nan"], "--guidance must be finite and not negative, got nan"),
    "unknown-mechanism": (
        [OK, "--mechanism", "magic"],
        "Unknown mechanism 'magic'. Available: softmax, linfusion, clear, sla, lit, agent",
    ),
    "radius-zero": ([OK, "--mechanism", "clear", "--radius", "0"], "radius must be positive.* got 0"),
    "radius-negative": ([OK, "--mechanism", "clear", "--radius=-3"], "radius must be positive.* got -3"),
    "radius-no-number": ([OK, "--mechanism", "clear", "--radius", "big"], "radius must be positive.* got 'big'"),
    "radius-empty": ([OK, "--mechanism", "clear", "--radius", ""], "radius must be positive.* got ''"),
    "radius-missing": ([OK, "--mechanism", "clear"], "radius"),
    "radius-for-video": ([OK, "--mechanism", "clear", "--radius", "1,2,3"], "3 axes, the grid has 2"),
    "pool-no-number": ([OK, "--mechanism", "clear", "--radius", "2", "--pool", "0.5"], "pool must be a whole"),
    "mid-dim-broken": ([OK, "--mechanism", "linfusion", "--mid-dim", "2.5"], "mid_dim must be a positive"),
    "topk-missing": ([OK, "--mechanism", "sla"], "sla needs topk"),
    "topk-zero": ([OK, "--mechanism", "sla", "--topk", "0"], r"topk must be the share .* got 0"),
    "topk-no-number": ([OK, "--mechanism", "sla", "--topk", "few"], r"topk must be the share .* got 'few'"),
    "block-of-another-size": ([OK, "--mechanism", "sla", "--topk", "1", "--block-q", "100"], "multiple of 16"),
    "linear-unknown": ([OK, "--mechanism", "sla", "--topk", "1", "--linear", "some"], "all, complement, marginal"),
    "text-unknown": ([OK, "--mechanism", "lit", "--text", "no"], "text must be one of exact, linear, got 'no'"),
    "kernel-even": ([OK, "--mechanism", "lit", "--kernel-size", "4"], "kernel_size must be an odd number.* got 4"),
    "heads-that-do-not-divide": ([OK, "--mechanism", "lit", "--heads", "7"], "heads=7 does not divide the layer's 32"),
    "agents-for-video": ([OK, "--mechanism", "agent", "--agents", "1,2,3"], "3 axes, the grid has 2"),
    "agents-none": ([OK, "--mechanism", "agent", "--agents", "0"], "agents must be a positive number.* got 0"),
    "setting-of-another": (
        [OK, "--mechanism", "linfusion", "--radius", "8"],
        "linfusion has no setting radius. Settings: eps, mid_dim, text",
    ),
    "setting-alone": ([OK, "--radius", "8"], "--radius is a setting of a mechanism: add --mechanism"),
    "compare-with-nothing": ([OK, "--compare"], "--compare needs something to compare with"),
    "norms-alone": ([OK, "--no-fuse-prologue"], "--no-fuse-prologue goes with --mechanism or --adapter"),
    "untrained-alone": ([OK, "--untrained"], "--untrained goes with --adapter"),
    "adapter-and-mechanism": ([OK, "--adapter", "a", "--mechanism", "softmax"], "one or the other"),
    "unknown-adapter": ([OK, "--adapter", "missing"], "missing is no folder here"),
    "empty-adapter": ([OK, "--adapter", "empty"], "empty is not an adapter folder"),
    "unknown-model": ([OK, "--model", "nonsense"], "--model nonsense is no embedded model .*emoji-flux"),
    "unknown-hub-model": ([OK, "--model", "some/model"], "--model some/model cannot be loaded"),
    "no-folder-here": ([OK, "--model", "./missing"], r"--model \./missing: no such folder\."),
    "no-absolute-folder": ([OK, "--model", "/missing/model"], "--model /missing/model: no such folder"),
    "no-folder-in-a-folder": ([OK, "--model", "empty/missing"], "--model empty/missing: no such folder"),
    "no-deep-folder": ([OK, "--model", "a/b/c"], "--model a/b/c: no such folder"),
    "model-is-a-file": ([OK, "--model", __file__], r"--model .*test_cli\.py is a file; a pipeline is a folder"),
    "no-pipeline": ([OK, "--model", "empty"], "--model empty cannot be loaded"),
    "unknown-device": ([OK, "--device", "toaster"], "--device toaster cannot be used here"),
    "meta-device": ([OK, "--device", "meta"], "--device meta cannot be used here"),
    "unknown-embedded-size": (
        ["generate", "x", "--model", "emoji-flux", "--size", "128"],
        "--size must be between 256 and 1024 pixels for this model, got 128",
    ),
    "demo-port": (["demo", "--port", "99999"], "--port must be between 1 and 65535, got 99999"),
    "demo-unknown-model": (["demo", "--model", "nonsense"], "--model nonsense is no embedded model"),
    "describe-unknown-model": (["describe", "--model", "nonsense"], "--model nonsense is no embedded model"),
    "describe-unknown-mechanism": (["describe", "--mechanism", "magic"], "Unknown mechanism"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_for_each_mistake(run, tmp_path, flux, name):
    arguments, says = MISTAKES[name]
    arguments = [*draw(flux), *arguments[1:]] if arguments[0] is OK else arguments
    for folder in ("empty", "picture.png"):
        (tmp_path / folder).mkdir()
    code, out, err = run(*arguments)
    assert code == 2 and out == ""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("linfusion: error: "), err
    assert re.search(says, lines[0]), lines[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "picture.png"]  # no half picture


@pytest.mark.parametrize("door", ["mechanism", "adapter", "untrained"])
def test_norms_may_stay_the_hosts(run, monkeypatch, tmp_path, flux, door):
    from linfusion.mechanisms import Mechanism

    lf.save(lf.apply(TINY["flux"].build(), lf.Softmax()), tmp_path / "a")
    arguments = {"mechanism": ["--mechanism", "softmax"], "adapter": ["--adapter", "a"]}
    arguments["untrained"] = [*arguments["adapter"], "--untrained"]
    seen = set()
    real = Mechanism.__call__
    monkeypatch.setattr(Mechanism, "__call__", lambda m, *a: seen.add(m.fuse_prologue) or real(m, *a))
    for more, want in (([], {True}), (["--no-fuse-prologue"], {False})):
        seen.clear()
        code, _, err = run(*draw(flux, *arguments[door], *more))
        assert code == 0 and seen == want, err


def test_a_mistake_that_only_the_grid_shows(run, flux):
    """Told at the first step, below its bar."""
    code, out, err = run(*draw(flux, "--mechanism", "agent"))
    assert code == 2 and out == "" and not Path("out.png").exists()
    last = err.splitlines()[-1]
    assert last.startswith("linfusion: error: ") and "49 agents are more than the grid's 16 tokens" in last


def test_an_unsupported_model(run, tmp_path):
    """A pipeline that diffusers opens but linfusion cannot change."""
    from diffusers import DDPMPipeline, DDPMScheduler

    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    for command in (draw("ddpm", "--mechanism", "softmax"), ["describe", "--model", "ddpm"]):
        code, out, err = run(*command)
        assert code == 2 and out == "" and err.count("\n") == 1
        assert "UNet2DModel is not supported. Supported: UNet2DConditionModel" in err
    code, _, err = run(*draw("ddpm"))  # nor draw from a prompt
    assert code == 2 and err.splitlines()[-1].startswith("linfusion: error: DDPMPipeline")


def test_videos_are_not_drawn(run, wan, tmp_path):
    """Before anything slow starts, and instead of a size that only pictures have."""
    code, out, err = run(*draw(wan, "--mechanism", "clear", "--radius", 2))
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "WanPipeline makes videos" in err and "export_to_video" in err
    assert not list(tmp_path.glob("*.png"))


USAGE = [[], ["nonsense"], ["generate", "x", "--size", "big"], ["generate", "x", "--dtype", "int8"]]


@pytest.mark.parametrize("arguments", USAGE)
def test_usage(run, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    command = "linfusion generate" if arguments[:1] == ["generate"] else "linfusion"
    assert out == "" and err.startswith("linfusion: error: ") and err.endswith(f"; see {command} --help\n")
    assert err.count("\n") == 1


def test_help_and_version(capsys):
    for arguments, says in (
        (["--version"], lf.__version__),
        (["--help"], "generate"),
        (["generate", "-h"], "--radius"),
        (["generate", "-h"], "psnr is null when nothing was compared or the pictures are equal"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0 and says in " ".join(capsys.readouterr().out.split())


def test_interrupted_and_out_of_memory(run, monkeypatch, sd):
    from linfusion.pipelines import generate

    def fails(error):
        def raise_it(*args, **kwargs):
            raise error

        monkeypatch.setattr(generate, "generate", raise_it)
        code, out, err = run(*draw(sd, "--mechanism", "softmax"))
        return code, out, err.splitlines()[-1]

    assert fails(KeyboardInterrupt()) == (130, "", "linfusion: interrupted")
    code, out, last = fails(RuntimeError("CUDA out of memory. Tried to allocate 9 TiB"))
    assert code == 2 and out == "" and "out of memory; try a smaller --size" in last
    with pytest.raises(RuntimeError, match="a bug"):  # bugs keep their traceback
        fails(RuntimeError("a bug"))


def test_as_a_process(tmp_path, flux):
    """What a shell sees: the object alone on standard output, a mistake as one line on standard error."""
    root = str(Path(lf.__file__).parents[1])

    def shell(*arguments):
        command = [sys.executable, "-m", "linfusion", *map(str, arguments)]
        environment = {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
        environment["OMP_NUM_THREADS"] = "1"
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    done = shell(*draw(flux, "--mechanism", "clear", "--radius", 2, "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() == FIGURES
    done = shell(*draw("nonsense"))
    assert done.returncode == 2 and done.stdout == ""
    assert [line for line in done.stderr.splitlines() if line] == [
        f"linfusion: error: --model nonsense is no embedded model ({', '.join(embedded.PIPELINES)}), no folder here and"
        " no Hub id."
    ]
