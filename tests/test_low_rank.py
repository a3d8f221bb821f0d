"""Adapters of low rank: two factors on disk, their product on the host's matrices, the originals back afterwards."""

import peft
import pytest
import torch
from safetensors.torch import load_file

import linfusion as lf

from .models import HOSTS, forward, gap


def trained(host="flux"):
    """A model with CLEAR and a LoRA that does something, and the same model without both."""
    tiny = HOSTS[host]
    model = lf.apply(tiny.build(), lf.CLEAR(2))
    names = [n for n, m in model.named_modules() if n.endswith((".to_q", ".to_v")) and isinstance(m, torch.nn.Linear)]
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=names, init_lora_weights=False)
    peft.inject_adapter_in_model(lora, model, "trained")
    return tiny, model, names


def doubled(inputs):
    """In double precision a merged matrix and two factors agree to far below what the factors do."""
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("host", ["flux", "unet-sd15"])
def test_there_and_back(tmp_path, host):
    tiny, model, names = trained(host)
    model, inputs = model.double(), doubled(tiny.inputs(6, 9))
    lf.save(model, tmp_path / "a", lora="trained")
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert set(stored) == {f"low_rank.{n}.weight.{part}" for n in names for part in ("down", "up")}
    fresh = tiny.build().double()
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    untrained = forward(lf.apply(tiny.build(), lf.CLEAR(2)).double(), inputs)
    lf.load(fresh, tmp_path / "a")
    assert gap(forward(fresh, inputs), forward(model, inputs)) < 1e-5
    assert gap(untrained, forward(model, inputs)) > 1e-3  # the factors matter
    lf.save(fresh, tmp_path / "b")  # again without PEFT: the same factors
    again = load_file(tmp_path / "b" / "model.safetensors")
    assert set(again) == set(stored) and all(torch.equal(again[k], stored[k]) for k in stored)
    lf.restore(fresh)
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())


def test_errors(tmp_path):
    tiny, model, _ = trained()
    with pytest.raises(ValueError, match="no LoRA on the FluxTransformer2DModel"):
        lf.save(model, tmp_path / "a", lora="another")
    lf.save(model, tmp_path / "a", lora="trained", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "a" / "model.safetensors").values()} == {torch.bfloat16}
    other = HOSTS["flux"].make()
    other = type(other)(**dict(other.config) | {"attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)})
    with pytest.raises(ValueError, match="the model has"):
        lf.load(other, tmp_path / "a")
    assert lf.describe(other).replaced == 0
