"""The local branch on Triton's kernels: one pass, the text carried along."""

import pytest
import torch

from linfusion.call import AttnCall
from linfusion.kernels import depthwise_launch
from linfusion.kernels.backend import interpreted
from linfusion.mechanisms.local import LocalBranch


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize(("text", "first"), [(0, True), (3, True), (3, False)], ids=["no-text", "first", "last"])
def test_one_pass(monkeypatch, text, first, heads):
    pytest.importorskip("triton")
    branch = LocalBranch(32 // (heads or 4), 3)
    for p in branch.parameters():
        torch.nn.init.normal_(p)
    v, out = torch.randn(2, 2, 12 + text, 4, 8).requires_grad_().unbind()
    call = AttnCall(v, v, v, grid=(3, 4), text=text, text_first=first)
    want = branch(call, out, heads)
    grad = torch.randn_like(want)
    wanted = torch.autograd.grad(want, (v, out, *branch.parameters()), grad)

    passes, convolve = [], depthwise_launch.convolve
    monkeypatch.setattr("linfusion.kernels.depthwise.convolve", lambda *a, **k: passes.append(a) or convolve(*a, **k))
    monkeypatch.setattr(torch, "cat", None)  # nothing is joined
    with interpreted():
        got = branch(call, out, heads)
        assert len(passes) == 1 and passes[0][3].data_ptr() == call.split(out)[1].data_ptr()
        torch.testing.assert_close(got, want)
        grads = torch.autograd.grad(got, (v, out, *branch.parameters()), grad)
    for name, a, b in zip(("v", "out", "weight", "bias"), grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
