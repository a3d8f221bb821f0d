"""The kernel of norms, rotation and joining, run by Triton's interpreter inside every host."""

import pytest
import torch

import linfusion as lf
from linfusion import call as call_module
from linfusion.kernels.backend import interpreted

from ..models.base import forward


@pytest.fixture
def fused(monkeypatch):
    """Head dims of the calls whose norms and rotation one kernel did."""
    seen = []

    def counted(q, *args, **settings):
        seen.append(q.shape[-1])
        return kernel(q, *args, **settings)

    kernel = call_module.qk_norm_rope
    monkeypatch.setattr(call_module, "qk_norm_rope", counted)
    return seen


def test_softmax_through_the_kernel_equals_the_host(tiny, model, inputs, fused):
    want = forward(model, inputs)
    lf.apply(model, lf.Softmax())
    with interpreted():
        got = forward(model, inputs)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


def test_without_it_the_host_keeps_its_bits(tiny, model, inputs, fused):
    want = forward(model, inputs)
    lf.apply(model, lf.Softmax(), fuse_prologue=False)
    with interpreted():
        assert torch.equal(forward(model, inputs), want)
    assert not fused
