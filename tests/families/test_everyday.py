"""What people do with any model while mechanisms are on, on every host: copies, files, dtypes, sizes, offload.

Several mechanisms at once, so that each host is built once for each habit; `test_compat.py` has every mechanism alone.
"""

import copy
import pickle

import accelerate
import diffusers
import pytest
import torch
from torch import nn

import linfusion as lf

from ..models import HOSTS, Quantised, cast, forward, gap, processors

MIXES = {
    "windows": lambda tiny: {tiny.some: lf.CLEAR(2, pool=2), "*": lf.LinFusion(mid_dim=4)},
    "blocks": lambda tiny: {tiny.some: lf.SLA(topk=0.4, block_q=16, block_k=16), "*": lf.Agent(4)},
}
mixed = pytest.mark.parametrize("mix", MIXES)


@pytest.fixture(autouse=True)
def quiet():
    """The hosts warn when they are cast as a whole."""
    before = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    yield
    diffusers.logging.set_verbosity(before)


def changed(tiny, model, mix):
    """With made-up trained values: a fresh branch has no effect that could get lost."""
    lf.apply(model, MIXES[mix](tiny))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".linfusion." in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_softmax_is_the_stock_model_in_every_dtype(tiny, inputs, dtype):
    """Of the newest diffusers: the oldest projects parts of the joint sequence without a copy, and rounds otherwise."""
    model, inputs = tiny.build().to(dtype), cast(inputs, dtype)
    stock = forward(model, inputs)
    assert torch.equal(forward(lf.apply(model, lf.Softmax()), inputs), stock)


@mixed
def test_half_precision(tiny, inputs, mix):
    """Cast before or after, the answer keeps the host's dtype, and parameters are the same."""
    want = forward(tiny.build().to(torch.bfloat16), cast(inputs, torch.bfloat16)).dtype
    after = changed(tiny, tiny.build(), mix).to(torch.bfloat16)
    before = changed(tiny, tiny.build().to(torch.bfloat16), mix)
    outs = [forward(m, cast(inputs, torch.bfloat16)) for m in (after, before)]
    assert all(out.dtype == want and out.isfinite().all() for out in outs)
    assert torch.equal(*outs)


@mixed
def test_copies_and_files(tiny, model, inputs, mix, tmp_path):
    stock = forward(model, inputs)
    want = forward(changed(tiny, model, mix), inputs)
    assert gap(want, stock) > 1e-2
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(forward(twin, inputs), want)
        assert torch.equal(forward(lf.restore(twin), inputs), stock)
    model.save_pretrained(tmp_path / "host")
    opened = type(model).from_pretrained(tmp_path / "host").eval()
    assert torch.equal(forward(opened, inputs), stock)
    lf.save(model, tmp_path / "adapter")
    assert torch.equal(forward(lf.load(opened, tmp_path / "adapter"), inputs), want)
    lf.restore(model)
    assert torch.equal(forward(model, inputs), stock)


@mixed
def test_sizes_in_a_row(tiny, mix):
    """As in a fresh model each, equally many tokens included."""
    model = changed(tiny, tiny.build(), mix).double()
    fresh = copy.deepcopy(model)
    for grid in ((8, 8), (6, 6), (8, 8)) if tiny.square else ((8, 8), (16, 4), (6, 9)):
        inputs = cast(tiny.inputs(*grid), torch.float64)
        assert gap(forward(model, inputs), forward(copy.deepcopy(fresh), inputs)) < 1e-9


@mixed
def test_quantised_projections(tiny, model, inputs, mix):
    want = forward(changed(tiny, tiny.build(), mix), inputs)
    layers = [model.get_submodule(r.layer) for r in lf.describe(model).layers if r.reason == "not chosen"]
    assert len(layers) == tiny.layers
    for layer in layers:
        linears = [(name, m) for name, m in layer.named_modules() if isinstance(m, nn.Linear)]
        assert linears
        for name, linear in linears:
            layer.set_submodule(name, Quantised(linear))
    assert torch.equal(forward(changed(tiny, model, mix), inputs), want)


@mixed
def test_offload(tiny, model, inputs, mix):
    """accelerate's, layer by layer, and diffusers' own, group by group; the CPU stands in for the accelerator."""
    if tiny.family == "HunyuanDiT2DModel":
        pytest.skip("the stock model cannot be offloaded layer by layer")
    want = forward(changed(tiny, model, mix), inputs)
    other = copy.deepcopy(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(forward(model, inputs), want)
    there = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    if other._supports_group_offloading:
        other.enable_group_offload(**there, offload_type="leaf_level")
        assert torch.equal(forward(other, inputs), want)


@pytest.mark.parametrize("config", [lf.Softmax(), lf.CLEAR(2), lf.LinFusion(mid_dim=4)], ids=str)
def test_attention_backends(tiny, inputs, config):
    """`Softmax` takes the backend that the host takes; the others tell that it would have no effect."""
    first, second = tiny.build(), tiny.build()
    if not hasattr(first, "set_attention_backend"):
        pytest.skip("this host has no backends")
    first.set_attention_backend("_native_math")
    stock = forward(first, inputs)
    lf.apply(second, config)
    second.set_attention_backend("_native_math")
    takes = any(getattr(p, "_attention_backend", None) is not None for p in processors(first).values())
    if isinstance(config, lf.Softmax):
        assert torch.equal(forward(lf.apply(first, config), inputs), stock)
        assert torch.equal(forward(second, inputs), stock)
        return
    if takes:
        with pytest.raises(ValueError, match="'_native_math' would have no effect"):
            lf.apply(first, config)
    with pytest.raises(ValueError, match="'_native_math' has no effect"):
        forward(second, inputs)
    second.reset_attention_backend()
    assert forward(second, inputs).isfinite().all()
    assert torch.equal(forward(lf.restore(first), inputs), stock)


FIRST = {tiny.family: name for name, tiny in reversed(HOSTS.items()) if tiny.make()._repeated_blocks}
"""One host of each family whose blocks diffusers knows; `test_compile.py` has FLUX and the UNet."""


@pytest.mark.parametrize("name", sorted(set(FIRST.values()) - {"flux", "unet-sd15"}))
def test_repeated_blocks_compile(name):
    tiny = HOSTS[name]
    torch._dynamo.reset()
    model = changed(tiny, tiny.build(), "windows")
    plain = copy.deepcopy(model)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    inputs = tiny.inputs(4, 6)
    assert gap(forward(model, inputs), forward(plain, inputs)) < 1e-5
    torch._dynamo.reset()
