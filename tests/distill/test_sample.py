"""The data set: the teacher's own samples, whole and once each, whatever interrupts the making of it."""

import errno
import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from linfusion.distill.data import store
from linfusion.distill.data.sample import read_prompts, sample
from linfusion.distill.data.store import Store
from linfusion.distill.probe import _clock, _meaning, call_arguments, flatten, generator, probe, unflatten

from .tiny import PROMPTS, SIZES, build, settings, start


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


def test_samples_are_the_pipelines_own(tmp_path, name, data):
    """Sample i: the pipeline's latents for prompt i from noise i, and what its denoiser was told."""
    found, pipe = Store(data(name)), build(name)
    assert len(found) == 10 and found.prompts() == PROMPTS * 2
    arguments = call_arguments(pipe, SIZES[name], 2, None)
    for i in (0, 7):
        wanted = pipe([PROMPTS[i % 5]], generator=generator(i), output_type="latent", **arguments).images[0]
        assert torch.allclose(found[i]["latents"], wanted, atol=1e-4)
        assert not torch.allclose(found[i]["latents"], found[i + 1]["latents"], atol=1e-2)
        alone = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        more = alone if name == "sd" else {"prompt_2": None, "max_sequence_length": 16}
        text = pipe.encode_prompt(PROMPTS[i % 5], **more)
        assert torch.allclose(found[i]["encoder_hidden_states"], text[0][0], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("sd", {"clock": "t", "time_dtype": "int64", "guided": "batch", "rows": ["encoder_hidden_states"]}),
        ("flux", {"clock": "t/1000", "time_dtype": "float32", "guided": "",
                  "rows": ["encoder_hidden_states", "pooled_projections", "guidance"]}),
        ("pixart", {"clock": "t", "guided": "batch", "variance": True,
                    "rows": ["encoder_hidden_states", "encoder_attention_mask"]}),
    ],
)  # fmt: skip
def test_conventions(name, wanted):
    pipe = build(name)
    convention, _ = probe(pipe, "red", call_arguments(pipe, SIZES[name], None, None))
    found = vars(convention)
    assert {k: sorted(v) if k == "rows" else v for k, v in found.items() if k in wanted} == wanted | {
        "rows": sorted(wanted["rows"])
    }
    assert convention.sign == 1 and convention.variance == (name == "pixart")
    assert "step" not in vars(pipe.scheduler)  # nothing is left on the pipeline


def test_what_an_answer_means():
    """Lumina 2's pipeline turns the sign, PixArt's leaves the variance out."""
    x, y = torch.randn(2, 1, 4, 3, 3)
    assert _meaning([x], x) == (1, False) and _meaning([x], -x) == (-1, False)
    guided = y + 7.5 * (x - y)  # far from both
    assert _meaning([y, x], guided) == (1, False) and _meaning([x, y], -guided) == (-1, False)
    assert _meaning([torch.cat((x, x * x), 1)], x) == (1, True)
    with pytest.raises(NotImplementedError, match="not what its scheduler gets"):
        _meaning([x], y)
    assert [_clock([(900.0, told), (300.0, later)]) for told, later in ((900, 300), (0.9, 0.3), (0.1, 0.7))] == [
        "t", "t/1000", "1-t/1000",
    ]  # fmt: skip
    with pytest.raises(NotImplementedError, match="unknown clock"):
        _clock([(900.0, 5.0), (300.0, 4.0)])


def test_arguments_go_round():
    x, y = torch.ones(1), torch.zeros(2)
    tree = {"a": x, "b": {"c": y, "d": None}, "e": (x, y), "f": [1, 2], "g": 0.5}
    assert flatten(tree).keys() == {"a", "b/c", "b/d", "e/#0", "e/#1", "f", "g"}
    assert unflatten(flatten(tree)) == tree
    with pytest.raises(NotImplementedError, match="a is a object"):
        flatten({"a": object()})


class Enough(Exception):
    pass


def test_goes_on(tmp_path, name, data):
    """Stopped in the middle of a file, and with another batch size afterwards: the same samples, nothing twice."""

    def stop(done, total):
        if done >= 6:
            raise Enough

    with pytest.raises(Enough):
        sample(build(name), PROMPTS, settings(name, tmp_path), on_progress=stop)
    assert len(list(tmp_path.glob("samples-*"))) == 1
    with pytest.raises(ValueError, match="lacks 2 of 3 files"):
        Store(tmp_path)
    sample(build(name), PROMPTS, settings(name, tmp_path))
    assert files(tmp_path) == files(data(name))


