"""Whole runs: they learn, go on exactly after a kill, share work between processes, and stop when something breaks."""

import errno
import itertools
import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import linfusion as lf
from linfusion.distill import checkpoint
from linfusion.distill import train as module
from linfusion.distill.config import TrainConfig
from linfusion.distill.health import Diverged
from linfusion.distill.train import train

from .tiny import build, forget, start

LINFUSION = {"name": "linfusion", "mid_dim": 4}


def config(data, folder, **changes):
    given = {
        "mechanism": LINFUSION, "data_dir": data, "output_dir": str(folder), "max_train_steps": 8,
        "train_batch_size": 2, "learning_rate": 3e-3, "checkpointing_steps": 3, "logging_steps": 1, "rank": 2,
        "lr_scheduler": "cosine", "lr_warmup_steps": 2, "adapter_dtype": "fp32",
    }  # fmt: skip
    return TrainConfig(**given | changes)


def run(name, data, folder, **changes):
    forget()
    return train(build(name), config(data(name), folder, **changes))


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [row["loss"] for row in rows(folder)]


def state(folder):
    """What a run leaves, but for times."""
    return rows(folder), {k: v.tolist() for k, v in load_file(Path(folder) / "adapter" / "model.safetensors").items()}


@pytest.mark.parametrize("stage", ["transfer", "end_to_end"])
@pytest.mark.parametrize("trainable", ["mechanism", "mechanism+qkvo", "mechanism+lora"])
def test_learns(tmp_path, name, stage, trainable, data):
    """The loss falls, and the adapter alone makes a fresh pipeline answer as the trained student."""
    settings = {"stage": stage, "trainable": trainable, "max_train_steps": 16, "train_batch_size": 4}
    run(name, data, tmp_path / "still", learning_rate=0.0, **settings)
    folder = run(name, data, tmp_path / "run", learning_rate=1e-2 if stage == "transfer" else 5e-3, **settings)
    better = [a < b for a, b in zip(losses(tmp_path / "run"), losses(tmp_path / "still"), strict=True)]
    assert all(better[-8:])  # on the same batches
    pipe = build(name)
    settings = {"num_inference_steps": 2, "output_type": "latent", "height": 64 if name == "sd" else 24}
    settings["width"] = settings["height"]
    if name == "flux":
        settings["max_sequence_length"] = 16

    def draw():
        return pipe("red apple", generator=torch.Generator().manual_seed(0), **settings).images

    stock = draw()
    lf.apply(pipe, lf.LinFusion(mid_dim=4))
    untrained = draw()
    lf.load(pipe, folder)
    assert not torch.allclose(draw(), untrained, atol=1e-3)
    lf.restore(pipe)
    assert torch.equal(draw(), stock)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "training.json",
    ]
    card = (folder / "README.md").read_text()
    assert "LinFusion(mid_dim=4) in 4 layers" in card and trainable in card and "16 steps of 4 samples" in card


def test_the_adapter_is_the_student(tmp_path, data, monkeypatch):
    kept = {}
    finish = module.Run.finish

    def keep(self, *args):
        kept["student"] = self.stage.student
        return finish(self, *args)

    monkeypatch.setattr(module.Run, "finish", keep)
    for trainable in ("mechanism+qkvo", "mechanism+lora"):
        folder = run("flux", data, tmp_path / trainable, trainable=trainable)
        fresh = lf.load(build("flux").transformer, folder)
        inputs = {
            "hidden_states": torch.randn(1, 9, 16), "encoder_hidden_states": torch.randn(1, 4, 128),
            "pooled_projections": torch.randn(1, 128), "timestep": torch.tensor([0.5]), "guidance": torch.ones(1),
            "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(3.0)),
            "txt_ids": torch.zeros(4, 3), "return_dict": False,
        }  # fmt: skip
        with torch.no_grad():
            assert torch.allclose(fresh(**inputs)[0], kept["student"](**inputs)[0], atol=1e-4)


