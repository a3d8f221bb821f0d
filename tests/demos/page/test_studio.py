"""What jobs do with a pipeline, and that it is afterwards as it was."""

from dataclasses import replace

import numpy as np
import pytest

import linfusion as lf
from linfusion.demos.page.jobs import Cancelled, Job
from linfusion.demos.page.studio import Studio
from linfusion.pipelines.settings import Settings, read

from ...models.parts import stable_diffusion

SETTINGS = Settings("red apple", model="tiny", size=64, steps=2, guidance=2.0)


@pytest.fixture
def studio(tmp_path):
    pipe = stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    studio = Studio(pipe, "tiny", folder=tmp_path)
    studio.low, studio.multiple = 64, 32
    return studio


def job():
    return Job("a", lambda job: None, total=9)


def test_a_unet(studio):
    """Its own size, and the mechanism that only UNets have."""
    assert "agent-sd" in studio.choices and studio.size in studio.sizes()
    studio.check(SETTINGS)
    config = lf.AgentSD(merge=0.3).to_dict()
    one, other = (studio.draw(job(), replace(SETTINGS, mechanism=m)) for m in (None, config))
    assert not np.array_equal(one.image, other.image) and one.work == 1 and 0 < other.work < 1
    assert read(other.file).mechanism == config and other.file.is_relative_to(studio.folder)
    original, changed = studio.compare(job(), SETTINGS, [config])
    assert np.array_equal(original.image, one.image) and np.array_equal(changed.image, other.image)
    assert original.psnr is None and 0 < changed.psnr < 100
    with pytest.raises(NotImplementedError, match="merges patches"):
        studio.look(job(), replace(SETTINGS, mechanism=config), 1)
    assert lf.describe(studio.pipe).replaced == 0 and not studio.pipe.unet._forward_pre_hooks


def test_work_that_is_stopped_leaves_the_model_as_it_was(studio):
    stopped = job()
    reported = stopped.report

    def report(done=None, *arguments, **more):
        if done == 1:
            stopped.stop.set()
        reported(done, *arguments, **more)

    stopped.report = report
    with pytest.raises(Cancelled):
        studio.draw(stopped, replace(SETTINGS, mechanism=lf.CLEAR(2).to_dict()))
    assert lf.describe(studio.pipe).replaced == 0 and not list(studio.folder.rglob("*.png"))


def test_file_names_are_not_the_visitors(studio):
    for prompt in ("../../etc/passwd", "a/b\\c\0.png", "été ☃", "x" * 500):
        file = studio._file(replace(SETTINGS, prompt=prompt))
        assert file.parent.parent == studio.folder and len(file.name) < 60 and ".." not in file.name


def test_another_model(studio):
    """Where visitors may load one, it takes the other's place, or nothing changes."""
    flux = lf.demo_pipeline()
    models = {"emoji-flux": flux, "broken": object()}
    studio.load = models.__getitem__
    before = studio.pipe
    with pytest.raises((ValueError, AttributeError, TypeError), match="object"):
        studio.open(job(), "broken")
    assert studio.pipe is before and studio.model == "tiny" and "agent-sd" in studio.choices
    with pytest.raises(ValueError, match="folder or Hub id"):
        studio.open(job(), " ")
    assert studio.open(job(), " emoji-flux ") == "emoji-flux"
    assert studio.pipe is flux and "agent-sd" not in studio.choices and studio.guidance == 3.0
