"""Fused projections, on every host that can fuse: refused by name, or the same answer as without."""

import pytest
import torch

import linfusion as lf
from linfusion.families.base import FUSED

from ..models import HOSTS, forward, gap, processors

FUSING = [name for name, tiny in HOSTS.items() if hasattr(tiny.make(), "fuse_qkv_projections")]
BROKEN = {"sd3.5", "sd3.5-controlnet"}
"""Stock diffusers fuses these and then cannot run them: `attn2` and layers without text have no fused matrix of it."""

CONFIGS = (lf.Softmax(), lf.CLEAR(2), lf.LinFusion())


@pytest.fixture(params=FUSING)
def name(request):
    return request.param


def made(name):
    tiny = HOSTS[name]
    return tiny.build(), tiny.inputs(6, 6 if tiny.square else 9)


def test_fused_before(name):
    model, inputs = made(name)
    stock, before = forward(model, inputs), processors(model)
    model.fuse_qkv_projections()
    fused = processors(model)
    if fused == before:  # the matrices stand beside `to_q`, if there are any
        assert gap(forward(model, inputs), stock) < 1e-5
        for config in CONFIGS:
            torch.manual_seed(0)
            want = forward(lf.apply(made(name)[0], config), inputs)
            torch.manual_seed(0)
            assert torch.equal(forward(lf.apply(model, config), inputs), want)
        lf.restore(model)
        assert processors(model) == before and gap(forward(model, inputs), stock) < 1e-5
    elif name in BROKEN:
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'ndim'"):
            forward(model, inputs)
    else:
        assert gap(forward(model, inputs), stock) < 1e-5
    if fused != before:
        for config in CONFIGS:
            with pytest.raises(NotImplementedError, match=r"has a Fused\w+, which .*unfuse_qkv_projections\(\) first"):
                lf.apply(model, config)
            assert processors(model) == fused
        model.unfuse_qkv_projections()
        assert torch.equal(forward(lf.apply(model, lf.Softmax()), inputs), stock)


def replaced(model):
    return [m for m in lf.apply(model, lf.Softmax()).modules() if hasattr(m, "linfusion")]


def test_fused_while_on(name):
    """A processor that diffusers sets over ours is told of; where it sets none, the answer stays."""
    model, inputs = made(name)
    want = forward(lf.apply(model, lf.CLEAR(2)), inputs)
    before = processors(model)
    model.fuse_qkv_projections()
    if processors(model) == before:
        assert torch.equal(forward(model, inputs), want)
    else:
        with pytest.raises(RuntimeError, match=r"Fused\w+ was set over CLEAR on "):
            forward(model, inputs)
    lf.restore(model)
    model.unfuse_qkv_projections()
    assert torch.equal(forward(model, inputs), forward(made(name)[0], inputs))
    assert torch.equal(forward(lf.apply(model, lf.CLEAR(2)), inputs), want)


@pytest.mark.parametrize("name", ["flux", "flux2", "wan", "ltx"])
def test_a_fused_matrix_that_differs_from_its_parts(name):
    """Trained or with a LoRA since: whichever of both the processor called, the other would silently be lost."""
    for change in (trained, lora):
        for target in ("to_qkv", "to_k"):
            model, inputs = made(name)
            layers = replaced(model)
            lf.restore(model)
            model.fuse_qkv_projections()
            layer = next(m for m in layers if getattr(m, "fused_projections", False))
            assert isinstance(getattr(layer, target), torch.nn.Linear) and target in {"to_qkv", *FUSED["to_qkv"]}
            change(layer, target)
            before = processors(model)
            with pytest.raises(NotImplementedError, match=r"attn.*to_qkv is not to_q, to_k, to_v .*unfuse_qkv"):
                lf.apply(model, lf.CLEAR(2))
            assert processors(model) == before
            model.unfuse_qkv_projections()
            assert forward(lf.apply(model, lf.CLEAR(2)), inputs).isfinite().all()


def trained(layer, target):
    with torch.no_grad():
        getattr(layer, target).weight[0, 0] += 1


def lora(layer, target):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=[target]), layer)


def test_fused_projections_of_an_offloaded_model():
    """Values that live elsewhere cannot be compared; what was fused of equals counts as equal."""
    from accelerate import cpu_offload

    model, inputs = made("flux")
    model.fuse_qkv_projections()
    stock = forward(model, inputs)
    cpu_offload(model, execution_device="cpu")
    assert gap(forward(lf.apply(model, lf.Softmax()), inputs), stock) < 1e-5
