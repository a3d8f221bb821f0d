"""Fixtures of the trainer's tests."""

import pytest

from linfusion.distill.data.sample import sample

from .tiny import PROMPTS, build, forget, settings


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its settings for the length of a process."""
    yield
    forget()


@pytest.fixture(params=["sd", "flux"])
def name(request):
    return request.param


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data set of ten samples for each tiny pipeline, by its name."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp(name) / "data")
            sample(build(name), PROMPTS, settings(name, made[name]))
            forget()
        return made[name]

    return get