def test_a_length_in_minutes(tmp_path, data, monkeypatch):
    """The learning rate comes down to zero in time, and the adapter is of the steps that fitted."""
    clock = itertools.count(1)  # a second a step
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    folder = run("sd", data, tmp_path, max_train_steps=10**6, max_train_minutes=1 / 6, lr_scheduler="constant")
    rates = [row["lr"] / 3e-3 for row in rows(tmp_path)]
    assert rates == pytest.approx([1.0] * 8 + [0.75, 0.5, 0.25])
    assert json.loads((folder / "training.json").read_text())["steps"] == len(rates)


@pytest.mark.parametrize("changes", [{}, {"use_ema": True, "stage": "transfer", "gradient_accumulation_steps": 2}])
def test_goes_on_exactly(tmp_path, changes, data):
    """Stopped at step 5 of 8, and at a place between two lines of the log."""
    changes = changes | {"logging_steps": 2}
    run("sd", data, tmp_path / "whole", **changes)

    class Enough(Exception):
        pass

    def stop(step, total, words):
        if step == 5:
            raise Enough

    with pytest.raises(Enough):
        train(build("sd"), config(data("sd"), tmp_path / "broken", **changes), on_progress=stop)
    assert [p.name for p in sorted((tmp_path / "broken").glob("checkpoint-*"))] == ["checkpoint-3"]
    run("sd", data, tmp_path / "broken", resume_from_checkpoint="latest", **changes)
    assert state(tmp_path / "broken") == state(tmp_path / "whole")
    names = [p.name for p in sorted((tmp_path / "broken").glob("*checkpoint-*"))]
    assert names == ["checkpoint-6", "checkpoint-8"]  # two are kept


def test_kill_9(tmp_path, data):
    """At three random moments; then the same command ends as an unbroken run does."""
    settings = {"resume_from_checkpoint": "latest", "checkpointing_steps": 2}
    run("sd", data, tmp_path / "whole", **settings)
    one = config(data("sd"), tmp_path / "killed", **settings)
    pipe, chance = build("sd"), random.Random(time.time_ns())
    for _ in range(3):
        (child,) = start(lambda: train(pipe, one, on_progress=lambda *_: time.sleep(0.03)))
        time.sleep(chance.uniform(0.2, 0.7))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        for path in (tmp_path / "killed").glob("checkpoint-*"):
            assert (path / "run.json").is_file() and load_file(path / "trained.safetensors")
    run("sd", data, tmp_path / "killed", **settings)
    assert state(tmp_path / "killed") == state(tmp_path / "whole")


@pytest.mark.parametrize("stage", ["transfer", "end_to_end"])
def test_two_processes_are_one_with_twice_the_batch(tmp_path, stage, data):
    """gloo on the CPU; sums are in another order, so equal up to rounding."""
    settings = {"stage": stage, "use_ema": True, "gradient_accumulation_steps": 2, "max_train_steps": 4}
    run("sd", data, tmp_path / "one", train_batch_size=2, **settings)
    two = config(data("sd"), tmp_path / "two", train_batch_size=1, **settings)
    pipe = build("sd")
    for child in start(lambda: train(pipe, two), world=2):
        child.join(60)
        assert child.exitcode == 0
    run("sd", data, tmp_path / "half", train_batch_size=1, **settings)
    one, both, half = (losses(tmp_path / name) for name in ("one", "two", "half"))
    assert len(one) == 4 and all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(one, both, strict=True))
    assert not any(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(one, half, strict=True))
    a, b = (load_file(tmp_path / name / "adapter" / "model.safetensors") for name in ("one", "two"))
    # AdamW divides by tiny second moments at first, which makes much of rounding
    assert all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)