def test_kill_9(tmp_path, data):
    """At three random moments."""
    wanted = files(data("sd"))
    pipe, chance = build("sd"), random.Random(time.time_ns())

    def slowly(done, total):
        time.sleep(0.05)

    for _ in range(3):
        (child,) = start(lambda: sample(pipe, PROMPTS, settings("sd", tmp_path), on_progress=slowly))
        time.sleep(chance.uniform(0.1, 0.8))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        whole = {k: v for k, v in files(tmp_path).items() if not k.startswith(".")}
        assert all(wanted[k] == v for k, v in whole.items())  # no file is cut
    sample(pipe, PROMPTS, settings("sd", tmp_path))
    assert files(tmp_path) == wanted  # nor is a temporary one left


def test_two_processes_share_the_work(tmp_path, data):
    pipe = build("sd")
    for child in start(lambda: sample(pipe, PROMPTS, settings("sd", tmp_path)), world=2):
        child.join(60)
        assert child.exitcode == 0
    assert files(tmp_path) == files(data("sd"))


def test_full_disk(tmp_path, monkeypatch, data):
    real, calls = store.save_file, []

    def full(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) == 3:  # shared, the first file, the second
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(OSError, match=r"samples-00001.safetensors could not be written \(.*No space left"):
        sample(build("sd"), PROMPTS, settings("sd", tmp_path))
    assert sorted(files(tmp_path)) == ["meta.json", "samples-00000.safetensors", "shared.safetensors"]
    monkeypatch.undo()
    sample(build("sd"), PROMPTS, settings("sd", tmp_path))
    assert files(tmp_path) == files(data("sd"))


def test_another_data_set_is_refused(tmp_path, data):
    before = files(data("sd"))
    for changes, word in ({"seed": 1}, "seed is 0 there, 1"), ({"guidance_scale": 2.0}, "arguments"):
        with pytest.raises(ValueError, match=f"holds another data set: {word}"):
            sample(build("sd"), PROMPTS, settings("sd", data("sd"), **changes))
    with pytest.raises(ValueError, match="prompts"):
        sample(build("sd"), PROMPTS[:2], settings("sd", data("sd")))
    assert files(data("sd")) == before


def test_bad_input(tmp_path, data):
    (tmp_path / "empty.txt").write_text("\n  \n")
    with pytest.raises(ValueError, match="has no prompts in it"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="no prompts"):
        sample(build("sd"), [], settings("sd", tmp_path / "x"))
    with pytest.raises(ValueError, match="shard_size must be at least 1"):
        sample(build("sd"), PROMPTS, settings("sd", tmp_path / "x", shard_size=0))
    with pytest.raises(ValueError, match="holds no data set"):
        Store(tmp_path / "x")
    for name, content in files(data("sd")).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "samples-00001.safetensors").write_bytes(files(data("sd"))["samples-00001.safetensors"][:-100])
    with pytest.raises(ValueError, match="samples-00001.safetensors is damaged"):
        Store(tmp_path)[4]


def test_pictures(tmp_path, name):
    """Real pictures are encoded into what the sampler would end with: decoding gives them back."""
    pipe, size = build(name), SIZES[name]
    for i in range(3):
        pixels = np.full((size, size, 3), 60 * i, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "captions.json").write_text(json.dumps({f"{i}.png": PROMPTS[i] for i in range(3)}))
    config = settings(name, tmp_path / "out", train_data_dir=str(tmp_path), num_samples=None)
    found = sample(pipe, [], config)
    assert len(found) == 3 and found.prompts() == PROMPTS[:3] and found.meta["source"] == "pictures"
    x = torch.full((1, 3, size, size), 60 * 2 / 127.5 - 1)
    wanted = pipe.vae.encode(x).latent_dist.mean
    if name == "flux":
        wanted = pipe._pack_latents(wanted, *wanted.shape)
    assert torch.allclose(found[2]["latents"], wanted[0], atol=1e-4)
    (tmp_path / "captions.json").write_text(json.dumps({"none.png": "red"}))
    with pytest.raises(ValueError, match=r"names none.png, which is not there"):
        sample(pipe, [], config)
