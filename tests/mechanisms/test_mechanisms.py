"""Mechanisms on made-up calls: limits, gradients, settings. What they do inside hosts is in tests/families."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

import linfusion as lf
from linfusion.call import AttnCall, Norms, Rope, Site
from linfusion.kernels import RopeTables, linear_attention, rotate
from linfusion.mechanisms import config_from_dict

EXAMPLES = {
    "softmax": lf.Softmax(),
    "linfusion": lf.LinFusion(mid_dim=8),
    "clear": lf.CLEAR(radius=3),
    "clear-pooled": lf.CLEAR(radius=(2, 4), pool=2),
    "linfusion-linear": lf.LinFusion(mid_dim=8, text="linear"),
    "lit": lf.LiT(),
    "lit-one-head": lf.LiT(kernel_size=3, heads=1, text="linear"),
    "agent": lf.Agent(6),
    "agent-per-axis": lf.Agent((3, 2), kernel_size=5, bias=False),
    "sla": lf.SLA(topk=0.5, block_q=16, block_k=16),
    "sla-marginal": lf.SLA(topk=0.4, block_q=16, block_k=16, feature_map="elu1", linear="marginal", skip=0.1),
}


def test_every_mechanism_has_an_example():
    # AgentSD works between a layer's projections and its clock: tests/families/test_agent_sd.py
    assert {c.name for c in EXAMPLES.values()} == set(lf.mechanisms()) - {"agent-sd"}


def exact(q, k, v, mask=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def make_call(grid=(5, 6), text=3, text_first=True, masked=False, rotated=True, dtype=torch.float64):
    torch.manual_seed(1)
    tokens = math.prod(grid) + text
    q, k, v = (torch.randn(2, tokens, 2, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    angle = torch.randn(tokens, 4, dtype=dtype).repeat_interleave(2, dim=1)
    table = RopeTables(angle.cos(), angle.sin())
    mask = torch.tensor([[True] * text, [True] + [False] * (text - 1)]) if masked else None
    rope = Rope(lambda x: rotate(x, table), table) if rotated else None
    return AttnCall(q, k, v, grid=grid, text=text, text_first=text_first, text_mask=mask, rope=rope, exact=exact)


def build(config, joint=True):
    return config.build(Site("layer", width=16, heads=2, head_dim=8, joint=joint)).double()


@pytest.mark.parametrize("text_first", [True, False], ids=["text-first", "text-last"])
@pytest.mark.parametrize("text", [0, 3])
@pytest.mark.parametrize("name", EXAMPLES)
def test_shape_and_gradients(name, text, text_first):
    mechanism, call = build(EXAMPLES[name]), make_call(text=text, text_first=text_first)
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    for projected in mechanism.features(x):
        assert projected.shape == x.shape
    out = mechanism(call)
    assert out.shape == call.q.shape and out.isfinite().all()
    out.square().sum().backward()
    for leaf in (call.q, call.k, call.v, *(p for n, p in mechanism.named_parameters() if "mlp" not in n)):
        assert leaf.grad is not None and leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("name", EXAMPLES)
def test_settings_survive_json(name):
    config = EXAMPLES[name]
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "other"


EXACT = {
    "clear": lf.CLEAR(radius=100),
    "sla": lf.SLA(topk=1.0),
    "sla-complement": lf.SLA(topk=1.0, linear="complement"),
    "sla-marginal": lf.SLA(topk=1.0, linear="marginal"),
}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize("text_first", [True, False], ids=["text-first", "text-last"])
@pytest.mark.parametrize("name", EXACT)
def test_settings_that_cover_everything_are_exact(name, text_first, masked):
    call = make_call(text_first=text_first, masked=masked)
    mask = None
    if masked:
        real = torch.ones(2, 30, dtype=torch.bool)
        mask = call.join(call.text_mask, real)[:, None, None]
    want = exact(*call.rotated(), call.v, mask)
    torch.testing.assert_close(build(EXACT[name])(call), want)


def test_radius_one_sees_itself_and_the_text():
    call = make_call(rotated=False)
    out = call.split(build(lf.CLEAR(radius=1))(call))[1]
    q, k, v = call.q, call.k, call.v
    for i in (0, 17, 29):
        seen = [0, 1, 2, 3 + i]
        want = exact(q[:, 3 + i : 4 + i], k[:, seen], v[:, seen])[:, 0]
        torch.testing.assert_close(out[:, i], want)


def pick(sample, x, tokens):
    return x[sample : sample + 1, tokens]


@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
def test_linfusion_keeps_text_exact(masked):
    """Text queries: softmax over everything. Image queries: N / (N + T) linear, T / (N + T) softmax over text."""
    call = make_call(masked=masked)
    q, k = call.rotated()
    out = build(lf.LinFusion())(call)
    for sample in range(2):
        words = 3 if call.text_mask is None else int(call.text_mask[sample].sum())
        keys = list(range(words)) + list(range(3, 33))
        want_text = exact(pick(sample, q, slice(0, 3)), pick(sample, k, keys), pick(sample, call.v, keys))
        torch.testing.assert_close(out[sample : sample + 1, :3], want_text)
        image = slice(3, 33)
        linear = linear_attention(
            pick(sample, call.q, image),
            pick(sample, call.k, image),
            pick(sample, call.v, image),
            eps=1e-4,
            rope=call.image_tables(),
        )
        from_text = exact(
            pick(sample, q, image), pick(sample, k, slice(0, words)), pick(sample, call.v, slice(0, words))
        )
        want = (30 * linear + words * from_text) / (30 + words)
        torch.testing.assert_close(out[sample : sample + 1, 3:], want)


def test_linfusion_starts_at_zero_effect():
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    mechanism = build(lf.LinFusion(), joint=False)
    assert all(torch.equal(f, x) for f in mechanism.features(x))
    optimiser = torch.optim.SGD(mechanism.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        sum(f.square().sum() for f in mechanism.features(x)).backward()
        optimiser.step()
    assert all(p.grad.abs().sum() > 0 for p in mechanism.parameters())


def test_calls_norm_and_rotate_once_and_each_part_by_its_own():
    call = make_call(text=2, rotated=False)
    call.norms = Norms(lambda x: x * 2, lambda x: x * 3, lambda x: x * 5, lambda x: x * 7)
    q, k = call.normalised()
    torch.testing.assert_close(q, torch.cat((call.q[:, :2] * 5, call.q[:, 2:] * 2), dim=1))
    torch.testing.assert_close(k, torch.cat((call.k[:, :2] * 7, call.k[:, 2:] * 3), dim=1))
    assert call.normalised()[0] is q and call.rotated()[0] is q


def test_a_rotation_of_the_image_leaves_the_text():
    call = make_call(text=3, text_first=False, rotated=False)
    table = RopeTables(torch.zeros(30, 8), torch.ones(30, 8))
    call.rope = Rope(lambda x: rotate(x, table), table, covers_text=False)
    q, _ = call.rotated()
    assert torch.equal(q[:, 30:], call.q[:, 30:]) and not torch.equal(q[:, :30], call.q[:, :30])
    assert call.image_tables() is table


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "nope"}, "Available: softmax, linfusion, clear, sla"),
        ({"name": "clear", "radius": 0}, "radius must be positive"),
        ({"name": "clear", "radius": -1.5}, "radius must be positive"),
        ({"name": "clear", "radius": True}, "radius must be positive"),
        ({"name": "clear", "radius": "8"}, "radius must be positive"),
        ({"name": "clear", "radius": [1, 2, 3, 4]}, "one per axis"),
        ({"name": "clear", "radius": 4, "pool": 0}, "pool must be"),
        ({"name": "clear"}, "clear needs radius"),
        ({"name": "clear", "radius": 4, "window": 3}, "has no setting window"),
        ({"name": "linfusion", "mid_dim": 0}, "mid_dim must be"),
        ({"name": "linfusion", "mid_dim": 2.5}, "mid_dim must be"),
        ({"name": "linfusion", "eps": -1}, "eps must be a number"),
        ({"name": "linfusion", "text": "softmax"}, "text must be one of exact, linear, got 'softmax'"),
        ({"name": "lit", "text": None}, "text must be one of exact, linear"),
        *(({"name": "lit", "kernel_size": n}, "kernel_size must be an odd number") for n in (4, 0, -3, 3.0, True)),
        ({"name": "lit", "normalize": "none"}, "normalize must be one of divide, inline, mala, got 'none'"),
        *(({"name": "lit", "heads": n}, "heads must be a positive number or None") for n in (0, -2, 1.5, True, "4")),
        ({"name": "agent", "kernel_size": 2}, "kernel_size must be an odd number"),
        *(
            ({"name": "agent", "agents": n}, "agents must be")
            for n in (0, -4, 2.5, True, "9", [], [4, 0], [1, 2, 3, 4])
        ),
        ({"name": "agent", "bias": 1}, "bias must be true or false"),
        ({"name": "sla"}, "sla needs topk"),
        ({"name": "sla", "topk": 0}, "topk must be the share"),
        ({"name": "sla", "topk": 1.5}, "topk must be the share"),
        ({"name": "sla", "topk": 0.5, "block_q": 100}, "block_q must be a multiple of 16 tokens, got 100"),
        ({"name": "sla", "topk": 0.5, "block_k": 8}, "block_k must be a multiple of 16 tokens, got 8"),
        ({"name": "sla", "topk": 0.5, "block_k": 0}, "block_k must be a positive whole number"),
        ({"name": "sla", "topk": 0.5, "feature_map": "hedgehog"}, "Available: softmax, elu1, relu"),
        ({"name": "sla", "topk": 0.5, "linear": "none"}, "Available: all, complement, marginal"),
        ({"name": "sla", "topk": 0.5, "skip": 0.1}, "linear='marginal' only"),
        ({"name": "sla", "topk": 0.95, "linear": "marginal", "skip": 0.1}, "must not exceed 1"),
    ],
    ids=str,
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict(settings)


def test_radius_of_another_rank_names_the_layer():
    with pytest.raises(ValueError, match="layer: radius .* has 3 axes, the grid has 2"):
        build(lf.CLEAR(radius=(2, 2, 2)))


@pytest.mark.parametrize("name", EXAMPLES)
def test_work_is_counted(name):
    pairs = build(EXAMPLES[name]).pairs((5, 6), 3)
    assert 0 < pairs <= (33**2 if name != "clear-pooled" else 33 * 42)
