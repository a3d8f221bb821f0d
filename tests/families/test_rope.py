"""The rotation that kernels get as tables is the one that the host applies."""

import pytest
import torch

import linfusion as lf
from linfusion.kernels.rotary import rotate

from ..models import forward, gap


def calls(model, inputs) -> list:
    """Every `AttnCall` of one forward."""
    seen = []
    lf.apply(model, lf.Softmax())
    for module in model.modules():
        if hasattr(module, "linfusion"):
            module.linfusion.register_forward_pre_hook(lambda mechanism, args: seen.append(args[0]))
    forward(model, inputs)
    return seen


def test_tables_are_the_hosts_rotation(model, inputs):
    rotated = [call for call in calls(model, inputs) if call.rope is not None]
    if not rotated:
        pytest.skip("this host rotates nothing")
    for call in rotated:
        x, tables = call.normalised()[0], call.rope.tables
        if not call.rope.covers_text:
            x = call.split(x)[1]
        want = call.rope(x)
        assert want.shape == x.shape
        torch.testing.assert_close(rotate(x, tables), want, atol=1e-6, rtol=1e-5)
        assert gap(rotate(x, tables._replace(interleaved=not tables.interleaved)), want) > 1e-2
        assert gap(rotate(x, tables._replace(sin=-tables.sin)), want) > 1e-2
        image = call.split(call.rotated()[0])[1]
        assert gap(rotate(call.split(call.normalised()[0])[1], call.image_tables()), image) < 1e-6
