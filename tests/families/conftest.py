"""Here every test of a host runs on all of them: a family is tested by being registered."""

import pytest

from ..models import HOSTS


@pytest.fixture(params=list(HOSTS))
def tiny(request):
    """Each tiny host in turn."""
    return HOSTS[request.param]


@pytest.fixture
def inputs(tiny):
    """Arguments of a forward, batch 2, whose finest attention grid is 6 x 9 (6 x 6 where it must be square)."""
    return tiny.inputs(6, 6 if tiny.square else 9)
