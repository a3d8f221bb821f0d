"""The kernel of norms, rotation and joining, run by Triton's interpreter inside every host."""

import copy

import pytest
import torch

import linfusion as lf
from linfusion import call as call_module
from linfusion.kernels.backend import interpreted

from ..models import HOSTS, Tiny, cast, forward, gap, whole


@pytest.fixture
def fused(monkeypatch):
    """The settings of each call of the kernel."""
    seen = []

    def counted(*args, **settings):
        seen.append(settings)
        return kernel(*args, **settings)

    kernel = call_module.qk_norm_rope
    monkeypatch.setattr(call_module, "qk_norm_rope", counted)
    return seen


def small(tiny: Tiny) -> dict:
    """The interpreter's time goes by the token."""
    return tiny.inputs(2, 2 if tiny.square else 3)


def layers(model) -> list:
    return [m for m in model.modules() if hasattr(m, "linfusion")]


def takes_it(attn) -> bool:
    """Layers with RMS norms, or a rotation and no norms; layer norms are the host's own business."""
    norm = type(attn.norm_q).__name__
    assert norm in ("RMSNorm", "LayerNorm", "FP32LayerNorm", "NoneType"), f"may the kernel do a {norm}?"
    return norm == "RMSNorm" or (norm == "NoneType" and attn.linfusion.site.rotary)


def test_softmax_through_the_kernel_is_as_exact_as_the_host(tiny, fused):
    if tiny is HOSTS.get("z-image-padded"):
        pytest.skip("the layers of z-image, with so much padding that the interpreter takes a quarter of a minute")
    dtype = torch.float16
    exact = forward(tiny.build().double(), cast(small(tiny), torch.float64))
    model, inputs = tiny.build().to(dtype), cast(small(tiny), dtype)
    stock = forward(model, inputs)
    lf.apply(model, lf.Softmax())
    with interpreted():
        got = forward(model, inputs)
    assert len(fused) == sum(map(takes_it, layers(model)))

    def error(x):
        return (x.double() - exact).square().mean().sqrt()

    assert error(got) <= 2 * error(stock)


def test_without_it_the_host_keeps_its_bits(tiny, model, inputs, fused, tmp_path):
    want = forward(model, inputs)

    def check():
        with interpreted():
            assert torch.equal(forward(model, inputs), want)
        assert not any(attn.linfusion.fuse_prologue for attn in layers(model)) and layers(model)

    lf.apply(model, lf.Softmax(), fuse_prologue=False)
    check()
    lf.save(model, tmp_path / "a")
    lf.load(model, tmp_path / "a", fuse_prologue=False)
    check()
    with lf.applied(model, lf.Softmax(), fuse_prologue=False):
        check()
    if hasattr(model, "set_attn_processor"):
        model.set_attn_processor(lf.attn_processors(model, lf.Softmax(), fuse_prologue=False))
        check()
    assert not fused
    with pytest.raises(ValueError, match="fuse_prologue must be true or false, got 'no'"):
        lf.apply(model, lf.Softmax(), fuse_prologue="no")


KINDS = [name for name in ("flux", "wan", "lumina2-padded") if name in HOSTS]
"""Text apart and joined; norms across heads; an angle for each token of each sample and fewer heads of keys."""

CONFIGS = [
    lf.LinFusion(mid_dim=4), lf.LinFusion(mid_dim=4, text="linear"), lf.CLEAR(1.5, pool=2),
    lf.SLA(topk=0.4, block_q=16, block_k=16), lf.LiT(kernel_size=3), lf.Agent(agents=4),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config"), [(name, c) for name in KINDS for c in (CONFIGS if name == "flux" else CONFIGS[::2])], ids=str
)
def test_every_mechanism(name, config, fused):
    model, inputs = HOSTS[name].build(), small(HOSTS[name])
    lf.apply(model, config, fuse_prologue=False)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".linfusion." in key:
                p.add_(0.2 * torch.randn_like(p))
    want = forward(model, inputs)
    assert not fused
    for attn in layers(model):
        attn.linfusion.fuse_prologue = True
    with interpreted():
        got = forward(model, inputs)
    assert len(fused) >= len(layers(model))
    assert gap(got, want) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_gradients_reach_the_hosts_weights(name, fused):
    """Those of the norms included, which the kernel reads without calling their modules."""
    plain = HOSTS[name].build()
    model = lf.apply(copy.deepcopy(plain), lf.Softmax())
    with interpreted():
        loss = whole(model(**small(HOSTS[name]), return_dict=False)).square().mean()
        loss.backward()
    assert len(fused) == len(layers(model))
    whole(plain(**small(HOSTS[name]), return_dict=False)).square().mean().backward()
    got = dict(model.named_parameters())
    compared = 0
    for key, p in plain.named_parameters():
        assert (p.grad is None) == (got[key].grad is None), key
        if p.grad is not None:
            torch.testing.assert_close(got[key].grad, p.grad, rtol=1e-3, atol=1e-5 * p.grad.abs().max().item() + 1e-8)
            compared += "norm_q" in key
    assert compared >= len(layers(model))


@pytest.mark.parametrize("name", KINDS[:2])
def test_it_compiles_whole(name, fused):
    tiny = HOSTS[name]
    model, inputs = lf.apply(tiny.build(), lf.Softmax()), small(tiny)
    want = forward(model, inputs)
    torch._dynamo.reset()
    with interpreted():
        got = forward(torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False), inputs)
    torch._dynamo.reset()
    assert gap(got, want) < 1e-5 and fused
