"""Fixtures that the tests of hosts share; the models themselves are in `models/`."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the Hub for anything; read when its client is imported

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when kernels are defined; `backend.interpreted` then uses them
    os.environ.setdefault("TRITON_INTERPRET", "1")

from .models import TINY

# tensors here are tiny: threads that wait for each other cost more than they bring, a lot more on a busy machine
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=list(TINY))
def tiny(request):
    """Each tiny host in turn."""
    return TINY[request.param]


@pytest.fixture
def model(tiny):
    return tiny.build()


@pytest.fixture
def inputs(tiny):
    """Arguments of a forward, batch 2, whose finest attention grid is 6 x 9."""
    return tiny.inputs(6, 9)
