"""`linfusion distill` from the command line, and its settings."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import linfusion as lf
from linfusion.cli import build_parser, main
from linfusion.demos.emoji.evaluate import top_1
from linfusion.demos.emoji.models import Sizes, build_unet
from linfusion.distill.config import SampleConfig, TrainConfig, fields_of, merge, read_yaml
from linfusion.distill.data.store import Store
from linfusion.distill.student import asked_for
from linfusion.distill.trainable import add_lora, choose, projections

from .tiny import PROMPTS, build

CONFIGS = sorted((Path(__file__).parents[2] / "distill" / "configs").rglob("*.yaml"))


def test_all_of_it(tmp_path, capsys):
    """A folder of a pipeline, a prompt file, and three commands."""
    build("sd").save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    shared = ["--model", str(tmp_path / "model"), "--num_inference_steps", "2"]
    prompts, size = ["--prompts", str(tmp_path / "prompts.txt")], ["--resolution", "64"]
    data = ["--output_dir", str(tmp_path / "data"), "--num-samples", "6", "--shard_size", "3"]
    assert main(["distill", "sample", *shared, *prompts, *size, *data]) == 0
    assert json.loads(capsys.readouterr().out) == {"samples": 6, "folder": str(tmp_path / "data")}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({
        "mechanism": {"name": "clear", "radius": 3}, "train_batch_size": 2, "rank": 2, "learning_rate": "1e-3",
        "stages": [{"stage": "transfer", "max_train_steps": 2}, {"stage": "end_to_end", "max_train_steps": 3}],
    }))  # fmt: skip
    train = ["distill", "train", "--config", str(tmp_path / "two.yaml"), *shared, "--data_dir", str(tmp_path / "data")]
    train += ["--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "latest", "--radius", "2.5"]
    assert main([*train, "--mechanism", "clear"]) == 0
    adapter = tmp_path / "run" / "2-end_to_end" / "adapter"
    assert json.loads(capsys.readouterr().out) == {"adapter": str(adapter)}
    assert lf.describe(lf.load(build("sd"), adapter)).replaced == 4
    facts = json.loads((adapter / "training.json").read_text())
    assert facts["steps"] == 3 and facts["mechanism"] == "CLEAR(radius=2.5)" and facts["base_model"].endswith("model")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    assert main([*train, "--mechanism", "clear"]) == 0  # again: all is done
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
    capsys.readouterr()
    # flags win over every stage: the first goes on, and the second is no longer what would follow it
    assert main([*train, "--mechanism", "clear", "--max_train_steps", "4"]) == 2
    assert "2-end_to_end/checkpoint-3 is of another run: init_adapter" in capsys.readouterr().err.replace("\n", "")
    assert json.loads((tmp_path / "run" / "1-transfer" / "adapter" / "training.json").read_text())["steps"] == 4
    capsys.readouterr()
    command = ["distill", "eval", *shared, *prompts, *size, "--adapter", str(adapter), "--num_samples", "2"]
    assert main([*command, "--untrained", "--scales", "1", "1.5"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["sizes"]["96"]["student psnr"] != figures["sizes"]["96"]["untrained psnr"]
    assert "| untrained psnr |" in (adapter / "README.md").read_text()


def test_a_run_that_diverges(tmp_path, data, capsys):
    """One line, and no traceback."""
    build("sd").save_pretrained(tmp_path / "model")
    command = ["distill", "train", "--model", str(tmp_path / "model"), "--data_dir", data("sd"), "--mechanism", "lit"]
    command += ["--output_dir", str(tmp_path / "run"), "--learning_rate", "1e30", "--max_train_steps", "4"]
    assert main([*command, "--train_batch_size", "2", "--logging_steps", "1"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "Not finite by step 2, first in down_blocks.0" in error and "There is no checkpoint yet" in error


def test_retrieval(tmp_path):
    """The share of pictures whose nearest picture of the data has their caption."""
    pixels = torch.rand(3, 3, 256, 256).mul(255).byte()
    for i, picture in enumerate(pixels):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    (tmp_path / "captions.json").write_text(json.dumps({f"{i}.png": name for i, name in enumerate("abc")}))
    measure = top_1(tmp_path)
    assert measure(pixels / 255, ["a", "B", "c"]) == 1 and measure(pixels / 255, ["a", "c", "b"]) == 1 / 3


def test_flags_are_fields():
    """Every setting has a flag of its name, and what is given arrives with its type."""
    parser = build_parser()
    train = ["distill", "train", "--use_ema", "--no-allow_tf32", "--learning-rate", "3e-4", "--stage", "transfer"]
    args = parser.parse_args([*train, "--validation_prompts", "a b", "c", "--max_train_steps", "7"])
    given = {k.removeprefix("of_"): v for k, v in vars(args).items() if k.startswith("of_") and v is not None}
    assert given == {
        "use_ema": True, "allow_tf32": False, "learning_rate": 3e-4, "stage": "transfer",
        "validation_prompts": ["a b", "c"], "max_train_steps": 7,
    }  # fmt: skip
    assert {f"of_{name}" for name in fields_of(TrainConfig)} - {"of_mechanism", "of_stages"} <= set(vars(args))


def test_settings():
    merged = merge(TrainConfig, {"learning_rate": "1e-4", "seed": 1}, {"seed": 2})  # YAML reads 1e-4 as text
    assert (merged.learning_rate, merged.seed, merged.rank) == (1e-4, 2, TrainConfig().rank)
    for wrong, message in (
        ({"rnak": 1}, "no setting 'rnak'"),
        ({"rank": "many"}, "rank must be int, got 'many'"),
        ({"rank": 1.5}, "rank must be int"),
        ({"stage": "third"}, "stage must be transfer or end_to_end"),
        ({"validation_prompts": "one"}, "must be a list"),
        ({"use_ema": 1}, "use_ema must be bool"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(TrainConfig, wrong)
    assert all(f.metadata["help"] for c in (TrainConfig, SampleConfig) for f in dataclasses.fields(c))


def test_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text("[1, 2]")
    with pytest.raises(ValueError, match="must hold names and values"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is no YAML"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(ValueError, match="cannot be read"):
        read_yaml(tmp_path / "b.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_committed_configs(path):
    """They fit the settings, and the embedded model takes their mechanism in every layer."""
    content = read_yaml(path)
    model = content.pop("model")
    whole = merge(TrainConfig, content)
    for stage in whole.stages:
        merge(TrainConfig, content, stage)
    host = lf.demo_pipeline(model).transformer if model == "emoji-flux" else build_unet(Sizes())
    wanted = {name for name, _ in lf.families()[type(host).__name__].layers(host)}
    mechanisms = asked_for(whole.mechanism)
    report = lf.describe(lf.apply(host, mechanisms))
    assert {layer.layer for layer in report.layers if layer.mechanism is not None} == wanted
    if path.stem == "emoji-unet-clear":  # a quarter of each layer's own grid
        host(torch.zeros(1, 8, 32, 32), torch.tensor([1]), torch.zeros(1, 16, 128))
        layers = [layer for layer in lf.describe(host).layers if layer.mechanism is not None]
        assert {(layer.grid[0], layer.mechanism) for layer in layers} == {
            (32, "CLEAR(radius=8)"), (16, "CLEAR(radius=4)"),
        }  # fmt: skip
    pytest.importorskip("peft")
    targets = projections(host, wanted)
    add_lora(host, targets, whole.rank, whole.lora_alpha)
    trained = choose(host, sorted(wanted), whole.trainable, targets)
    assert 2 * sum(p.numel() for p in trained.values()) < 0.6e6, "bytes in bf16: ten have to fit into the repository"


def test_there_is_a_config_for_every_mechanism_that_learns():
    mechanisms = ["linfusion", "clear", "sla", "lit", "agent"]
    found = {p.stem for p in CONFIGS if p.parent.name == "configs"}
    assert found == {prefix + m for m in mechanisms for prefix in ("", "emoji-unet-")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data_dir", "/nowhere", "--mechanism", "lit"], "holds no data set"),
        (["train", "--mechanism", "clear"], "clear needs radius"),
        (["train", "--config", "/nowhere.yaml"], "cannot be read"),
        (["sample", "--prompts", "/nowhere.txt"], "cannot be read"),
        (["eval", "--adapter", "/nowhere"], "no folder here"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert main(["distill", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1] and error[-1].startswith("linfusion: error: ")


def test_built_in_prompts(tmp_path, capsys):
    """Of the embedded model: its captions, spread over the alphabet."""
    arguments = ["--output_dir", str(tmp_path), "--num_samples", "2", "--num_inference_steps", "1"]
    assert main(["distill", "sample", *arguments]) == 0
    prompts = Store(tmp_path).prompts()
    assert len(prompts) == 2 and prompts[0][0] < prompts[1][0]
    assert not lf.demo_pipeline().unknown_words(" ".join(prompts))
