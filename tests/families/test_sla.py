"""`SLA` inside each host against the host itself, whose own attention is given the dense masks worked out here."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel

import linfusion as lf

from ..models import TINY, flux, forward, gap, grids_for, lively
from ..models.base import whole

CONFIGS = [
    lf.SLA(topk=0.5, block_q=16, block_k=16),
    lf.SLA(topk=0.3, block_q=32, block_k=16, linear="complement", feature_map="elu1"),
    lf.SLA(topk=0.3, block_q=16, block_k=16, linear="marginal", skip=0.3),
]


def projection(dim):
    """Made-up trained values, the same in every layer of that head dim."""
    generator = torch.Generator().manual_seed(dim)
    return torch.randn(dim, dim, generator=generator) / dim**0.5, torch.randn(dim, generator=generator)


def train(model):
    for module in model.modules():
        if isinstance(getattr(module, "linfusion", None), torch.nn.Module):
            weight, bias = projection(module.linfusion.site.head_dim)
            module.linfusion.linear_weight.data.copy_(weight)
            module.linfusion.linear_bias.data.copy_(bias)
    return model


def wide(x):
    """Arguments in float64: in fp32 the hosts themselves spread one layer's rounding to more than is to be allowed."""
    if isinstance(x, dict):
        return {k: wide(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(wide(v) for v in x)
    return x.double() if torch.is_tensor(x) and x.is_floating_point() else x


def sla(tiny, grid, config, trained=True, layers=None):
    model = lf.apply(tiny.build().double(), config, layers=layers)
    return forward(train(model) if trained else model, wide(tiny.inputs(*grid)))


def places(tiny, grid):
    """`{length: [2, N]}`: where each sample's image tokens stand in each kind of sequence."""
    runs = {run.tokens: run for run in tiny.sequences(*grid)}
    found = {n: torch.arange(math.prod(run.grid)).repeat(2, 1) + run.before for n, run in runs.items()}
    if tiny.masks is not None:  # samples differ; their image tokens are those that would not see each other
        for length, mask in tiny.masks(
            tiny.grid(*grid), lambda shape: torch.zeros([math.prod(shape)] * 2).bool()
        ).items():
            image = ~mask.expand(2, 1, length, length)[:, 0].all(dim=-1)
            found[length] = image.nonzero()[:, 1].unflatten(0, (2, -1))
    return found


def maps(q, k, image, c):
    """`[H, S, S]` masks of one sample: what the softmax sees, and what the linear part sums."""
    row_of, column_of = torch.arange(len(image)) // c.block_q, torch.arange(len(image)) // c.block_k
    # which tokens each block holds, divided by how many: a mean per row
    pool_q, pool_k = (F.one_hot(x).T.to(q.dtype) for x in (row_of, column_of))
    pool_q, pool_k = (x / x.sum(-1, keepdim=True) for x in (pool_q, pool_k))
    centred = k[:, image] - k[:, image].mean(1, keepdim=True)
    scores = (pool_q @ q[:, image]) @ (pool_k @ centred).transpose(-1, -2)
    blocks = scores.shape[-1]
    count, drop = max(1, int(c.topk * blocks)), int(c.skip * blocks)
    better = (scores[..., None, :] > scores[..., None]).sum(-1)  # how many blocks go before this one
    chosen, rest = better < count, (better >= count) & (better < blocks - drop)
    seen = torch.ones(len(q), q.shape[1], q.shape[1], dtype=torch.bool)
    seen[:, image[:, None], image] = chosen[:, row_of][..., column_of]
    summed = torch.zeros_like(seen)
    if c.linear == "all":
        summed[:, image] = True
    else:
        summed[:, image[:, None], image] = rest[:, row_of][..., column_of]
    return seen, summed


def dense(monkeypatch, tiny, grid, config, *, text=True, trained=True):
    """The stock model with its own attention under those masks, the linear part added as a matrix of weights.

    `text=False` puts text tokens into blocks like all others, a mistake that is to be noticed.
    """
    where = places(tiny, grid)
    if not text:
        where = {n: torch.arange(n).repeat(2, 1) for n in where}
    phi = {"softmax": lambda x: x.softmax(-1), "elu1": lambda x: torch.where(x > 0, x + 1, x.exp())}[config.feature_map]
    real, lengths = F.scaled_dot_product_attention, []

    def masked(query, key, value, attn_mask=None, *more, **settings):
        if query.shape[2] != key.shape[2] or query.shape[2] not in where:  # cross-attention, text alone
            return real(query, key, value, attn_mask, *more, **settings)
        images = where[query.shape[2]].repeat_interleave(len(query) // 2, 0)  # frames may be samples of their own
        lengths.append(query.shape[2])
        both = [maps(q, k, image, config) for q, k, image in zip(query, key, images, strict=True)]
        seen, summed = (torch.stack(x) for x in zip(*both, strict=True))
        if attn_mask is not None:  # the host's own: padding
            keep = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -1
            seen, summed = seen & keep, summed & keep
        out = real(query, key, value, seen, *more, **settings)
        if trained:
            weights = phi(query) @ phi(key).transpose(-1, -2) * summed
            weight, bias = (x.double() for x in projection(query.shape[-1]))
            added = (weights @ value / (weights.sum(-1, keepdim=True) + 1e-5)) @ weight.T + bias
            for sample, image in enumerate(images):
                out[sample, :, image] += added[sample, :, image]
        return out

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", masked)
        out = forward(tiny.build().double(), wide(tiny.inputs(*grid)))
    assert len(lengths) == tiny.layers
    return out


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_sla_is_the_host_with_a_dense_mask(tiny, monkeypatch, config):
    for grid in grids_for(tiny, (6, 9), (9, 4), (5, 7)):
        assert gap(sla(tiny, grid, config), dense(monkeypatch, tiny, grid, config)) < 1e-9, grid


def test_fresh_it_is_the_blocks_alone(tiny, monkeypatch):
    grid = grids_for(tiny, (6, 9))[0]
    got = sla(tiny, grid, CONFIGS[0], trained=False)
    assert gap(got, dense(monkeypatch, tiny, grid, CONFIGS[0], trained=False)) < 1e-9
    assert gap(got, dense(monkeypatch, tiny, grid, CONFIGS[0])) > 1e-2


def test_what_would_be_noticed(tiny, monkeypatch):
    """The same comparison fails by far for each plausible mistake."""
    grid, config = grids_for(tiny, (6, 9), (8, 8))[0], CONFIGS[2]
    got = sla(tiny, grid, config)
    for wrong in (
        dict(topk=0.6),
        dict(block_q=32),
        dict(block_k=32),
        dict(skip=0.0),
        dict(linear="all", skip=0.0),
        dict(linear="complement", skip=0.0),
        dict(feature_map="elu1"),
    ):
        settings = {"topk": 0.3, "block_q": 16, "block_k": 16, "linear": "marginal", "skip": 0.3} | wrong
        assert gap(dense(monkeypatch, tiny, grid, lf.SLA(**settings)), got) > 1e-2, wrong
    if any(run.before or run.after for run in tiny.sequences(*grid)):
        assert gap(dense(monkeypatch, tiny, grid, config, text=False), got) > 1e-2, "text stands outside of the blocks"
    assert gap(sla(tiny, grid, config, layers=tiny.some), got) > 1e-2, "every layer counts"


@pytest.mark.parametrize("linear", ["all", "complement", "marginal"])
def test_all_blocks_are_stock_until_trained(tiny, model, inputs, linear):
    stock = forward(model, inputs)
    lf.apply(model, lf.SLA(topk=1.0, linear=linear))
    assert gap(forward(model, inputs), stock) < 1e-5
    assert gap(forward(train(model), inputs), stock) > 1e-2
    lf.apply(model, lf.SLA(topk=0.5, block_q=16, block_k=16, linear=linear))
    assert gap(forward(model, inputs), stock) > 1e-2
    lf.restore(model)
    assert torch.equal(forward(model, inputs), stock)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_parameter_learns(tiny, model, config):
    """On a grid whose coarsest layer has more than one block: where all are chosen, the complement is empty."""
    lf.apply(model, config)
    inputs = tiny.inputs(*grids_for(tiny, (10, 12))[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        whole(model(**inputs, return_dict=False)).square().mean().backward()
        optimizer.step()
    gradients = {
        name: p.grad
        for name, p in model.named_parameters()
        if ".linfusion." in name or name.endswith((".to_q.weight", ".to_k.weight"))
    }
    assert gradients and not [n for n, g in gradients.items() if g is None or not g.isfinite().all()]
    still = [n for n, g in gradients.items() if not g.abs().max() > 0]
    assert not still


def test_flux_compiles_whole():
    """No break in the graph, and nothing waits for the grid; the second size makes the lengths symbolic."""
    torch._dynamo.reset()
    config = lf.SLA(topk=0.5, block_q=16, block_k=16, linear="complement")
    small = FluxTransformer2DModel.from_config(dict(flux().config) | {"num_layers": 1, "num_single_layers": 1})
    model = train(lf.apply(lively(small).eval(), config))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for grid in ((6, 9), (5, 7)):
        inputs = TINY["flux"].inputs(*grid)
        with torch.no_grad():
            got = compiled(**inputs, return_dict=False)[0]
        assert gap(got, forward(model, inputs)) < 1e-5
    torch._dynamo.reset()
