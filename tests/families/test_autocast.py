"""Mixed precision: under autocast some hosts' norms answer in fp32 while values are in half precision."""

import pytest
import torch

import linfusion as lf

from ..models import forward, gap
from .matrix import CONFIGS, answer


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast(tiny, model, inputs, name):
    if answer(tiny, CONFIGS[name]) != "yes":
        pytest.skip("refused, see docs/support.json")
    wide = forward(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock = forward(model, inputs)
    exact = forward(lf.apply(model, CONFIGS[name]), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = forward(model, inputs)
    assert out.isfinite().all() and out.shape == exact.shape
    if name == "softmax":  # hosts cast back and forth at places of their own, so not bit for bit
        assert gap(out, wide) < 1.5 * gap(stock, wide) + 1e-6