def poison(stage, place):
    """From the third forward on, a layer answers with NaN."""
    count = {"forwards": 0}
    stage.register_forward_pre_hook(lambda *_: count.update(forwards=count["forwards"] + 1))

    def hook(layer, args, kwargs, output):
        return output * math.nan if count["forwards"] >= 5 else output

    layer = stage.student.get_submodule(place)
    layer.register_forward_hook(hook, with_kwargs=True)
    layer._forward_hooks.move_to_end(next(iter(layer._forward_hooks)))  # the stage's own hook comes after


@pytest.mark.parametrize("stage", ["transfer", "end_to_end"])
def test_nan_names_the_first_layer(tmp_path, stage, data, monkeypatch):
    """In the order in which layers run, which is not the order of their names in a UNet."""
    place = "mid_block.attentions.0.transformer_blocks.0.attn1"
    real = module.build

    def build_poisoned(*args):
        built = real(*args)
        poison(built[0], place)
        return built

    monkeypatch.setattr(module, "build", build_poisoned)
    with pytest.raises(Diverged, match=rf"Not finite by step 6, first in {place}\. The last checkpoint is .*-3"):
        run("sd", data, tmp_path, stage=stage, logging_steps=6)
    checked = load_file(tmp_path / "checkpoint-3" / "trained.safetensors")
    assert all(t.isfinite().all() for t in checked.values()) and not (tmp_path / "checkpoint-6").exists()
    monkeypatch.undo()
    run("sd", data, tmp_path, stage=stage, logging_steps=6, resume_from_checkpoint="latest")  # nothing was lost
    assert (tmp_path / "adapter").is_dir()


def test_full_disk(tmp_path, data, monkeypatch):
    run("sd", data, tmp_path / "whole")
    real, calls = checkpoint.write_tensors, []

    def full(path, tensors):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(OSError, match="checkpoint-6 could not be written.*The last checkpoint is .*checkpoint-3"):
        run("sd", data, tmp_path / "full")
    names = sorted(p.name for p in (tmp_path / "full").iterdir() if "checkpoint" in p.name)
    assert names == ["checkpoint-3"]
    monkeypatch.undo()
    run("sd", data, tmp_path / "full", resume_from_checkpoint="latest")
    assert state(tmp_path / "full") == state(tmp_path / "whole")


def test_folders_of_other_runs(tmp_path, data):
    run("sd", data, tmp_path)
    before = state(tmp_path)
    with pytest.raises(ValueError, match="holds checkpoint-8 of a run: --resume_from_checkpoint latest"):
        run("sd", data, tmp_path)
    for changes, word in (
        ({"seed": 1}, "seed is 0 there, 1"),
        ({"mechanism": {"name": "linfusion", "mid_dim": 8}}, "mechanism is"),
        ({"train_batch_size": 1}, "train_batch_size is 2 there"),
    ):
        with pytest.raises(ValueError, match=f"is of another run: {word}.*Nothing was changed"):
            run("sd", data, tmp_path, resume_from_checkpoint="latest", **changes)
    with pytest.raises(ValueError, match=r"is no checkpoint: it lacks run.json"):
        run("sd", data, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-99"))
    assert state(tmp_path) == before
    weights = tmp_path / "checkpoint-8" / "trained.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ValueError, match="checkpoint-8 is damaged"):
        run("sd", data, tmp_path, resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mechanism": {}}, "Which mechanism"),
        ({"mechanism": {"name": "clear"}}, "clear needs radius"),
        ({"mechanism": {"name": "clear", "radius": 2}, "trainable": "mechanism"}, "CLEAR has no parameters"),
        ({"mechanism": {"name": "softmax"}, "trainable": "mechanism"}, "Softmax has no parameters"),
        ({"layers": ["nothing.*"]}, "matches none of the 4 layers"),
        ({"data_dir": "/nowhere"}, "holds no data set"),
        ({"max_train_steps": 0}, "max_train_steps must be at least 1"),
        ({"max_train_minutes": 0.0}, "max_train_minutes must be a positive number"),
        ({"task_weight": 0.0, "output_weight": 0.0, "attention_weight": 0.0}, "nothing to learn from"),
        ({"weighting_scheme": "mode"}, "for flow models"),
        ({"init_adapter": "/nowhere"}, "no folder here"),
    ],
)
def test_bad_input(tmp_path, changes, message, data):
    with pytest.raises(ValueError, match=message):
        run("sd", data, tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_a_mechanism_that_the_model_lacks(tmp_path, data):
    with pytest.raises(NotImplementedError, match="AgentSD"):
        run("flux", data, tmp_path, mechanism={"name": "agent-sd"})


@pytest.mark.parametrize("trainable", ["mechanism+qkvo", "mechanism+lora"])
def test_stage_after_stage(tmp_path, trainable, data):
    """The second begins where the first ended."""
    first = run("sd", data, tmp_path / "a", trainable=trainable, stage="transfer", learning_rate=2e-2)
    settings = {"trainable": trainable, "max_train_steps": 1, "learning_rate": 0.0, "lr_warmup_steps": 0}
    second = run("sd", data, tmp_path / "b", init_adapter=str(first), mechanism={}, **settings)
    a, b = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)
    run("sd", data, tmp_path / "c", **settings)
    assert abs(losses(tmp_path / "b")[0] - losses(tmp_path / "c")[0]) > 1e-4
    with pytest.raises(ValueError, match=r"is of LinFusion\(mid_dim=4\), LinFusion\(\) was asked for"):
        run("sd", data, tmp_path / "d", init_adapter=str(first), mechanism={"name": "linfusion"}, **settings)
    with pytest.raises(ValueError, match="would leave out"):
        run("sd", data, tmp_path / "d", init_adapter=str(first), **settings | {"trainable": "mechanism"})


