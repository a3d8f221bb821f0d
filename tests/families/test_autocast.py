"""Mixed precision: under autocast some hosts' norms answer in fp32 while values are in half precision."""

import pytest
import torch

import linfusion as lf

from ..models import HOSTS, forward, gap
from .matrix import CONFIGS, table

CELLS = [(h, n) for h, t in HOSTS.items() for n in CONFIGS if table()[t.family][h][n] == "yes"]


@pytest.mark.parametrize(("host", "name"), CELLS)
def test_autocast(host, name):
    tiny = HOSTS[host]
    model, inputs = tiny.build(), tiny.inputs(6, 6 if tiny.square else 9)
    wide = forward(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock = forward(model, inputs)
    exact = forward(lf.apply(model, CONFIGS[name]), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = forward(model, inputs)
    assert out.isfinite().all() and out.shape == exact.shape
    if name == "softmax":  # bit for bit is promised in fp32; here two hosts differ by a rounding
        assert gap(out, wide) < 1.5 * gap(stock, wide) + 1e-6
