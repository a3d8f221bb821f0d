"""AgentSD in a UNet: its formula, its layers, its steps; and why other hosts refuse it."""

import pytest
import torch
from torch.nn import functional as F

import linfusion as lf
from linfusion.kernels.merge import merge, merge_slots, unmerge
from linfusion.mechanisms import agent_sd

from ..models import HOSTS, forward, gap

EARLY, LATE = torch.tensor(650), torch.tensor(550)
SETTINGS = lf.AgentSD(merge=0.4, agent_merge=0.95, cell=4, late_cell=2)


def unet():
    return HOSTS["unet-sd15"].build(), HOSTS["unet-sd15"].inputs(16, 24)


def wide_unet():
    """In float64: tokens stand in another order, and rounding may swap near ties."""
    model, inputs = unet()
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def hidden(args, kwargs):
    return args[0] if args else kwargs["hidden_states"]


def record(model, inputs):
    """`{layer: (hidden states, output)}` of one forward, blocks that hold one as well."""
    seen = {}
    layers = [n for n, m in model.named_modules() if hasattr(m, "linfusion")]
    handles = [
        model.get_submodule(n).register_forward_hook(
            lambda m, args, kw, out, n=n: seen.update({n: (hidden(args, kw), out)}), with_kwargs=True
        )
        for n in (*layers, *(n.rpartition(".")[0] for n in layers))
    ]
    forward(model, inputs)
    for handle in handles:
        handle.remove()
    return seen


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def softmax(q, k, v, scale):
    return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v


def published(attn, x, early, plans):
    """reference: the paper's two softmaxes over merged tokens, s^0.3 in the second, 0.075 of the values added."""
    (few, fewer), left = plans
    x, agents = merge(x, few, left[0]), merge(x, fewer, left[1])
    q, k, v = (heads(to(x), attn.heads) for to in (attn.to_q, attn.to_k, attn.to_v))
    scale = q.shape[-1] ** -0.5
    if early:
        a = heads(attn.to_q(agents), attn.heads)
        out = softmax(q, a, softmax(a, k, v, scale), q.shape[-1] ** -0.15) + 0.075 * v
    else:
        out = softmax(q, k, v, scale)
    return unmerge(attn.to_out[0](out.transpose(1, 2).flatten(2)), few)


@pytest.fixture
def made(monkeypatch):
    """Every plan that was made: what it was measured on, the settings, the slots."""
    from linfusion.mechanisms import agent_sd

    made = []
    monkeypatch.setattr(agent_sd, "merge_slots", lambda x, **k: made.append((x, k, merge_slots(x, **k))) or made[-1][2])
    return made


@pytest.mark.parametrize("early", [True, False], ids=["early", "late"])
def test_agent_sd_is_the_published_formula(early, made):
    model, inputs = unet()
    lf.apply(model, SETTINGS)
    seen = record(model, inputs | {"timestep": EARLY if early else LATE})
    layers = [name for name in seen if hasattr(model.get_submodule(name), "linfusion")]
    assert len(layers) == len(made) == 3
    few = 384 - int(0.4 * 384)
    fewer = 4 * 6 if early else 8 * 12  # int(0.95 * 384) would leave less than one in each cell
    with torch.no_grad():
        for name, (_, settings, slots) in zip(layers, made, strict=True):
            assert settings["grid"] == (16, 24) and settings["cell"] == (4 if early else 2)
            assert settings["left"] == (few, fewer)
            (x, out), plans = seen[name], (slots, settings["left"])
            assert gap(out, published(model.get_submodule(name), x, early, plans)) < 1e-5
            assert gap(out, published(model.get_submodule(name), x, not early, plans)) > 1e-3
    assert len({int(settings["seed"]) for _, settings, _ in made}) == 3, "each layer draws its own targets"


