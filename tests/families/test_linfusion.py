"""`LinFusion` inside hosts, layer by layer, against its formulas written out in float64."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import linfusion as lf

from ..models import TEXT, TINY, forward, gap

PLAIN = [name for name, tiny in TINY.items() if not lf.families()[tiny.family].joint]


def layers(model, inputs):
    """`[(layer, arguments, output)]` of one forward."""
    seen = []
    handles = [
        module.register_forward_hook(lambda m, args, kw, out: seen.append((m, args, kw, out)), with_kwargs=True)
        for module in model.modules()
        if hasattr(module, "linfusion")
    ]
    forward(model, inputs)
    for handle in handles:
        handle.remove()
    names = [list(inspect.signature(m.forward).parameters) for m, *_ in seen]
    return [(m, dict(zip(n, args, strict=False)) | kw, out) for n, (m, args, kw, out) in zip(names, seen, strict=True)]


def train(model):
    """Made-up training: every parameter of every mechanism moves."""
    for name, p in model.named_parameters():
        if ".linfusion." in name:
            torch.nn.init.normal_(p, float(p.ndim == 1 and name.endswith("1.weight")), 0.3)


def mlp(x, m):
    """P(X) = W2 . LeakyReLU(LayerNorm(W1 X + b1)) + b2, where LayerNorm has the middle width."""
    first, norm, _, last = m
    x = x @ first.weight.double().T + first.bias.double()
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    x = x * norm.weight.double() + norm.bias.double()
    return torch.where(x > 0, x, 0.01 * x) @ last.weight.double().T + last.bias.double()


def wide(x):
    """Arguments in float64, whole numbers and nested ones as they are."""
    if isinstance(x, dict):
        return {k: wide(v) for k, v in x.items()}
    return x.double() if torch.is_tensor(x) and x.is_floating_point() else x


def phi(x):
    return torch.where(x > 0, x + 1, x.exp())


def linear(x, layer):
    out = x @ layer.weight.double().T
    return out if layer.bias is None else out + layer.bias.double()


def heads(x, count):
    """`[B, N, H * D]` to `[B, H, N, D]`."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def published(attn, x, with_mlp):
    """reference/linfusion_clear.md, 1.1, as a full matrix of weights: o_i = mean_j w_ij v_j / (mean_j w_ij + 1e-4)."""
    m, x = attn.linfusion, x.double()
    x_q, x_k = (x + mlp(x, m.q_mlp), x + mlp(x, m.k_mlp)) if with_mlp else (x, x)
    q, k = phi(heads(linear(x_q, attn.to_q), attn.heads)), phi(heads(linear(x_k, attn.to_k), attn.heads))
    v = heads(linear(x, attn.to_v), attn.heads)
    weights = q @ k.transpose(-1, -2) / x.shape[1]
    out = (weights @ v) / (weights.sum(-1, keepdim=True) + 1e-4)
    return linear(out.transpose(1, 2).flatten(2), attn.to_out[0])


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("mid_dim", [None, 4], ids=["mid-C", "mid-4"])
def test_linfusion_is_the_published_formula(name, mid_dim):
    model = lf.apply(TINY[name].build().double(), lf.LinFusion(mid_dim=mid_dim))
    train(model)
    seen = layers(model, wide(TINY[name].inputs(6, 9)))
    assert len(seen) == TINY[name].layers
    for attn, given, out in seen:
        assert out.dtype == torch.float64
        assert attn.linfusion.q_mlp[0].out_features == (mid_dim or attn.to_q.in_features)
        assert gap(out, published(attn, given["hidden_states"], True)) < 1e-9
        assert gap(out, published(attn, given["hidden_states"], False)) > 1e-4


def test_the_branch_starts_at_zero_effect(tiny, model, inputs):
    """Fresh, the MLPs change nothing at all; they are there, though, and training opens them."""
    lf.apply(model, lf.LinFusion())
    fresh = forward(model, inputs)
    for module in model.modules():
        if hasattr(module, "linfusion"):
            module.linfusion.features = lambda x: (x, x)
    assert torch.equal(forward(model, inputs), fresh)
    lf.apply(model, lf.LinFusion())
    train(model)
    assert gap(forward(model, inputs), fresh) > 1e-2