def test_a_model_that_predicts_a_variance(tmp_path, data):
    """PixArt: its own masks of padded text, and LiT's term on the second half of its answer."""
    settings = {"mechanism": {"name": "lit"}, "train_batch_size": 4, "trainable": "mechanism+qkvo"}
    for folder, weight in (("a", 1000.0), ("b", 0.0)):  # an untrained model's variance is all but the same
        run("pixart", data, tmp_path / folder, variance_weight=weight, **settings)
        row = rows(tmp_path / folder)[0]
        wanted = row["task"] + 0.5 * (row["output"] + row["attention"]) + weight * row["variance"]
        assert math.isclose(row["loss"], wanted, rel_tol=1e-5) and row["variance"] > 0
    assert losses(tmp_path / "a")[0] > 1.01 * losses(tmp_path / "b")[0]


def test_half_precision(tmp_path, name, data):
    """Frozen weights in bf16 under autocast, pictures included; the losses are those of fp32 within rounding."""
    settings = {"validation_prompts": ["red apple"], "validation_steps": 8, "num_inference_steps": 1}
    folder = run(name, data, tmp_path / "bf16", mixed_precision="bf16", adapter_dtype="bf16", **settings)
    run(name, data, tmp_path / "fp32")
    a, b = losses(tmp_path / "bf16"), losses(tmp_path / "fp32")
    assert a != b and all(math.isclose(x, y, rel_tol=0.05) for x, y in zip(a, b, strict=True))
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert lf.describe(lf.load(build(name), folder)).replaced == 4


def test_pictures_and_trackers(tmp_path, data):
    pytest.importorskip("tensorboard")
    folder = run(
        "sd", data, tmp_path, validation_prompts=["red apple", "green"], validation_steps=4, num_inference_steps=1,
        use_ema=True, report_to="tensorboard",
    )  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "validation").iterdir()) == ["step-000004.png", "step-000008.png"]
    assert (folder / "sheet.png").is_file() and "![teacher and student](sheet.png)" in (
        folder / "README.md"
    ).read_text()
    assert list((tmp_path / "logs").rglob("events.*"))
    plain = tmp_path / "plain"
    run("sd", data, plain, use_ema=True)  # drawing changes nothing
    assert losses(plain) == losses(tmp_path)
    shutil.rmtree(plain)
