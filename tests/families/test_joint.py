"""What is particular to joint hosts: padded prompts, reference images, and linear maths beside text."""

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel

import linfusion as lf
from linfusion.families.qwen import HONOURS_PADDING

from ..models import HOSTS, TEXT, flux2_ids, forward, gap, lively, padded_text
from ..models.qwen import SIZES
from .test_linfusion import heads, layers, linear, mlp, phi, train

CONFIGS = [lf.Softmax(), lf.CLEAR(3), lf.CLEAR(2, pool=2), lf.LinFusion(mid_dim=4)]
MASKS = {"chroma-padded": "attention_mask", "qwen-padded": "encoder_hidden_states_mask"}
masked = pytest.mark.parametrize("name", [n for n in MASKS if HONOURS_PADDING or n != "qwen-padded"])
newest = pytest.mark.skipif("flux2" not in HOSTS, reason="this diffusers has no FLUX.2")


# padded prompts


@masked
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_padding_is_not_seen(name, config):
    """Whatever stands in padded places, the picture is the same; a real token changes it."""
    model, inputs = HOSTS[name].build(), HOSTS[name].inputs(6, 9)
    train(lf.apply(model, config))
    want = forward(model, inputs)
    words = inputs["encoder_hidden_states"]
    other = torch.where(padded_text()[..., None], words, words.roll(1, dims=1) + 1)
    assert gap(forward(model, inputs | {"encoder_hidden_states": other}), want) < 1e-6
    other = words.clone()
    other[1, 2] += 1  # the last real one
    assert gap(forward(model, inputs | {"encoder_hidden_states": other})[1], want[1]) > 1e-3
    assert gap(forward(model, inputs | {MASKS[name]: None})[1], want[1]) > 1e-3


@masked
@pytest.mark.parametrize("config", [lf.CLEAR(1000), lf.LinFusion(mid_dim=4)], ids=repr)
def test_padding_is_as_a_shorter_prompt(name, config):
    """The second sample alone, its padding cut off: text counts as many tokens as are real."""
    model, inputs = HOSTS[name].build(), HOSTS[name].inputs(6, 9)
    train(lf.apply(model, config))
    padded = forward(model, inputs)[1:]
    cut = {k: v[1:] if torch.is_tensor(v) and len(v) == 2 else v for k, v in inputs.items()}
    cut |= {"encoder_hidden_states": cut["encoder_hidden_states"][:, :3], MASKS[name]: None}
    cut |= {"txt_ids": cut["txt_ids"][:3]} if "txt_ids" in cut else {"img_shapes": cut["img_shapes"][:1]}
    assert gap(forward(model, cut), padded) < 1e-5


def test_chroma_hides_padding_that_comes_as_floats():
    """Its pipelines bring ones and zeros in floats, which stock attention adds to the scores: `Softmax` does too."""
    tiny = HOSTS["chroma-padded"]
    model, inputs = tiny.build(), tiny.inputs(6, 9)
    hidden = forward(model, inputs)
    floats = inputs | {"attention_mask": inputs["attention_mask"].float()}
    added = forward(model, floats)
    assert gap(added, hidden) > 1e-2
    lf.apply(model, lf.Softmax())
    assert torch.equal(forward(model, floats), added)
    lf.apply(model, lf.CLEAR(1000))
    assert gap(forward(model, floats), hidden) < 1e-5


def test_chroma_masks_that_are_no_padding_of_the_prompt():
    tiny = HOSTS["chroma-padded"]
    model, inputs = lf.apply(tiny.build(), lf.CLEAR(3)), tiny.inputs(6, 9)
    with pytest.raises(ValueError, match=r"\[B, text \+ image\] = \[B, 7 \+ 54\], got \(2, 7\)"):
        forward(model, inputs | {"attention_mask": padded_text()})
    mask = inputs["attention_mask"].clone()
    mask[0, -1] = False
    with pytest.raises(ValueError, match="hides image tokens"):
        forward(model, inputs | {"attention_mask": mask})


