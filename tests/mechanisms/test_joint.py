"""Text beside the image in linear mechanisms: exact or linear, in front or behind, padded, few key heads, bf16."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import linfusion as lf
from linfusion.call import AttnCall, Rope, Site
from linfusion.kernels import RopeTables, rotate

GRID, TOKENS, TEXT = (5, 6), 30, 3
PADDED = torch.tensor([[True, True, True], [True, False, False]])
CONFIGS = {
    "linfusion": lf.LinFusion(),
    "lit": lf.LiT(),
    "lit-regrouped": lf.LiT(heads=2),
    "agent": lf.Agent(6),
}
LINEAR = {name: dataclasses.replace(c, text="linear") for name, c in CONFIGS.items() if not isinstance(c, lf.Agent)}


def make(text_first=True, mask=None, covers_text=True, kv_heads=4, text=TEXT, dtype=torch.float64):
    """A call of 4 heads of 8; the rotation differs from token to token and head to head."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, TOKENS + text, h, 8, dtype=dtype) for h in (4, kv_heads, kv_heads))
    shape = (1, TOKENS + text if covers_text else TOKENS, 1, 4)
    angle = torch.randn(shape, dtype=torch.float64).repeat_interleave(2, dim=-1)
    table = RopeTables(angle.cos(), angle.sin())
    rope = Rope(lambda x: rotate(x, table), table, covers_text)
    return AttnCall(q, k, v, grid=GRID, text=text, text_first=text_first, text_mask=mask, rope=rope)


def build(config):
    """With a local branch that does something."""
    torch.manual_seed(2)
    mechanism = config.build(Site("layer", width=32, heads=4, head_dim=8, joint=True)).double()
    for p in mechanism.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return mechanism


def without_text(call):
    """The image alone, as a host without text would call."""
    table = call.image_tables()
    return AttnCall(
        *(call.split(x)[1] for x in (call.q, call.k, call.v)), grid=GRID, rope=Rope(lambda x: rotate(x, table), table)
    )


FORMS = [
    pytest.param(first, mask, covers, id=f"text-{'first' if first else 'last'}-{name}-{'all' if covers else 'image'}")
    for first in (True, False)
    for name, mask in (("whole", None), ("padded", PADDED))
    for covers in (True, False)
]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("text_first", "mask", "covers_text"), FORMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_exact_text(name, text_first, mask, covers_text, kv_heads):
    """Text queries: softmax over all real keys. Image queries: N / (N + T) what the mechanism makes of the image alone,
    T / (N + T) softmax over the T real text keys; the local branch is added whole."""
    mechanism = build(CONFIGS[name])
    call = make(text_first, mask, covers_text, kv_heads)
    text, image = call.split(mechanism(call))
    among = mechanism(without_text(call))
    local = torch.zeros_like(among)
    if hasattr(mechanism, "local"):
        local = mechanism.local(without_text(call), local, getattr(CONFIGS[name], "heads", None))
        assert local.abs().max() > 0.1
    q, k = call.rotated()
    k, v = (x.repeat_interleave(4 // kv_heads, dim=2) for x in (k, call.v))
    (tq, iq), (tk, ik), (tv, iv) = (call.split(x) for x in (q, k, v))
    for i in range(2):
        one = slice(i, i + 1)
        words = torch.arange(TEXT) if mask is None else mask[i].nonzero()[:, 0]
        tk_i, tv_i = tk[one, words], tv[one, words]
        torch.testing.assert_close(
            text[one], softmax(tq[one], torch.cat((tk_i, ik[one]), 1), torch.cat((tv_i, iv[one]), 1))
        )
        share = TOKENS / (TOKENS + len(words))
        want = share * (among - local)[one] + (1 - share) * softmax(iq[one], tk_i, tv_i) + local[one]
        torch.testing.assert_close(image[one], want)


def softmax(q, k, v):
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(8**-0.5).exp()
    return torch.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdim=True), v)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("text_first", "mask", "covers_text"), FORMS)