@pytest.mark.parametrize("name", ["unet-sd15", "sd3.5"])
def test_similarity_is_measured_before_the_norm(name, made):
    """The block's hidden states, which no layer sees, decide; merged is what comes out of the norm."""
    model, inputs = HOSTS[name].build(), HOSTS[name].inputs(6, 9)
    lf.apply(model, lf.AgentSD(cell=2))
    seen = record(model, inputs | {"timestep": EARLY.expand(2)})
    layers = [name for name in seen if hasattr(model.get_submodule(name), "linfusion")]
    for name, (measured, settings, slots) in zip(layers, made, strict=True):
        (block, _), (normed, _) = seen[name.rpartition(".")[0]], seen[name]
        assert torch.equal(measured, block)
        assert not torch.equal(merge_slots(normed, **settings), slots)
        assert model.get_submodule(name).linfusion.stream.hidden is None, "nothing is kept"
    lf.restore(model)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_only_the_finest_layers():
    """The mid block's grid is halved: it stays the host's own."""
    model, _ = unet()
    lf.apply(model, SETTINGS)
    on = {r.layer for r in lf.describe(model).layers if r.mechanism}
    assert on and not any(name.startswith("mid") for name in on)
    reasons = {r.layer: r.reason for r in lf.describe(model).layers}
    assert reasons["mid_block.attentions.0.transformer_blocks.0.attn1"] == "AgentSD acts on the finest grid only."
    with pytest.raises(NotImplementedError, match=r"mid_block\S+attn1: AgentSD acts on the finest grid only"):
        lf.apply(model, SETTINGS, layers="mid_block.*")


def test_steps_and_repetition():
    """The timestep decides; the same step draws the same targets, another one others."""
    model, inputs = unet()
    stock = forward(model, inputs)
    lf.apply(model, SETTINGS)
    outs = [forward(model, inputs | {"timestep": t}) for t in (EARLY, EARLY, torch.tensor(649))]
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    first = forward(model, inputs | {"timestep": 600})
    lf.apply(model, lf.AgentSD(early=0.39))
    assert gap(forward(model, inputs | {"timestep": 600}), first) > 1e-3
    lf.restore(model)
    assert torch.equal(forward(model, inputs), stock)


def test_samples_of_a_batch_share_targets_but_not_merges():
    """Guidance runs two halves: each must come out as it would alone."""
    model, inputs = wide_unet()
    lf.apply(model, SETTINGS)
    both = forward(model, inputs | {"timestep": EARLY})
    for i in range(2):
        alone = {k: v[i : i + 1] if torch.is_tensor(v) and v.ndim else v for k, v in inputs.items()}
        assert gap(forward(model, alone | {"timestep": EARLY}), both[i : i + 1]) < 1e-9


def test_nothing_merged_and_no_agents_is_stock():
    model, inputs = wide_unet()
    stock = forward(model, inputs)
    lf.apply(model, lf.AgentSD(merge=0.0, early=0.0))
    assert gap(forward(model, inputs), stock) < 1e-9


def test_the_whole_pipeline():
    pipe = HOSTS["unet-sd15"].build_pipeline()
    draw = HOSTS["unet-sd15"].draw
    stock = draw(pipe, 5.0)
    lf.apply(pipe, lf.AgentSD(cell=2))
    changed = draw(pipe, 5.0)
    assert changed.isfinite().all() and gap(changed, stock) > 1e-2
    assert 0 < lf.describe(pipe).attention_work_left < 1
    lf.restore(pipe)
    assert torch.equal(draw(pipe, 5.0), stock)
    assert not pipe.unet._forward_pre_hooks


