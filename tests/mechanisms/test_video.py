"""LiT and Agent on video: convolutions and position tables frame by frame, agents from cells of three axes."""

import pytest
import torch
import torch.nn.functional as F

import linfusion as lf
from linfusion.call import AttnCall, Site
from linfusion.kernels import agent_attention, linear_attention

GRID = (2, 3, 5)


def made(config):
    torch.manual_seed(1)
    mechanism = config.build(Site("layer", width=16, heads=2, head_dim=8, axes=3)).double()
    for p in mechanism.parameters():
        torch.nn.init.normal_(p, std=0.5)
    q, k, v = (torch.randn(2, 30, 2, 8, dtype=torch.float64) for _ in range(3))
    return mechanism, AttnCall(q, k, v, grid=GRID)


def convolved(v, local):
    frames = v.flatten(2).reshape(2 * 2, 3, 5, 16).permute(0, 3, 1, 2)
    weight = local.weight.repeat(16 // len(local.weight), 1, 1)[:, None]
    bias = local.bias.repeat(16 // len(local.bias))
    out = F.conv2d(frames, weight, bias, padding=local.weight.shape[-1] // 2, groups=16)
    return out.permute(0, 2, 3, 1).reshape(v.shape)


def test_lit():
    mechanism, call = made(lf.LiT())
    linear = linear_attention(call.q, call.k, call.v, feature_map="relu_eps")
    torch.testing.assert_close(mechanism(call), linear + convolved(call.v, mechanism.local))


@pytest.mark.parametrize(("agents", "cells"), [((2, 1, 3), (2, 1, 3)), ((1, 2, 2), (1, 2, 2)), (6, (1, 2, 3))], ids=str)
def test_agent(agents, cells):
    mechanism, call = made(lf.Agent(agents))
    count = cells[0] * cells[1] * cells[2]
    image = call.q.flatten(2).transpose(1, 2).unflatten(2, GRID)
    pooled = F.adaptive_avg_pool3d(image, cells).flatten(2).transpose(1, 2).unflatten(2, (2, 8))
    b1, b2 = (
        F.interpolate(b, size=GRID[1:], mode="bilinear")[:, :, None].expand(2, count, *GRID).flatten(2)
        for b in (mechanism.key_bias, mechanism.query_bias)
    )
    want = agent_attention(call.q, call.k, call.v, pooled, key_bias=b1, query_bias=b2.mT)
    torch.testing.assert_close(mechanism(call), want + convolved(call.v, mechanism.local))


def test_agents_are_counted_per_axis():
    with pytest.raises(ValueError, match=r"layer: agents=\(2, 2\) has 2 axes, the grid has 3"):
        made(lf.Agent((2, 2)))
    mechanism, call = made(lf.Agent(31))
    with pytest.raises(ValueError, match="layer: 31 agents are more than the grid's 30 tokens"):
        mechanism(call)