@pytest.mark.parametrize("name", ["sd3", "auraflow"])
def test_a_mask_that_the_host_does_not_look_at(name):
    """Their processors take a mask and drop it: so does `Softmax`, and nothing else takes one."""
    model, inputs = HOSTS[name].build(), HOSTS[name].inputs(6, 9)
    kwargs = "joint_attention_kwargs" if name == "sd3" else "attention_kwargs"
    given = {kwargs: {"attention_mask": torch.zeros(2, 1, 1, 6 * 9 + TEXT)}}
    stock = forward(model, inputs)
    assert torch.equal(forward(model, inputs | given), stock)
    lf.apply(model, lf.Softmax())
    assert torch.equal(forward(model, inputs | given), stock)
    for config in CONFIGS[1:]:
        lf.apply(model, config)
        with pytest.raises(ValueError, match=r"attn: \w+ cannot honour an attention mask"):
            forward(model, inputs | given)


def test_qwen_takes_no_mask_of_the_whole_sequence():
    model, inputs = lf.apply(HOSTS["qwen"].build(), lf.CLEAR(3)), HOSTS["qwen"].inputs(6, 9)
    inputs["attention_kwargs"] = {"attention_mask": torch.ones(2, 1, 1, 6 * 9 + TEXT, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"attention.mask"):
        forward(model, inputs)


# linear attention beside exact text, written out


def normed(x, norm):
    """RMS over each head's channels; `norm` None for none."""
    if norm is None:
        return x
    return x * (x.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()


def turn(x, tables):
    """`[B, H, S, D]` by complex angles `[S, D / 2]`; None for none."""
    if tables is None:
        return x
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * tables).flatten(-2)


def beside_text(q, k, v, words, keep, tables=None):
    """EDiT's rule, sample by sample. q, k, v `[B, H, S, D]` after the norms; `words` `[S]` bool: what is text."""
    out, picture = torch.empty_like(v), ~words
    for sample, real in enumerate(keep):
        text = words.clone()
        text[words] = real
        q1, k1, v1 = q[sample : sample + 1], k[sample : sample + 1], v[sample : sample + 1]
        rq, rk = turn(q1, tables), turn(k1, tables)
        both = text | picture
        out[sample, :, words] = F.scaled_dot_product_attention(rq[:, :, words], rk[:, :, both], v1[:, :, both])[0]
        fq, fk = phi(q1), phi(k1)
        numerator = turn(fq, tables)[:, :, picture] @ turn(fk, tables)[:, :, picture].transpose(-1, -2)
        n, t = picture.sum(), text.sum()
        below = (fq[:, :, picture] @ fk[:, :, picture].transpose(-1, -2) / n).sum(-1, keepdim=True) + 1e-4
        image = (numerator / n) @ v1[:, :, picture] / below
        if t:
            seen = F.scaled_dot_product_attention(rq[:, :, picture], rk[:, :, text], v1[:, :, text])
            image = n / (n + t) * image + t / (n + t) * seen
        out[sample, :, picture] = image[0]
    return out.transpose(1, 2).flatten(2)


def apart(attn, given, text_first, keep, tables=None, references=0):
    """Double blocks: image and text as the layer returns them; so many reference tokens stand last."""
    x, text, m, count = given["hidden_states"].double(), given.get("encoder_hidden_states"), attn.linfusion, attn.heads
    drawn = torch.arange(x.shape[1])[:, None] < x.shape[1] - references
    inputs = (x + drawn * mlp(x, m.q_mlp), x + drawn * mlp(x, m.k_mlp), x)
    norms = (attn.norm_q, attn.norm_k, None)
    image = [normed(heads(linear(y, to), count), norm)
             for y, to, norm in zip(inputs, (attn.to_q, attn.to_k, attn.to_v), norms, strict=True)]  # fmt: skip
    tokens, words = x.shape[1], 0 if text is None else text.shape[1]
    if text is None:
        q, k, v = image
    else:
        norms = (attn.norm_added_q, attn.norm_added_k, None)
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        spoken = [normed(heads(linear(text.double(), to), count), norm)
                  for to, norm in zip(added, norms, strict=True)]  # fmt: skip
        pairs = zip(spoken, image, strict=True)
        q, k, v = (torch.cat((a, b) if text_first else (b, a), dim=2) for a, b in pairs)
    places = torch.arange(tokens + words)
    is_text = places < words if text_first else places >= tokens
    whole = is_text | (places >= tokens + words - references) if references else is_text
    out = beside_text(q, k, v, whole, F.pad(keep[:, :words], (0, references), value=True), tables)
    image = linear(out[:, ~is_text], attn.to_out[0])
    if text is None:
        return (image,)
    text = out[:, is_text]
    return image, text if attn.to_add_out is None else linear(text, attn.to_add_out)


def single(attn, given, tables, references=0):
    """FLUX.2's single blocks: rows of one projection are q, k, v, the MLP's gate and its value."""
    x, m, d = given["hidden_states"].double(), attn.linfusion, attn.inner_dim
    places = torch.arange(x.shape[1])
    words = (places < TEXT) | (places >= x.shape[1] - references)
    x_q, x_k = (x + ~words[:, None] * mlp(x, p) for p in (m.q_mlp, m.k_mlp))
    q, k, v, gate, value = attn.to_qkv_mlp_proj.weight.double().split([d] * 3 + [attn.mlp_hidden_dim] * 2)
    q, k, v = (heads(y @ w.T, attn.heads) for y, w in ((x_q, q), (x_k, k), (x, v)))
    keep = torch.ones(2, TEXT + references, dtype=torch.bool)
    out = beside_text(normed(q, attn.norm_q), normed(k, attn.norm_k), v, words, keep, tables)
    return (linear(torch.cat((out, F.silu(x @ gate.T) * (x @ value.T)), dim=-1), attn.to_out),)


ALL = torch.ones(2, TEXT, dtype=torch.bool)


@pytest.mark.parametrize(
    "name",
    [n for n in ("sd3", "sd3.5", "sd3.5-controlnet", "flux2", "flux2-refs", "qwen-padded", "qwen-edit") if n in HOSTS],
)
def test_all_that_involves_text_stays_exact(name):
    tiny = HOSTS[name]
    model = lf.apply(tiny.build(), lf.LinFusion(mid_dim=4))
    train(model)
    seen, references = layers(model, tiny.inputs(6, 9)), tiny.sequences(6, 9)[0].references
    assert len(seen) == tiny.layers and (references > 0) == (name in ("flux2-refs", "qwen-edit"))
    for attn, given, out in seen:
        rotary = given.get("image_rotary_emb")
        if name.startswith("qwen"):
            keep = padded_text() if HONOURS_PADDING else ALL
            tables = torch.cat((rotary[1], rotary[0])).to(torch.complex128)
            want = apart(attn, given, True, keep, tables, references)
        elif name.startswith("flux2"):
            tables = torch.complex(*(t.double()[:, 0::2] for t in rotary))
            one = hasattr(attn, "mlp_act_fn")
            want = single(attn, given, tables, references) if one else apart(attn, given, True, ALL, tables, references)
        else:
            want = apart(attn, given, False, ALL)
        out = out if isinstance(out, tuple) else (out,)
        assert len(out) == len(want)
        for got, expected in zip(out, want, strict=True):
            assert gap(got, expected) < 1e-5


def test_tokens_are_merged_where_no_text_is():
    """SD3.5's `attn2` sees the picture alone; without merging and agents it is the host's own attention."""
    model, inputs = HOSTS["sd3.5"].build(), HOSTS["sd3.5"].inputs(16, 24)
    stock = forward(model, inputs)
    lf.apply(model, lf.AgentSD(early=0.0, merge=0.0), layers="*.attn2")
    assert gap(forward(model, inputs), stock) < 1e-5
    lf.apply(model, lf.AgentSD(), layers="*.attn2")
    early, late = (forward(model, inputs | {"timestep": torch.tensor([t, t])}) for t in (700.0, 500.0))
    lf.apply(model, lf.AgentSD(early=0.0), layers="*.attn2")
    assert gap(forward(model, inputs | {"timestep": torch.tensor([700.0, 700.0])}), early) > 1e-3
    assert torch.equal(forward(model, inputs | {"timestep": torch.tensor([500.0, 500.0])}), late)
    assert gap(forward(model, inputs), stock) > 1e-3
    with pytest.raises(NotImplementedError, match=r"attn: AgentSD .* text"):
        lf.apply(model, lf.AgentSD(), layers="*.attn")


# what is refused


def refuses_grids_only(model, inputs, match):
    """Mechanisms without a grid work on; `Softmax` is the stock model."""
    stock = forward(model, inputs)
    lf.apply(model, lf.CLEAR(3))
    with pytest.raises(ValueError, match=match):
        forward(model, inputs)
    assert torch.equal(forward(lf.apply(model, lf.Softmax()), inputs), stock)
    assert forward(lf.apply(model, lf.LinFusion(mid_dim=4)), inputs).isfinite().all()


@newest
def test_flux2_ids_that_are_no_picture_and_references():
    ids = torch.cat((flux2_ids(6, 9), flux2_ids(3, 9)))
    inputs = HOSTS["flux2"].inputs(1, len(ids)) | {"img_ids": ids.expand(2, -1, -1)}
    refuses_grids_only(HOSTS["flux2"].build(), inputs, r"img_ids \(2, 81, 4\) do not describe a grid")


@newest
@pytest.mark.parametrize(("layer", "grid"), [(0, (12, 9)), (1, (6, 9))])
def test_flux2_layers_are_pictures_of_their_own(layer, grid):
    ids = torch.cat((flux2_ids(6, 9), flux2_ids(6, 9) + torch.tensor([0, 6, 0, layer])))
    model = lf.apply(HOSTS["flux2"].build(), lf.CLEAR(3))
    forward(model, HOSTS["flux2"].inputs(12, 9) | {"img_ids": ids})
    assert {r.grid for r in lf.describe(model).layers} == {grid}


@newest
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_flux2_caches_of_reference_images_are_refused(config):
    tiny = HOSTS["flux2"]
    model, inputs = lf.apply(tiny.build(), config), tiny.inputs(6, 9)
    with pytest.raises(NotImplementedError, match="kv_cache_mode='extract'"):
        forward(model, inputs | {"kv_cache_mode": "extract", "num_ref_tokens": 9})
    lf.restore(model)
    flux2 = diffusers.models.transformers.transformer_flux2
    model.set_attn_processor(
        {
            f"{name}.processor": (
                flux2.Flux2KVParallelSelfAttnProcessor() if name.startswith("single") else flux2.Flux2KVAttnProcessor()
            )
            for name in (r.layer for r in lf.describe(model).layers)
        }
    )
    with pytest.raises(NotImplementedError, match="Flux2KVAttnProcessor"):
        lf.apply(model, config)


def test_qwen_frames_are_refused():
    inputs = HOSTS["qwen"].inputs(6, 9) | {"img_shapes": [[(2, 3, 9)]] * 2}
    refuses_grids_only(HOSTS["qwen"].build(), inputs, r"img_shapes=\[\(2, 3, 9\)\]: several pictures")


@pytest.mark.skipif(not HONOURS_PADDING, reason="this diffusers has no Qwen-Image-Layered")
def test_qwen_layers_are_refused():
    """Two layers are drawn together; no reference."""
    inputs = HOSTS["qwen"].inputs(6, 9) | {"img_shapes": [[(1, 3, 9), (1, 3, 9)]] * 2}
    torch.manual_seed(0)
    model = lively(QwenImageTransformer2DModel(**SIZES, use_layer3d_rope=True)).eval()
    refuses_grids_only(model, inputs, r"img_shapes=.*: several pictures")


def test_qwen_shapes():
    """One entry a sample, a list of pictures or the picture itself; a grid that does not fit is noticed."""
    tiny = HOSTS["qwen"]
    model, inputs = lf.apply(tiny.build(), lf.CLEAR(3)), tiny.inputs(6, 9)
    want = forward(model, inputs)
    assert torch.equal(forward(model, inputs | {"img_shapes": [(1, 6, 9)] * 2}), want)
    assert gap(forward(model, inputs | {"img_shapes": [[(1, 9, 6)]] * 2}), want) > 1e-2
    with pytest.raises(ValueError, match="describes 55 image tokens, but there are 54"):
        forward(model, inputs | {"img_shapes": [[(1, 5, 11)]] * 2})


# the rest


def test_auraflow_has_a_scale_of_its_own():
    """The host passes `attn.scale` on, whatever it is."""
    model, inputs = HOSTS["auraflow"].build(), HOSTS["auraflow"].inputs(6, 9)
    usual = forward(model, inputs)
    for name, module in model.named_modules():
        if name.endswith(".attn"):
            module.scale = 0.1
    stock = forward(model, inputs)
    assert gap(stock, usual) > 1e-2
    assert torch.equal(forward(lf.apply(model, lf.Softmax()), inputs), stock)
    assert gap(forward(lf.apply(model, lf.CLEAR(1000)), inputs), stock) < 1e-5


def test_describe_tells_which_layers_see_text():
    tiny = HOSTS["sd3.5"]
    model = lf.apply(tiny.build(), lf.CLEAR(3))
    forward(model, tiny.inputs(6, 9))
    report = {r.layer.rpartition(".")[2]: (r.grid, r.text) for r in lf.describe(model).layers}
    assert report == {"attn": ((6, 9), TEXT), "attn2": ((6, 9), None)}