@pytest.mark.parametrize("name", LINEAR)
def test_linear_text(name, text_first, mask, covers_text, kv_heads):
    """All real keys through one normalised sum of features, every pair's weight written out."""
    config, mechanism = LINEAR[name], build(LINEAR[name])
    call = make(text_first, mask, covers_text, kv_heads)
    groups, eps = (1, 1e-4) if name == "linfusion" else (2 if config.heads else 1, 1e-6)
    fq, fk = (F.elu(x) + 1 if name == "linfusion" else x.relu() + 1e-6 for x in (call.q, call.k))
    fk, v = (x.repeat_interleave(4 // kv_heads, dim=2) for x in (fk, call.v))
    rq, rk = (turned(call, x) for x in (fq, fk))
    got = mechanism(call)
    if hasattr(mechanism, "local"):
        got = got - mechanism.local(call, torch.zeros_like(got), config.heads)
        text, _ = call.split(mechanism(call) - got)
        assert not text.any()  # the branch leaves text alone
    for i in range(2):
        keys = torch.arange(TOKENS + TEXT)
        if mask is not None:
            place = torch.arange(TEXT) + (0 if text_first else TOKENS)
            keys = torch.tensor([j for j in keys.tolist() if j not in place[~mask[i]].tolist()])
        weights, numerator = (
            torch.einsum("qhd,khd->hqk", *(x[i][y].unflatten(1, (-1, groups)).flatten(2) for x, y in pair))
            for pair in (((fq, slice(None)), (fk, keys)), ((rq, slice(None)), (rk, keys)))
        )
        wide = v[i, keys].unflatten(1, (-1, groups)).flatten(2)
        want = torch.einsum("hqk,khd->qhd", numerator / len(keys), wide) / (weights.mean(-1).T[..., None] + eps)
        torch.testing.assert_close(got[i], want.reshape(got[i].shape))


def turned(call, x):
    """The call's rotation, of what it covers."""
    if call.rope.covers_text:
        return call.rope(x)
    text, image = call.split(x)
    return call.join(text, call.rope(image))


@pytest.mark.parametrize("name", LINEAR)
def test_without_text_the_setting_changes_nothing(name):
    call = make(text=0)
    linear, exact = build(LINEAR[name]), build(CONFIGS[name])
    assert torch.equal(linear(call), exact(make(text=0)))
    assert linear.pairs(GRID, 0) == exact.pairs(GRID, 0)
    assert not torch.equal(linear(make()), exact(make()))
    assert linear.pairs(GRID, TEXT) < exact.pairs(GRID, TEXT)


@pytest.mark.parametrize("text_first", [True, False], ids=["text-first", "text-last"])
@pytest.mark.parametrize("name", [*CONFIGS, *(f"{name}+linear" for name in LINEAR)])
def test_padding_has_no_say(name, text_first):
    mechanism = build(LINEAR[name.removesuffix("+linear")] if name.endswith("+linear") else CONFIGS[name])
    outs = []
    for filler in (0.0, 100.0):
        call = make(text_first, PADDED)
        for x in (call.q, call.k, call.v):
            call.split(x)[0][~PADDED] = filler
        outs.append(call.split(mechanism(call)))
    torch.testing.assert_close(outs[0][1], outs[1][1])
    torch.testing.assert_close(outs[0][0][PADDED], outs[1][0][PADDED])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sample_without_any_text(name):
    """As if it stood alone, and its gradients are finite."""
    mechanism, call = build(CONFIGS[name]), make(mask=torch.tensor([[True] * 3, [False] * 3]))
    call.q.requires_grad_()
    image = call.split(mechanism(call))[1]
    torch.testing.assert_close(image[1], mechanism(without_text(call))[1])
    image.sum().backward()
    assert call.q.grad.isfinite().all()


def test_half_precision_counts_tokens():
    """257 tokens do not exist in bf16: with one real word of 3 the share must still be 256 / 257."""
    config = lf.LinFusion()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 259, 1, 8) for _ in range(3))
    v[:, 3:], v[:, :3] = 0, 1000.0  # so that the image's output is 1000 times the weight of the text
    mask = torch.tensor([[True, False, False]])
    site = Site("layer", width=8, heads=1, head_dim=8, joint=True)
    call = AttnCall(q.bfloat16(), k.bfloat16(), v.bfloat16(), grid=(16, 16), text=3, text_mask=mask)
    out = config.build(site).bfloat16()(call)
    assert out.dtype == torch.bfloat16
    assert (call.split(out)[1].float() - 1000 / 257).abs().max() < 0.02


def test_tables_of_the_whole_sequence():
    for text_first in (True, False):
        whole, part = make(text_first), make(text_first, covers_text=False)
        assert whole.tables() is whole.rope.tables
        torch.testing.assert_close(rotate(part.q, part.tables()), part.rotated()[0])
        torch.testing.assert_close(
            rotate(whole.split(whole.q)[1], whole.image_tables()), whole.split(whole.rotated()[0])[1]
        )
        assert part.image_tables() is part.rope.tables
    still = make()
    still.rope = None
    assert still.tables() is None and still.image_tables() is None
    assert make().real_tokens() is None and make(text=0, mask=PADDED[:, :0]).real_tokens() is None
    assert make(text_first=False, mask=PADDED).real_tokens()[1].tolist() == [True] * 31 + [False] * 2
