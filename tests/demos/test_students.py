"""The students' script: which configs, for how long, and a table of what was measured."""

import json

import pytest
import yaml

import linfusion as lf
from linfusion.demos import train_students
from linfusion.demos.train_students import main, table

from ..distill.tiny import build


def write(folder, name, model):
    content = {"model": model, "mechanism": {"name": "clear", "radius": 2}, "train_batch_size": 1}
    stages = [{"stage": "transfer", "max_train_minutes": 1.0}, {"stage": "end_to_end", "max_train_minutes": 3.0}]
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content | {"stages": stages}))


def test_configs_of_a_model(tmp_path, monkeypatch, capsys):
    """`--minutes` is divided as the config divides its own; a second call takes what the first one wrote."""
    (tmp_path / "configs").mkdir()
    for name, model in (("clear", "emoji-flux"), ("emoji-unet-clear", "emoji-unet"), ("emoji-unet-sla", "emoji-unet")):
        write(tmp_path / "configs", name, model)
    ran = []
    monkeypatch.setattr(train_students, "_together", lambda args, commands: ran.append(commands))
    command = ["--configs", str(tmp_path / "configs"), "--output_dir", str(tmp_path / "out"), "--only", "train"]
    for minutes in ("2", "8"):
        assert main([*command, "--minutes", minutes, "--data_dir", str(tmp_path / "data")]) == 0
    assert [list(commands) for commands in ran] == [["sample"], ["clear"]] * 2
    written = yaml.safe_load((tmp_path / "out" / "clear.yaml").read_text())
    assert [stage["max_train_minutes"] for stage in written["stages"]] == [0.5, 1.5]
    assert main([*command, "sla"]) == 2
    assert "no config for sla of emoji-flux; there are clear" in capsys.readouterr().err


def test_measures(tmp_path, monkeypatch, capsys):
    """Step 0 and every stage, the teacher drawn once; each last adapter gets its own figures and card."""
    (tmp_path / "configs").mkdir()
    pipe = build("flux")
    monkeypatch.setattr(train_students, "demo_pipeline", lambda model, dtype: pipe)
    for name, radius in (("one", 2), ("other", 9)):
        write(tmp_path / "configs", name, "emoji-flux")
        for stage in ("1-transfer", "2-end_to_end"):
            folder = tmp_path / "out" / name / stage / "adapter"
            folder.mkdir(parents=True)
            lf.save(lf.apply(pipe, lf.CLEAR(radius)), folder)
    lf.restore(pipe)
    command = ["--configs", str(tmp_path / "configs"), "--output_dir", str(tmp_path / "out"), "--only", "measure"]
    assert main([*command, "--num_samples", "2", "--batch", "2", "--steps", "1"]) == 0
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    labels = [f"{name} {stage}" for name in ("one", "other") for stage in ("untrained", "1-transfer", "2-end_to_end")]
    [(pixels, found)] = figures["sizes"].items()
    assert found["one untrained psnr"] < 60 < found["other 2-end_to_end psnr"]  # a window over the whole grid is exact
    text = (tmp_path / "out" / "table.md").read_text()
    assert text == table(figures, labels) and text in capsys.readouterr().out
    assert [line.split(" | ")[1] for line in text.splitlines()[2:]] == ["teacher", *labels]
    own = json.loads((tmp_path / "out" / "one" / "2-end_to_end" / "adapter" / "figures.json").read_text())
    assert own["sizes"][pixels]["untrained psnr"] == found["one untrained psnr"]
    assert not any("other" in name for name in own["sizes"][pixels])
    assert "untrained psnr" in (tmp_path / "out" / "one" / "2-end_to_end" / "adapter" / "README.md").read_text()


def test_a_student_that_is_not_there(tmp_path, capsys, monkeypatch):
    (tmp_path / "configs").mkdir()
    write(tmp_path / "configs", "clear", "emoji-flux")
    monkeypatch.setattr(train_students, "demo_pipeline", lambda model, dtype: build("flux"))
    command = ["--configs", str(tmp_path / "configs"), "--output_dir", str(tmp_path / "out"), "--only", "measure"]
    assert main(command) == 2
    assert "holds no adapter; train it first" in capsys.readouterr().err


def test_a_row_without_retrieval_says_so():
    found = {"a psnr": 20.04, "a attention work left": 0.25}
    assert table({"sizes": {"256": found}}, ["a"]).splitlines()[2:] == [
        "| 256 | teacher | 100.0 % | - | - |", "| 256 | a | 25.0 % | - | 20.0 dB |",
    ]  # fmt: skip


@pytest.mark.parametrize("minutes", ["0", "-1"])
def test_no_time(tmp_path, minutes, capsys):
    assert main(["--minutes", minutes, "--output_dir", str(tmp_path)]) == 2
    assert "--minutes must be positive" in capsys.readouterr().err
