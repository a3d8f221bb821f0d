"""`SLA` on made-up calls, against its formula written out token by token in float64."""

import math

import pytest
import torch

import linfusion as lf
from linfusion.call import AttnCall, Site

GRIDS = [(30,), (5, 6), (2, 3, 5)]


def make_call(grid, text=3, text_first=True, masked=False, kv_heads=2, scale=None):
    tokens = math.prod(grid) + text
    q, k, v = (torch.randn(2, tokens, h, 8, dtype=torch.float64) for h in (4, kv_heads, kv_heads))
    mask = torch.tensor([[True] * text, [False] + [True] * (text - 1)]) if masked else None
    return AttnCall(q, k, v, grid=grid, text=text, text_first=text_first, text_mask=mask, scale=scale)


def build(config, trained=True):
    mechanism = config.build(Site("layer", width=32, heads=4, head_dim=8, joint=True)).double()
    for p in mechanism.parameters():
        assert not p.any()  # the projection starts at zero
        if trained:
            torch.nn.init.normal_(p, 0.0, 0.5)
    return mechanism


def written_out(call, config, mechanism):
    """One query token at a time: text by softmax over all, image by the blocks of its block's choice."""
    c, batch, tokens = config, call.q.shape[0], call.q.shape[1]
    words, image = (x[0].tolist() for x in call.split(torch.arange(tokens)[None]))
    blocks = [image[i : i + c.block_k] for i in range(0, len(image), c.block_k)]
    count, drop = max(1, int(c.topk * len(blocks))), int(c.skip * len(blocks))
    weight, bias = mechanism.linear_weight, mechanism.linear_bias
    scale, out = 8**-0.5 if call.scale is None else call.scale, torch.zeros_like(call.q)
    for b in range(batch):
        real = [t for j, t in enumerate(words) if call.text_mask is None or call.text_mask[b, j]]
        for h in range(call.q.shape[2]):
            q, k, v = call.q[b, :, h], *(x[b, :, h * x.shape[2] // 4] for x in (call.k, call.v))
            means = torch.stack([k[block].mean(0) for block in blocks])
            for t in range(tokens):
                seen, others = real + image, []
                if t in image:
                    first = image.index(t) // c.block_q * c.block_q
                    order = (means @ q[image[first : first + c.block_q]].mean(0)).argsort(descending=True).tolist()
                    seen = real + [s for j in order[:count] for s in blocks[j]]
                    rest = [s for j in order[count : len(blocks) - drop] for s in blocks[j]]
                    others = real + image if c.linear == "all" else rest
                out[b, t, h] = (scale * k[seen] @ q[t]).softmax(0) @ v[seen]
                if t in image:
                    weights = k[others].softmax(-1) @ q[t].softmax(-1)
                    out[b, t, h] += weight @ (weights @ v[others] / (weights.sum() + 1e-5)) + bias
    return out


CONFIGS = [
    lf.SLA(topk=0.5, block_q=16, block_k=16),
    lf.SLA(topk=0.1, block_q=32, block_k=16, linear="complement"),
    lf.SLA(topk=0.5, block_q=16, block_k=16, linear="marginal", skip=0.5),
]
CALLS = {
    "image": dict(text=0),
    "text-first": dict(),
    "text-last": dict(text_first=False, scale=0.7),
    "padded": dict(masked=True, text_first=False),
    "one-kv-head": dict(kv_heads=1),
}


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_is_the_formula(config, case):
    call, mechanism = make_call((5, 9), **CALLS[case]), build(config)
    want = written_out(call, config, mechanism)
    torch.testing.assert_close(mechanism(call), want)
    other = make_call((5, 9), **CALLS[case])  # other numbers, so another answer
    assert (mechanism(other) - want).abs().max() > 0.1


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_text_queries_stay_exact(trained):
    """Trained too: neither the linear part nor its bias reaches them."""
    call = make_call((5, 9), masked=True)
    out, exact = (build(c, trained)(call) for c in (CONFIGS[0], lf.SLA(topk=1.0)))
    torch.testing.assert_close(call.split(out)[0], call.split(exact)[0])
    assert (call.split(out)[1] - call.split(exact)[1]).abs().max() > 0.1


def test_the_grid_is_not_asked_for():
    """Blocks are runs of tokens, so that any grid of equally many tokens, or none at all, has the same answer."""
    call, mechanism = make_call((5, 6)), build(CONFIGS[0])
    want = mechanism(call)
    for grid in (*GRIDS, None):
        call.grid = grid
        assert torch.equal(mechanism(call), want)
    assert "grid" not in mechanism.needs


@pytest.mark.parametrize("linear", ["all", "complement", "marginal"])
def test_work_follows_the_share(linear):
    """At FLUX's size the chosen share decides: half of the blocks is about half of the work, text comes on top."""
    site = Site("layer", width=3072, heads=24, head_dim=128, joint=True)
    exact = (4096 + 512) ** 2
    half, tenth = (lf.SLA(topk=t, linear=linear).build(site).pairs((64, 64), 512) for t in (0.5, 0.1))
    text = 512 * 4096 + 512 * 4608
    assert 0.5 * 4096**2 + text < half < 0.56 * 4096**2 + text < exact
    assert half - tenth == (32 - 6) * 64 * 4096  # 64 blocks: 32 and 6 of them
