"""CogVideoX and HunyuanVideo: text in the sequence, before the video or behind it, padded."""

import pytest
import torch
import torch.nn.functional as F

import linfusion as lf

from ..models import HOSTS, TEXT, forward, gap, noise
from ..models.hunyuan_video import REAL
from .test_linfusion import heads, layers, linear, mlp, phi, rms, train, turn

HUNYUAN = pytest.mark.parametrize("name", ["hunyuan-video", "hunyuan-video-i2v"])
CONFIGS = pytest.mark.parametrize("config", [lf.Softmax(), lf.CLEAR(2), lf.CLEAR(2, pool=2), lf.LinFusion()], ids=str)


@CONFIGS
@HUNYUAN
def test_padding_changes_nothing(name, config):
    tiny = HOSTS[name]
    model, inputs = lf.apply(tiny.build(), config), tiny.inputs(5, 4)
    want = forward(model, inputs)
    other = inputs["encoder_hidden_states"].clone()
    other[1, REAL[1] :] += noise(TEXT - REAL[1], 12, seed=9)
    assert gap(forward(model, inputs | {"encoder_hidden_states": other}), want) < 1e-6
    other[1, REAL[1] - 1] += 1  # a real token
    changed = forward(model, inputs | {"encoder_hidden_states": other})
    assert gap(changed[1], want[1]) > 1e-3 and torch.equal(changed[0], want[0])


@CONFIGS
@HUNYUAN
def test_a_padded_prompt_is_the_short_prompt(name, config):
    """Whatever counts tokens counts real ones: the shares of text and video, and all that is attended to."""
    tiny = HOSTS[name]
    model = lf.apply(tiny.build(), config)
    train(model)
    one = {k: v[1:] for k, v in tiny.inputs(5, 4).items()}
    short = {k: one[k][:, : REAL[1]] for k in ("encoder_hidden_states", "encoder_attention_mask")}
    assert gap(forward(model, one), forward(model, one | short)) < 1e-5
    real = one | {"encoder_attention_mask": torch.ones_like(one["encoder_attention_mask"])}
    assert gap(forward(model, real), forward(model, one | short)) > 1e-3


def test_the_mask_reaches_mechanisms_as_the_prompts():
    tiny, seen = HOSTS["hunyuan-video"], []
    model, inputs = lf.apply(tiny.build(), lf.CLEAR(2)), tiny.inputs(5, 4)
    for module in model.modules():
        if hasattr(module, "linfusion"):
            module.linfusion.register_forward_pre_hook(lambda mechanism, args: seen.append(args[0]))
    forward(model, inputs)
    assert len(seen) == tiny.layers
    for call in seen:
        assert torch.equal(call.text_mask, inputs["encoder_attention_mask"].bool())
        assert call.mask.shape == (2, 1, 1, 2 * 5 * 4 + TEXT) and not call.text_first


@pytest.mark.parametrize("change", [lambda m: m.float(), lambda m: m.expand(-1, -1, m.shape[-1], -1)])
def test_another_mask_is_refused(change):
    """Only the padding of the prompt, as the model makes it, is known to be no other restriction."""
    tiny = HOSTS["hunyuan-video"]
    model = lf.apply(tiny.build(), lf.CLEAR(2))

    def swap(module, args, kwargs):
        return args, kwargs | {"attention_mask": change(kwargs["attention_mask"])}

    model.transformer_blocks[0].attn.register_forward_pre_hook(swap, with_kwargs=True)
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn: CLEAR cannot honour an attention mask"):
        forward(model, tiny.inputs(5, 4))


