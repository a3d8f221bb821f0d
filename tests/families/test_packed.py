"""Lumina 2 and Z-Image: samples whose captions differ in length share a batch, and no padding is attended to."""

import diffusers
import pytest
import torch
import torch.nn.functional as F

import linfusion as lf
from linfusion.families import packed

from ..models import HOSTS, forward, gap, noise
from ..models.z_image import z_image, z_image_inputs
from .test_linfusion import heads, layers, linear, mlp, phi, rms, train

PADDED = [name for name in ("lumina2-padded", "z-image-padded") if name in HOSTS]
CONFIGS = [lf.Softmax(), lf.CLEAR(2), lf.CLEAR(2, pool=2), lf.LinFusion(mid_dim=4)]
z_image_only = pytest.mark.skipif(not hasattr(diffusers, "ZImageTransformer2DModel"), reason="not in this diffusers")


def alone(inputs, sample):
    """The arguments of one sample, its caption without any padding."""
    one = {name: x[sample : sample + 1] for name, x in inputs.items()}
    if "encoder_attention_mask" in one:
        words = int(one["encoder_attention_mask"].sum())
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            one[name] = one[name][:, :words]
    return one


def applied(name, config):
    model = lf.apply(HOSTS[name].build(), config)
    train(model)
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("name", PADDED)
def test_a_sample_is_the_same_alone_and_in_a_batch(name, config):
    inputs = HOSTS[name].inputs(5, 7)
    model = applied(name, config)
    together = forward(model, inputs)
    for sample in (0, 1):
        one = forward(model, alone(inputs, sample))
        assert gap(one, together[sample].view_as(one)) < 1e-5
        assert gap(one, together[1 - sample].view_as(one)) > 1e-2


@pytest.mark.parametrize("config", CONFIGS[1:], ids=str)
@pytest.mark.parametrize("name", PADDED)
def test_padding_would_be_noticed(name, config):
    """The twin: without the mask of real text, or in the host's order, the shorter sample comes out different."""
    inputs = HOSTS[name].inputs(5, 7)
    model = applied(name, config)
    want = forward(model, inputs)

    def unmasked(mechanism, args):
        args[0].text_mask = None

    handles = [
        m.linfusion.register_forward_pre_hook(unmasked) for m in model.modules() if hasattr(m, "linfusion")
    ]  # fmt: skip
    assert gap(forward(model, inputs), want) > 1e-3
    for handle in handles:
        handle.remove()
    assert torch.equal(forward(model, inputs), want)


def test_lumina2_in_its_own_order_is_wrong(monkeypatch):
    inputs = HOSTS["lumina2-padded"].inputs(5, 7)
    model = applied("lumina2-padded", lf.CLEAR(2))
    want = forward(model, inputs)
    monkeypatch.setattr(packed, "reorder", lambda x, places: x)
    assert gap(forward(model, inputs), want) > 1e-2


def test_the_order_and_back():
    """Captions of 4, 1 and 0 tokens before a picture of 3."""
    mask = torch.arange(7) < torch.tensor([7, 4, 3])[:, None]
    order = packed.Order.of(mask, 3)
    host = torch.tensor([[0, 1, 2, 3, 10, 11, 12], [0, 10, 11, 12, -1, -1, -1], [10, 11, 12, -1, -1, -1, -1]])
    want = torch.tensor([[0, 1, 2, 3, 10, 11, 12], [0, -1, -1, -1, 10, 11, 12], [-1, -1, -1, -1, 10, 11, 12]])
    assert torch.equal(packed.reorder(host[..., None], order.there)[..., 0], want)
    assert torch.equal(order.text_mask, want[:, :4] >= 0)
    x = noise(3, 7, 2)
    assert torch.equal(packed.reorder(packed.reorder(x, order.there), order.back), x)