@pytest.mark.parametrize("name", PLAIN)
def test_a_fresh_layer_is_the_formula_without_its_mlps(name):
    model = lf.apply(TINY[name].build().double(), lf.LinFusion())
    for attn, given, out in layers(model, wide(TINY[name].inputs(6, 9))):
        assert gap(out, published(attn, given["hidden_states"], False)) < 1e-9


def rms(x, norm):
    return x * (x.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()


def turn(x, tables):
    """RoFormer's rotation of `[B, H, S, D]`: channels 2i and 2i + 1 by one angle."""
    cos, sin = (t.double()[:, 0::2] for t in tables)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def edit_mix(attn, given, trained):
    """EDiT's rule: text rows exact; image rows N / (N + T) linear over the image, T / (N + T) softmax over the text."""
    x, text, m = given["hidden_states"].double(), given.get("encoder_hidden_states"), attn.linfusion
    words = None
    if text is None:  # single blocks: one sequence, text first
        words, x = x[:, :TEXT], x[:, TEXT:]
    x_q, x_k = (x + mlp(x, m.q_mlp), x + mlp(x, m.k_mlp)) if trained else (x, x)
    if words is not None:
        parts = [
            (linear(torch.cat((words, y), dim=1), to), norm)
            for y, to, norm in ((x_q, attn.to_q, attn.norm_q), (x_k, attn.to_k, attn.norm_k), (x, attn.to_v, None))
        ]
        q, k, v = (heads(p, attn.heads) if norm is None else rms(heads(p, attn.heads), norm) for p, norm in parts)
    else:
        text = text.double()
        q = torch.cat((rms(heads(linear(text, attn.add_q_proj), attn.heads), attn.norm_added_q),
                       rms(heads(linear(x_q, attn.to_q), attn.heads), attn.norm_q)), dim=2)  # fmt: skip
        k = torch.cat((rms(heads(linear(text, attn.add_k_proj), attn.heads), attn.norm_added_k),
                       rms(heads(linear(x_k, attn.to_k), attn.heads), attn.norm_k)), dim=2)  # fmt: skip
        v = heads(torch.cat((linear(text, attn.add_v_proj), linear(x, attn.to_v)), dim=1), attn.heads)
    tables, n = given["image_rotary_emb"], x.shape[1]
    rq, rk = turn(q, tables), turn(k, tables)
    exact = F.scaled_dot_product_attention(rq[:, :, :TEXT], rk, v)
    from_text = F.scaled_dot_product_attention(rq[:, :, TEXT:], rk[:, :, :TEXT], v[:, :, :TEXT])
    # phi first, then rotate, in the numerator only: a rotated feature is no longer positive
    fq, fk, v = phi(q[:, :, TEXT:]), phi(k[:, :, TEXT:]), v[:, :, TEXT:]
    image_tables = [t[TEXT:] for t in tables]
    numerator = (turn(fq, image_tables) @ turn(fk, image_tables).transpose(-1, -2) / n) @ v
    denominator = (fq @ fk.transpose(-1, -2) / n).sum(-1, keepdim=True) + 1e-4
    share = n / (n + TEXT)
    image = share * numerator / denominator + (1 - share) * from_text
    text_out, image_out = (y.transpose(1, 2).flatten(2) for y in (exact, image))
    if words is not None:
        return torch.cat((text_out, image_out), dim=1)
    return linear(image_out, attn.to_out[0]), linear(text_out, attn.to_add_out)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_on_flux_all_that_involves_text_stays_exact(trained):
    tiny = TINY["flux"]
    model = lf.apply(tiny.build(), lf.LinFusion())
    if trained:
        train(model)
    seen = layers(model, tiny.inputs(6, 9))
    assert len(seen) == tiny.layers
    for attn, given, out in seen:
        want = edit_mix(attn, given, trained)
        if isinstance(out, tuple):
            assert gap(out[0], want[0]) < 1e-5 and gap(out[1], want[1]) < 1e-5
        else:
            assert gap(out, want) < 1e-5
