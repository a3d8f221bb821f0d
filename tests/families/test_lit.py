"""`LiT` inside hosts, layer by layer, against its published formula written out in float64."""

import pytest
import torch
import torch.nn.functional as F

import linfusion as lf

from ..models import TEXT, TINY, forward, gap
from .test_linfusion import PLAIN, heads, layers, linear, rms, turn, wide

GRIDS = {54: (6, 9), 15: (3, 5)}
"""By their number of tokens; the second is the UNet's coarser one."""


def train(model):
    """Made-up training: every parameter of every mechanism moves."""
    for name, p in model.named_parameters():
        if ".linfusion." in name:
            torch.nn.init.normal_(p, std=0.3)


def convolved(v, grid, local, groups):
    """`[B, N, C]`: the published layout, heads in the batch, one weight for all of them."""
    batch, tokens, channels = v.shape
    image = v.transpose(1, 2).reshape(batch * groups, channels // groups, *grid)
    weight, bias = local.weight.double()[:, None], local.bias.double()
    out = F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=channels // groups)
    return out.reshape(batch, channels, tokens).transpose(1, 2)


def published(attn, x, groups, grid=None):
    """reference/mechanisms.md, 1.1: z from the mean key, both factors scaled by N^-0.5; `grid` None leaves the
    convolution out."""
    x, local, n = x.double(), attn.linfusion.local, x.shape[1]
    q, k = (linear(x, to).relu() + 1e-6 for to in (attn.to_q, attn.to_k))
    v = linear(x, attn.to_v)
    qh, kh, vh = heads(q, groups), heads(k, groups), heads(v, groups)
    z = 1 / (qh @ kh.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-6)
    state = (kh.transpose(-2, -1) * n**-0.5) @ (vh * n**-0.5)
    out = (qh @ state * z).transpose(1, 2).flatten(2)
    if grid is not None:
        out = out + convolved(v, grid, local, groups)
    return linear(out, attn.to_out[0])


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(("size", "count"), [(5, None), (3, 1), (1, 8)], ids=str)
def test_lit_is_the_published_formula(name, size, count):
    model = lf.apply(TINY[name].build().double(), lf.LiT(kernel_size=size, heads=count))
    train(model)
    seen = layers(model, wide(TINY[name].inputs(6, 9)))
    assert len(seen) == TINY[name].layers
    for attn, given, out in seen:
        x, groups = given["hidden_states"], count or attn.heads
        channels = attn.to_q.out_features
        assert attn.linfusion.local.weight.shape == (channels // groups, size, size)
        grid = GRIDS[x.shape[1]]
        assert gap(out, published(attn, x, groups, grid)) < 1e-9
        assert gap(out, published(attn, x, groups)) > 1e-4
        if size > 1:
            assert gap(out, published(attn, x, groups, grid[::-1])) > 1e-4


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("count", [None, 1, 8], ids=["own-heads", "one-head", "more-heads"])
def test_a_fresh_layer_is_the_formula_without_its_convolution(name, count):
    model = lf.apply(TINY[name].build().double(), lf.LiT(heads=count))
    for attn, given, out in layers(model, wide(TINY[name].inputs(6, 9))):
        x = given["hidden_states"]
        assert gap(out, published(attn, x, count or attn.heads)) < 1e-9
        assert gap(out, published(attn, x, 4)) > 1e-4


@pytest.mark.parametrize("normalize", ["inline", "mala"])
def test_subtraction_instead_of_division(normalize):
    """A constant is added to the weights `phi(q) . phi(k)` of each query, so that they sum to one."""
    model = lf.apply(TINY["pixart"].build().double(), lf.LiT(kernel_size=None, heads=2, normalize=normalize))
    assert not any(".linfusion." in name for name, _ in model.named_parameters())
    for attn, given, out in layers(model, wide(TINY["pixart"].inputs(6, 9))):
        q, k, v = (heads(linear(given["hidden_states"].double(), to), 2) for to in (attn.to_q, attn.to_k, attn.to_v))
        q, k = q.relu() + 1e-6, k.relu() + 1e-6
        weights, tokens = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, q.shape[-2]
        total = weights.sum(-1, keepdim=True)
        if normalize == "inline":
            weights = (weights - total / tokens + 1) / tokens
        else:
            weights = weights / tokens * (1 + 1 / (total / tokens + 1e-6)) - total / tokens**2
        assert (weights.sum(-1) - 1).abs().max() < 1e-3
        assert gap(out, linear((weights @ v).transpose(1, 2).flatten(2), attn.to_out[0])) < 1e-9


@pytest.mark.parametrize("config", [lf.LiT(), lf.LiT(heads=1, text="linear"), lf.Agent(6)], ids=str)
def test_the_branch_starts_at_zero_effect(tiny, model, inputs, config):
    """Fresh, the convolution changes nothing at all; it is there, though, and training opens it."""
    lf.apply(model, config)
    fresh = forward(model, inputs)
    for module in model.modules():
        if hasattr(module, "linfusion"):
            module.linfusion.local.forward = lambda call, out, heads=None: out
    assert torch.equal(forward(model, inputs), fresh)
    lf.apply(model, config)
    train(model)
    assert gap(forward(model, inputs), fresh) > 1e-2


def flux_parts(attn, given):
    """Normed q, k and v `[B, H, S, D]` of text and image, the tables, and how a result leaves the layer."""
    x, text = given["hidden_states"].double(), given.get("encoder_hidden_states")
    tables = [t.double() for t in given["image_rotary_emb"]]
    q, k, v = (heads(linear(x, to), attn.heads) for to in (attn.to_q, attn.to_k, attn.to_v))
    q, k = rms(q, attn.norm_q), rms(k, attn.norm_k)
    if text is None:
        return q, k, v, tables, lambda out: (out.transpose(1, 2).flatten(2),)
    tq, tk, tv = (
        heads(linear(text.double(), to), attn.heads) for to in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    )
    tq, tk = rms(tq, attn.norm_added_q), rms(tk, attn.norm_added_k)

    def leave(out):
        out = out.transpose(1, 2).flatten(2)
        return linear(out[:, TEXT:], attn.to_out[0]), linear(out[:, :TEXT], attn.to_add_out)

    return *(torch.cat(pair, dim=2) for pair in ((tq, q), (tk, k), (tv, v))), tables, leave


def regroup(x, groups):
    """`[B, H, S, D]` to `[B, groups, S, H * D / groups]`."""
    return heads(x.transpose(1, 2).flatten(2), groups)


def features(q, k, v, tables, groups):
    """ReLU, then the rotation of the host's own heads in the numerator, then LiT's heads: `[B, H, S, D]` again."""
    fq, fk = q.relu() + 1e-6, k.relu() + 1e-6
    rq, rk = (regroup(turn(f, tables), groups) for f in (fq, fk))
    numerator = rq @ rk.transpose(-1, -2) @ regroup(v, groups) / k.shape[2]
    weights = regroup(fq, groups) @ regroup(fk, groups).transpose(-1, -2)
    return regroup(numerator / (weights.mean(-1, keepdim=True) + 1e-6), q.shape[1])


def with_local(out, v, attn, groups):
    """`[B, H, S, D]`, the convolution added to the image tokens."""
    flat = v.transpose(1, 2).flatten(2)[:, TEXT:]
    local = convolved(flat, (6, 9), attn.linfusion.local, groups)
    return torch.cat((out[:, :, :TEXT], out[:, :, TEXT:] + heads(local, out.shape[1])), dim=2)


def exact_text(q, k, v, tables, image):
    """EDiT's rule around `image` `[B, H, N, D]`."""
    rq, rk, n = turn(q, tables), turn(k, tables), image.shape[2]
    text = F.scaled_dot_product_attention(rq[:, :, :TEXT], rk, v)
    from_text = F.scaled_dot_product_attention(rq[:, :, TEXT:], rk[:, :, :TEXT], v[:, :, :TEXT])
    return torch.cat((text, (n * image + TEXT * from_text) / (n + TEXT)), dim=2)


def assert_layer(out, want, limit=1e-5):
    outs = out if isinstance(out, tuple) else (out,)
    assert len(outs) == len(want)
    assert all(gap(a, b) < limit for a, b in zip(outs, want, strict=True))


@pytest.mark.parametrize("text", ["exact", "linear"])
@pytest.mark.parametrize("count", [None, 1, 4], ids=["own-heads", "one-head", "more-heads"])
def test_on_flux(count, text):
    tiny = TINY["flux"]
    model = lf.apply(tiny.build(), lf.LiT(kernel_size=3, heads=count, text=text))
    train(model)
    seen = layers(model, tiny.inputs(6, 9))
    assert len(seen) == tiny.layers
    for attn, given, out in seen:
        q, k, v, tables, leave = flux_parts(attn, given)
        groups = count or attn.heads
        if text == "linear":
            whole = features(q, k, v, tables, groups)
        else:
            image = features(*(x[:, :, TEXT:] for x in (q, k, v)), [t[TEXT:] for t in tables], groups)
            whole = exact_text(q, k, v, tables, image)
        assert_layer(out, leave(with_local(whole, v, attn, groups)))
        other = features(turn(q, tables), turn(k, tables), v, [torch.ones_like(tables[0]), 0 * tables[1]], groups)
        with pytest.raises(AssertionError):  # rotating before the ReLU would be noticed
            assert_layer(out, leave(with_local(other, v, attn, groups)), 1e-2)


@pytest.mark.parametrize("name", TINY)
def test_heads_that_do_not_divide_the_channels(name):
    model = TINY[name].build()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=r"attn.*: heads=7 does not divide the layer's \d+ channels"):
        lf.apply(model, lf.LiT(heads=7))
    assert list(model.state_dict()) == before