def formula(attn, x, freqs, image):
    """One sample, no padding, in float64: text rows exact; image rows N / (N + T) linear, T / (N + T) over the text.

    `x` `[S, C]`, `freqs` `[S, D / 2]` complex, `image` `[S]` bool.
    """
    m, x = attn.linfusion, x.double()[None]
    x_q, x_k = (torch.where(image[:, None], x + mlp(x, p), x) for p in (m.q_mlp, m.k_mlp))
    kv_heads = attn.heads * attn.inner_kv_dim // attn.inner_dim
    q = rms(heads(linear(x_q, attn.to_q), attn.heads), attn.norm_q)
    k = rms(heads(linear(x_k, attn.to_k), kv_heads), attn.norm_k)
    k, v = (y.repeat_interleave(attn.heads // kv_heads, 1) for y in (k, heads(linear(x, attn.to_v), kv_heads)))

    def turn(y):
        pairs = torch.complex(y[..., 0::2], y[..., 1::2]) * freqs.to(torch.complex128)
        return torch.stack((pairs.real, pairs.imag), dim=-1).flatten(-2)

    rq, rk, n = turn(q), turn(k), int(image.sum())
    share = n / len(image)
    out = F.scaled_dot_product_attention(rq, rk, v)
    fq, fk, iv = phi(q[:, :, image]), phi(k[:, :, image]), v[:, :, image]
    rfq, rfk = turn(phi(q))[:, :, image], turn(phi(k))[:, :, image]
    mixed = (rfq @ rfk.transpose(-1, -2) / n) @ iv / ((fq @ fk.transpose(-1, -2) / n).sum(-1, keepdim=True) + 1e-4)
    if n < len(image):
        text = F.scaled_dot_product_attention(rq[:, :, image], rk[:, :, ~image], v[:, :, ~image])
        mixed = share * mixed + (1 - share) * text
    out[:, :, image] = mixed
    return linear(out.transpose(1, 2).flatten(2), attn.to_out[0])[0]


@pytest.mark.parametrize("name", PADDED)
def test_all_that_involves_text_stays_exact(name):
    """LinFusion, layer by layer and sample by sample, in which padding does not occur at all."""
    model, inputs, n = applied(name, lf.LinFusion()), HOSTS[name].inputs(5, 7), 35
    seen = layers(model, inputs)
    assert len(seen) == HOSTS[name].layers
    for attn, given, out in seen:
        x = given["hidden_states"]
        freqs = given.get("freqs_cis", given.get("image_rotary_emb"))
        mask = given.get("attention_mask")
        for sample in (0, 1):
            real = x.shape[1] if mask is None else int(mask[sample].sum())
            start = real - n if name.startswith("lumina2") else 0  # its captions come first
            image = torch.zeros(real, dtype=torch.bool)
            image[start : start + n] = True
            want = formula(attn, x[sample, :real], freqs[sample, :real], image)
            assert gap(out[sample, :real], want) < 1e-5


@pytest.mark.parametrize("name", PADDED)
def test_describe_counts_real_captions_and_filling(name):
    model = lf.apply(HOSTS[name].build(), lf.LinFusion())
    forward(model, HOSTS[name].inputs(5, 7))
    lines = {r.layer: r for r in lf.describe(model).layers}
    text = {layer: r.text for layer, r in lines.items() if r.mechanism}
    attn = "attn" if name.startswith("lumina2") else "attention"
    refiner, joint = (None, 7) if name.startswith("lumina2") else (29, 29 + 96)
    assert text == {f"noise_refiner.0.{attn}": refiner, f"layers.0.{attn}": joint, f"layers.1.{attn}": joint}
    assert lines[f"context_refiner.0.{attn}"].reason == "text-only attention"


def test_describe_sees_the_longest_caption_not_its_buffer():
    """Pipelines hand over captions padded to a fixed length; the host cuts what no sample uses."""
    model, inputs = lf.apply(HOSTS["lumina2"].build(), lf.CLEAR(100)), HOSTS["lumina2"].inputs(5, 7)
    inputs["encoder_attention_mask"][:, 4:] = False
    forward(model, inputs)
    report = lf.describe(model)
    assert {r.text for r in report.layers if r.layer.startswith("layers.")} == {4}
    assert report.attention_work_left == 1.0


@pytest.mark.parametrize("name", PADDED)
def test_reading_the_layout_does_not_wait(name):
    """Tensors without values are enough."""
    tiny = HOSTS[name]
    inputs = {
        key: [y.to("meta") for y in x] if isinstance(x, list) else x.to("meta")
        for key, x in tiny.inputs(5, 7).items()
    }  # fmt: skip
    family = lf.families()[tiny.family]
    layout = family.layout(tiny.build(), (), inputs, frozenset({"grid"}))
    assert layout.grid == (5, 7) and layout.tokens == 35


@pytest.mark.parametrize("config", [lf.Softmax(), lf.CLEAR(2), lf.LinFusion()], ids=str)
@pytest.mark.parametrize("name", PADDED)
def test_blocks_compile_whole(name, config):
    model, inputs = lf.apply(HOSTS[name].build(), config), HOSTS[name].inputs(5, 7)
    want = forward(model, inputs)
    torch._dynamo.reset()
    for block in model.layers:
        block.compile(fullgraph=True, backend="eager")
    assert gap(forward(model, inputs), want) < 1e-6
    torch._dynamo.reset()


def two_sizes():
    inputs = z_image_inputs(6, 9)
    return inputs | {"x": [inputs["x"][0], noise(4, 1, 8, 14, seed=5)]}


def two_frames():
    return z_image_inputs(6, 9) | {"x": list(noise(2, 4, 2, 8, 8))}


def reference_pictures():
    """Omni: a clean picture of its own size and caption before the noisy one, in every sample."""
    samples = [[noise(4, 1, 8, 12, seed=i), noise(4, 1, 12, 18, seed=2 + i)] for i in range(2)]
    captions = [[noise(5, 12, seed=4 + i), noise(9, 12, seed=6 + i)] for i in range(2)]
    extra = {"siglip_feats": [None, None], "image_noise_mask": [[0, 1], [0, 1]]}
    return {"x": samples, "t": torch.tensor([0.5, 0.7]), "cap_feats": captions, **extra}


@z_image_only
@pytest.mark.parametrize("inputs", [two_sizes, two_frames, reference_pictures])
def test_z_image_without_a_single_grid_is_refused(inputs):
    inputs = inputs()
    if "siglip_feats" in inputs and not hasattr(diffusers, "ZImageOmniPipeline"):
        pytest.skip("this diffusers has no reference pictures")
    torch.manual_seed(0)
    model = HOSTS["z-image"].build()
    stock = forward(model, inputs)
    for config in (lf.CLEAR(2), lf.LinFusion()):
        lf.apply(model, config)
        with pytest.raises(NotImplementedError, match=r"no single token grid.*exact attention"):
            forward(model, inputs)
    lf.apply(model, lf.Softmax())
    assert torch.equal(forward(model, inputs), stock)
    assert lf.describe(model).replaced == HOSTS["z-image"].layers


@z_image_only
def test_z_image_patches_of_another_size():
    """Where a model offers several, the call says which."""
    model = lf.apply(z_image(all_patch_size=(2, 4), all_f_patch_size=(1, 1)), lf.CLEAR(2))
    inputs = z_image_inputs(6, 8)
    for patch, grid in ((2, (6, 8)), (4, (3, 4))):
        forward(model, inputs | {"patch_size": patch})
        assert {r.grid for r in lf.describe(model).layers if r.mechanism} == {grid}