@pytest.mark.parametrize("name", ["unet-sd15", "unet-sdxl"])
def test_pipelines_switch_by_themselves(name, monkeypatch):
    """Agents in the first two fifths of the schedule: in every run, of every pipeline that shares the model."""
    calls, merge_tokens = [], agent_sd.AgentSDAttention.merge

    def spied(self, x):
        merged = merge_tokens(self, x)
        calls.append((self.site.name, merged.agents is not None))
        return merged

    monkeypatch.setattr(agent_sd.AgentSDAttention, "merge", spied)
    pipe = HOSTS[name].build_pipeline()
    five = pipe.scheduler.set_timesteps
    monkeypatch.setattr(pipe.scheduler, "set_timesteps", lambda _, **settings: five(5, **settings))
    lf.apply(pipe, lf.AgentSD(cell=2))
    for run in (pipe, type(pipe)(**pipe.components), pipe):
        calls.clear()
        HOSTS[name].draw(run, 5.0)
        layers = {layer for layer, _ in calls}
        assert layers and all([a for n, a in calls if n == layer] == [True] * 2 + [False] * 3 for layer in layers)


def test_called_without_the_model_or_on_too_small_a_grid():
    model, inputs = unet()
    lf.apply(model, SETTINGS)
    with pytest.raises(ValueError, match="timestep"):
        model.down_blocks[0].attentions[0](torch.randn(1, 16, 8, 8), torch.randn(1, 7, 16))
    forward(model, inputs)
    with pytest.raises(ValueError, match=r"before the layer's norm"):
        model.down_blocks[0].attentions[0].transformer_blocks[0].attn1(torch.randn(1, 64, 16))
    with pytest.raises(ValueError, match=r"no 4 x 4 cell"):
        forward(model, HOSTS["unet-sd15"].inputs(2, 20) | {"timestep": EARLY})


def test_layers_with_text_are_left_as_they_are():
    """SD3.5's second attention is of the picture alone."""
    model, inputs = HOSTS["sd3.5"].build(), HOSTS["sd3.5"].inputs(6, 9) | {"timestep": torch.tensor([EARLY, EARLY])}
    stock = forward(model, inputs)
    lf.apply(model, lf.AgentSD(cell=2))
    changed = forward(model, inputs)
    assert gap(changed, stock) > 1e-2
    for line in lf.describe(model).layers:
        assert (line.mechanism is not None) == line.layer.endswith(".attn2")
        assert line.mechanism or "gives the text in this layer's sequence no queries" in line.reason
    alone = HOSTS["sd3.5"].build()
    assert torch.equal(forward(lf.apply(alone, lf.AgentSD(cell=2), layers="*.attn2"), inputs), changed)
    with pytest.raises(NotImplementedError, match=r"blocks\.0\.attn: AgentSD reaches keys only"):
        lf.apply(alone, lf.AgentSD(cell=2), layers="*.attn")


def test_hosts_with_text_in_every_sequence_refuse_it():
    model = HOSTS["flux"].build()
    with pytest.raises(NotImplementedError, match=r"text in this layer's sequence"):
        lf.apply(model, SETTINGS)
    assert lf.describe(model).replaced == 0


@pytest.mark.parametrize(
    "settings", [{"early": 1.1}, {"merge": -0.1}, {"agent_merge": "x"}, {"cell": 1}, {"late_cell": 2.0}], ids=str
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        lf.AgentSD(**settings)


def test_the_work_is_what_is_done(monkeypatch):
    model, inputs = unet()
    lf.apply(model, SETTINGS)
    counted, real = [], F.scaled_dot_product_attention

    def count(q, k, v, **settings):
        if k.shape[2] != 7:  # cross-attention
            counted.append(q.shape[2] * k.shape[2])
        return real(q, k, v, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    pairs = {}
    for early, time in ((True, EARLY), (False, LATE)):
        counted.clear()
        forward(model, inputs | {"timestep": time})
        pairs[early] = sum(counted) - 96**2  # the mid block
    (mechanism,) = {m.linfusion.pairs((16, 24), 0) for m in model.modules() if hasattr(m, "linfusion")}
    assert 3 * mechanism == pytest.approx(0.4 * pairs[True] + 0.6 * pairs[False])