@pytest.mark.parametrize("name", ["cogvideox", "cogvideox-1.5"])
def test_a_mask_of_cogvideox_is_honoured_or_refused(name):
    tiny = HOSTS[name]
    model, inputs = tiny.build(), tiny.inputs(5, 4)
    mask = torch.zeros(2, 1, TEXT + 2 * 5 * 4)
    mask[1, :, 3:TEXT] = -10000.0
    given = inputs | {"attention_kwargs": {"attention_mask": mask}}
    stock = forward(model, given)
    assert gap(stock, forward(model, inputs)) > 1e-2
    lf.apply(model, lf.Softmax())
    assert torch.equal(forward(model, given), stock)
    for config in (lf.CLEAR(100), lf.LinFusion()):
        lf.apply(model, config)
        with pytest.raises(ValueError, match=r"attn1: \w+ cannot honour an attention mask"):
            forward(model, given)


def edit_mix(attn, given, hunyuan):
    """EDiT's rule (arXiv 2503.16726) on one layer in float64: text rows exact, video rows in shares of real tokens."""
    x, text, m = given["hidden_states"].double(), given["encoder_hidden_states"].double(), attn.linfusion
    mask = given.get("attention_mask")
    real = torch.ones(text.shape[:2], dtype=torch.bool) if mask is None else mask[:, 0, 0, x.shape[1] :]

    def norm(y, layer):
        y = heads(y, attn.heads)
        if isinstance(layer, torch.nn.LayerNorm):
            y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + layer.eps).sqrt()
            return y * layer.weight.double() + layer.bias.double()
        return rms(y, layer)

    double = attn.add_q_proj is not None
    own = ("add_q_proj", "add_k_proj", "add_v_proj") if double else ("to_q", "to_k", "to_v")
    norms = ("norm_added_q", "norm_added_k") if double else ("norm_q", "norm_k")
    tq, tk = (norm(linear(text, getattr(attn, p)), getattr(attn, n)) for p, n in zip(own[:2], norms, strict=True))
    q = norm(linear(x + mlp(x, m.q_mlp), attn.to_q), attn.norm_q)
    k = norm(linear(x + mlp(x, m.k_mlp), attn.to_k), attn.norm_k)
    tv, v = heads(linear(text, getattr(attn, own[2])), attn.heads), heads(linear(x, attn.to_v), attn.heads)

    tables = given.get("image_rotary_emb")

    def rotated(y):
        return y if tables is None else turn(y, tables)

    keys, values = torch.cat((tk, rotated(k)), dim=2), torch.cat((tv, v), dim=2)
    seen = torch.cat((real, real.new_ones(x.shape[:2])), dim=1)[:, None, None]
    text_out = F.scaled_dot_product_attention(tq, keys, values, attn_mask=seen)
    from_text = F.scaled_dot_product_attention(rotated(q), tk, tv, attn_mask=real[:, None, None])
    n = x.shape[1]
    numerator = (rotated(phi(q)) @ rotated(phi(k)).transpose(-1, -2) / n) @ v
    denominator = (phi(q) @ phi(k).transpose(-1, -2) / n).sum(-1, keepdim=True) + 1e-4
    share = n / (n + real.sum(dim=1).double()[:, None, None, None])
    video_out = share * numerator / denominator + (1 - share) * from_text
    video_out, text_out = (y.transpose(1, 2).flatten(2) for y in (video_out, text_out))
    if attn.to_out is not None:
        video_out = linear(video_out, attn.to_out[0])
        text_out = text_out if hunyuan else linear(text_out, attn.to_out[0])
    return video_out, linear(text_out, attn.to_add_out) if double else text_out


@pytest.mark.parametrize("name", ["cogvideox", "cogvideox-1.5", "hunyuan-video", "hunyuan-video-i2v"])
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_all_that_involves_text_stays_exact(name, trained):
    tiny = HOSTS[name]
    model = lf.apply(tiny.build(), lf.LinFusion())
    if trained:
        train(model)
    seen = layers(model, tiny.inputs(5, 4))
    assert len(seen) == tiny.layers
    for attn, given, (video, text) in seen:
        want = edit_mix(attn, given, "hunyuan" in name)
        assert gap(video, want[0]) < 1e-5 and gap(text, want[1]) < 1e-5
