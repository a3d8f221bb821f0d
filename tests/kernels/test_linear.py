"""linear_attention against the quadratic form written out."""

import pytest
import torch
import torch.nn.functional as F

from linfusion.kernels import RopeTables, linear_attention, rotate
from linfusion.kernels.reference import FEATURE_MAPS


def tables(tokens, dim, interleaved=True):
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * torch.logspace(0, -2, dim // 2, dtype=torch.float64)
    both = angle.repeat_interleave(2, dim=1) if interleaved else torch.cat((angle, angle), dim=1)
    return RopeTables(both.cos(), both.sin(), interleaved)


def quadratic(q, k, v, feature_map, eps, rope=None, divide=True):
    """Every weight of every pair, summed one by one: no state is formed."""
    phi = FEATURE_MAPS[feature_map]
    q, k = phi(q), phi(k)
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k)
    numerator = weights
    if rope is not None:
        numerator = torch.einsum("bqhd,bkhd->bhqk", rotate(q, rope), rotate(k, rope))
    out = torch.einsum("bhqk,bkhd->bqhd", numerator, v) / k.shape[1]
    return out / (weights.mean(-1) + eps).transpose(1, 2).unsqueeze(-1) if divide else out


@pytest.mark.parametrize("rope", [None, True, False], ids=["plain", "interleaved", "halves"])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 63, 3, 40), (1, 100, 2, 72)], ids=str)
def test_equals_the_quadratic_form(shape, feature_map, rope):
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
    rope = None if rope is None else tables(shape[1], shape[3], rope)
    for normalize in ("divide", "none") if feature_map != "identity" else ("none",):
        out = linear_attention(q, k, v, feature_map=feature_map, normalize=normalize, eps=1e-4, rope=rope)
        want = quadratic(q, k, v, feature_map, 1e-4, rope, normalize == "divide")
        torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-11)
        grad = torch.randn_like(out)
        for name, a, b in zip(
            "qkv", torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"d{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_the_formula(dtype, assert_accurate):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 200, 2, 40, dtype=dtype) for _ in range(3))
    exact = quadratic(q.double(), k.double(), v.double(), "elu1", 1e-6)
    same = quadratic(q, k, v, "elu1", 1e-6)
    out = linear_attention(q, k, v)
    assert out.dtype == dtype
    assert_accurate("out", out, same, exact)


def test_the_answer_does_not_depend_on_the_length():
    """Repeating all keys changes nothing, eps included: numerator and denominator are both means."""
    q, k, v = (torch.randn(1, 30, 2, 16, dtype=torch.float64) for _ in range(3))
    once = linear_attention(q, k, v, eps=0.1)
    torch.testing.assert_close(linear_attention(q, k.repeat(1, 5, 1, 1), v.repeat(1, 5, 1, 1), eps=0.1), once)


def test_a_million_keys_stay_within_fp16():
    q = torch.randn(1, 8, 1, 32, dtype=torch.float16)
    k, v = (torch.randn(1, 1 << 20, 1, 32, dtype=torch.float16) + 3 for _ in range(2))
    out = linear_attention(q, k, v)
    assert out.isfinite().all()
    assert (out.float() - 3).abs().max() < 0.1  # an average of values around 3


def test_grouped_heads_and_another_length():
    q, k, v = torch.randn(2, 9, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    want = linear_attention(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))
    torch.testing.assert_close(linear_attention(q, k, v), want)


@pytest.mark.parametrize("rope", [None, True, False, "per head"], ids=["plain", "interleaved", "halves", "per-head"])
@pytest.mark.parametrize("count", [1, 2, 3, 8], ids=str)
def test_channels_in_other_heads(count, rope):
    """phi, then the rotation of the 4 heads of 6, then new heads: also such as cut an old one in two."""
    q, k, v = (torch.randn(2, 9, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    table = None if rope is None else tables(9, 6, rope is not False)
    if rope == "per head":
        angle = torch.randn(1, 9, 4, 6, dtype=torch.float64)
        table = RopeTables(angle.cos(), angle.sin())
    fq, fk = q.relu() + 1e-6, k.relu() + 1e-6
    rq, rk = (fq, fk) if table is None else (rotate(fq, table), rotate(fk, table))
    outs = []
    for chunk in torch.arange(24).chunk(count):
        a, b, c, d, e = (x.flatten(2)[..., chunk] for x in (fq, fk, rq, rk, v))
        outs.append((c @ d.mT / 9 @ e) / ((a @ b.mT).mean(-1, keepdim=True) + 1e-6))
    want = torch.cat(outs, dim=-1).unflatten(-1, (4, 6))
    got = linear_attention(q, k, v, feature_map="relu_eps", rope=table, heads=count)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    torch.testing.assert_close(*(torch.autograd.grad(o, (q, k, v), grad) for o in (got, want)))
    assert (linear_attention(q, k, v, feature_map="relu_eps", rope=table) - want).abs().max() > 1e-2


@pytest.mark.parametrize("normalize", ["divide", "none"])
@pytest.mark.parametrize("feature_map", ["elu1", "relu_eps", "softmax"])  # none of them makes zero of zero
def test_masked_keys_are_as_if_left_out(feature_map, normalize):
    q, k, v = (torch.randn(2, 9, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask, table = torch.rand(2, 9) > 0.4, tables(9, 8)
    settings = dict(feature_map=feature_map, normalize=normalize, eps=0.1, rope=table)
    got = linear_attention(q, k, v, key_mask=mask, **settings)
    phi = FEATURE_MAPS[feature_map]
    for i in range(2):
        one, kept = slice(i, i + 1), mask[i]
        weights = torch.einsum("bqhd,bkhd->bhqk", *(rotate(phi(x[one]), table) for x in (q, k)))[..., kept]
        want = torch.einsum("bhqk,bkhd->bqhd", weights, v[one, kept]) / kept.sum()
        if normalize == "divide":
            want = want / (torch.einsum("bqhd,bhd->bqh", phi(q[one]), phi(k[one, kept]).mean(1)) + 0.1)[..., None]
        torch.testing.assert_close(got[one], want)
    dk, dv = torch.autograd.grad(got.square().sum(), (k, v))
    assert not dk[~mask].any() and not dv[~mask].any() and dk[mask].any()
    everything = linear_attention(q, k, v, key_mask=torch.ones_like(mask), **settings)
    torch.testing.assert_close(everything, linear_attention(q, k, v, **settings))
    nothing = linear_attention(q, k, v, key_mask=torch.zeros_like(mask), **settings)
    assert not nothing.any()


def test_rotation_turns_pairs():
    x, t = torch.randn(1, 6, 2, 8, dtype=torch.float64), tables(6, 8)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(t.cos, t.sin)[None, :, None, ::2]
    torch.testing.assert_close(rotate(x, t), torch.view_as_real(turned).flatten(-2))
    torch.testing.assert_close(rotate(x, t).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(feature_map="exp"), "Available: elu1, relu, softmax, identity"),
        (dict(normalize="sum"), "Available: divide, none"),
        (dict(heads=3), "heads=3 does not divide the 8 channels of 1 heads"),
        (dict(key_mask=torch.ones(1, 5, dtype=torch.bool)), r"key_mask must be bool \[B, S_k\] = \(1, 4\)"),
        (dict(key_mask=torch.ones(1, 4)), "key_mask must be bool"),
        (dict(rope=tables(5, 8)), r"tables \(5, 8\) do not fit"),
    ],
)
def test_bad_input(change, message):
    q = torch.randn(1, 4, 1, 8)
    with pytest.raises(ValueError, match=message):
        linear_attention(q, q, q, **change)


def test_elu1_is_positive():
    x = torch.linspace(-20, 20, 101)
    assert (FEATURE_MAPS["elu1"](x) >= 0).all()
    torch.testing.assert_close(FEATURE_MAPS["elu1"](x), F.elu(x) + 1)
