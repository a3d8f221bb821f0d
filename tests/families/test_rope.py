"""The rotation as tables, for kernels, is the host's own function."""

import pytest

import linfusion as lf
from linfusion.kernels import RopeTables
from linfusion.kernels.rotary import rotate

from ..models import forward, gap


def test_tables_are_the_hosts_rotation(tiny, model, inputs):
    calls = []
    lf.apply(model, lf.LinFusion())
    for module in model.modules():
        if hasattr(module, "linfusion"):
            module.linfusion.register_forward_hook(lambda m, args, out: calls.append(args[0]))
    forward(model, inputs)
    assert len(calls) == tiny.layers
    turning = [call for call in calls if call.rope is not None]
    if not turning:
        pytest.skip("this host does not rotate")
    for call in turning:
        x = call.q if call.rope.covers_text else call.split(call.q)[1]
        tables = call.rope.tables
        assert gap(rotate(x, tables), call.rope(x)) < 1e-6
        assert gap(rotate(x, RopeTables(tables.cos, -tables.sin, tables.interleaved)), call.rope(x)) > 1e-2
        assert gap(rotate(x, tables._replace(interleaved=not tables.interleaved)), call.rope(x)) > 1e-2
