"""Apply, replace, choose layers, restore; and every refusal, after which nothing has changed."""

import contextlib
import math
import sys
from fnmatch import fnmatchcase
from types import SimpleNamespace

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

import linfusion as lf

from .models import HOSTS, TINY, forward, gap, make_unet, processors
from .models.wan import wan_pipeline

apply_module = sys.modules["linfusion.apply"]  # `linfusion.apply` itself is the function

CONFIGS = [
    lf.Softmax(), lf.LinFusion(mid_dim=4), lf.CLEAR(3), lf.CLEAR(2, pool=2), lf.SLA(topk=0.4, block_q=16, block_k=16),
    lf.LiT(), lf.Agent(6),
]  # fmt: skip
CELLS = [(host, config) for host in TINY for config in CONFIGS]
CELLS += [(host, lf.AgentSD(cell=2)) for host in TINY if host != "flux"]  # which has text in every sequence
everywhere = pytest.mark.parametrize(
    ("tiny", "config"), [pytest.param(h, c, id=f"{h}-{c}") for h, c in CELLS], indirect=["tiny"]
)
"""Every mechanism on every host that takes it."""


def test_no_mechanism_is_forgotten():
    assert {c.name for _, c in CELLS} == set(lf.mechanisms())


class State:
    """All that must be as before: output, names, values, processor objects, hooks, children."""

    def __init__(self, model, inputs):
        self.inputs, self.output = inputs, forward(model, inputs)
        self.values = {k: v.clone() for k, v in model.state_dict().items()}
        self.processors = processors(model)
        self.modules = dict(model.named_modules())
        self.attributes = {name: set(vars(m)) for name, m in self.modules.items()}
        self.hooks = self.count(model)

    @staticmethod
    def count(model):
        tables = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks")
        return {name: [len(getattr(m, t)) for t in tables] for name, m in model.named_modules()}

    def check(self, model):
        assert list(model.state_dict()) == list(self.values)
        assert all(torch.equal(v, self.values[k]) for k, v in model.state_dict().items())
        now = processors(model)
        assert now.keys() == self.processors.keys() and all(now[k] is self.processors[k] for k in now)
        modules = dict(model.named_modules())
        assert modules.keys() == self.modules.keys() and all(modules[k] is self.modules[k] for k in modules)
        assert {name: set(vars(m)) for name, m in modules.items()} == self.attributes
        assert self.count(model) == self.hooks
        assert torch.equal(forward(model, self.inputs), self.output)


@pytest.fixture
def before(model, inputs):
    return State(model, inputs)


@everywhere
def test_restore_leaves_no_trace(model, inputs, before, config):
    assert lf.apply(model, config) is model
    forward(model, inputs)
    assert lf.restore(model) is model
    before.check(model)
    lf.restore(model)  # once more does nothing
    before.check(model)


def test_applying_again_replaces(tiny, model, inputs, before):
    lf.apply(model, lf.LinFusion())
    once = forward(lf.apply(tiny.build(), lf.CLEAR(2)), inputs)
    for _ in range(3):
        lf.apply(model, lf.CLEAR(2))
    assert torch.equal(forward(model, inputs), once)
    assert not [k for k in model.state_dict() if "linfusion" in k]  # LinFusion's parameters are gone
    assert {type(m.config) for m in mechanisms(model).values()} == {lf.CLEAR}
    lf.apply(model, lf.CLEAR(2), layers=tiny.some)  # fewer layers: the others are the host's again
    assert 0 < len(mechanisms(model)) < tiny.layers
    lf.restore(model)
    before.check(model)


def mechanisms(model) -> dict:
    return {name: m.linfusion for name, m in model.named_modules() if hasattr(m, "linfusion")}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weights"])
def test_applied_restores_after_an_exception(tmp_path, model, inputs, before, weighted):
    folder = None
    if weighted:
        lf.save(lf.apply(model, lf.CLEAR(2)), folder := tmp_path / "adapter", host=["*to_q.weight"])
        lf.restore(model)
    with pytest.raises(KeyError, match="mine"), lf.applied(model, lf.CLEAR(2), weights=folder) as same:
        assert same is model
        assert gap(forward(model, inputs), before.output) > 1e-2
        raise KeyError("mine")
    before.check(model)


def test_applied_that_cannot_be_applied_keeps_what_was_on(model, inputs):
    lf.apply(model, lf.CLEAR(2))
    before = State(model, inputs)
    with pytest.raises(ValueError, match="matches none"), lf.applied(model, lf.Softmax(), layers="nowhere"):
        raise AssertionError("never gets here")
    before.check(model)


# half way


def break_down(monkeypatch, after):
    """The `after`-th processor that is set raises, once."""
    count = 0
    real = {}

    def failing(self, processor, *args, **kwargs):
        nonlocal count
        if type(processor).__module__.startswith("linfusion"):
            count += 1
            if count == after:
                raise RuntimeError("half way")
        return real[type(self)](self, processor, *args, **kwargs)

    from diffusers.models.attention_processor import Attention
    from diffusers.models.transformers.transformer_flux import FluxAttention

    for cls in (Attention, FluxAttention):
        real[cls] = cls.set_processor
        monkeypatch.setattr(cls, "set_processor", failing)


@pytest.mark.parametrize("after", [1, 2])
def test_failure_half_way_leaves_the_host(monkeypatch, model, before, after):
    break_down(monkeypatch, after)
    with pytest.raises(RuntimeError, match="half way"):
        lf.apply(model, lf.LinFusion())
    before.check(model)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "weights"])
def test_failure_half_way_keeps_the_earlier_mechanism(monkeypatch, tmp_path, tiny, model, inputs, trained):
    """The earlier one is still on: the same modules, trained values and host weights."""
    stock = State(model, inputs)
    lf.apply(model, lf.LinFusion(mid_dim=4))
    if trained:
        scramble(model, "*to_q.weight")
        lf.save(model, tmp_path / "a", host=["*to_q.weight"])
        unscramble(model, stock)
        lf.apply(model, lf.LinFusion(mid_dim=4), weights=tmp_path / "a")
    before = State(model, inputs)
    for config in (lf.CLEAR(2), lf.LinFusion()):
        with monkeypatch.context() as patch:
            break_down(patch, 2)
            with pytest.raises(RuntimeError, match="half way"):
                lf.apply(model, config)
        before.check(model)
    lf.restore(model)
    stock.check(model)


def scramble(model, pattern):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".linfusion." in name or name.endswith(pattern.removeprefix("*")):
                p.add_(0.1 * torch.randn_like(p))


def unscramble(model, stock):
    lf.restore(model)
    model.load_state_dict(stock.values)


def test_weights_that_fail_while_loading_leave_the_host(monkeypatch, tmp_path, model, inputs, before):
    lf.apply(model, lf.LinFusion(mid_dim=4))
    scramble(model, "*to_q.weight")
    lf.save(model, tmp_path / "a", host=["*to_q.weight"])
    unscramble(model, before)

    real = apply_module.swap_host

    def broken(model, values):
        if values:
            raise OSError("no more memory")
        return real(model, values)

    monkeypatch.setattr(apply_module, "swap_host", broken)
    with pytest.raises(OSError, match="no more memory"):
        lf.load(model, tmp_path / "a")
    before.check(model)


def test_a_pipeline_of_two_models_changes_both_or_none(monkeypatch):
    pair = SimpleNamespace(unet=TINY["unet-sd15"].build(), transformer=TINY["pixart"].build())
    inputs = (TINY["unet-sd15"].inputs(6, 9), TINY["pixart"].inputs(6, 9))
    before = [State(m, i) for m, i in zip((pair.unet, pair.transformer), inputs, strict=True)]
    lf.apply(pair, lf.CLEAR(2))
    assert mechanisms(pair.unet) and mechanisms(pair.transformer)
    lf.restore(pair)
    break_down(monkeypatch, TINY["unet-sd15"].layers + 1)  # the second model's first layer
    with pytest.raises(RuntimeError, match="half way"):
        lf.apply(pair, lf.CLEAR(2))
    for state, model in zip(before, (pair.unet, pair.transformer), strict=True):
        state.check(model)


# diffusers' own call


@everywhere
def test_the_native_call_is_apply(tiny, model, inputs, before, config):
    other = tiny.build()
    torch.manual_seed(3)
    lf.apply(other, config)
    torch.manual_seed(3)
    model.set_attn_processor(lf.attn_processors(model, config))
    assert torch.equal(forward(model, inputs), forward(other, inputs))
    if isinstance(config, lf.AgentSD):  # takes the finest layers only
        assert lf.describe(model).replaced == lf.describe(other).replaced > 0
    else:
        assert lf.describe(model).replaced == tiny.layers
    lf.restore(model)
    before.check(model)


def test_restore_after_the_native_call_was_undone_natively(model, inputs, before):
    original = dict(model.attn_processors)
    model.set_attn_processor(lf.attn_processors(model, lf.LinFusion()))
    model.set_attn_processor(dict(original))
    assert torch.equal(forward(model, inputs), before.output)
    assert lf.describe(model).replaced == 0
    lf.restore(model)
    before.check(model)


def test_restore_after_default_processors_were_set():
    tiny = TINY["unet-sd15"]
    model, inputs = tiny.build(), tiny.inputs(6, 9)
    before = State(model, inputs)
    model.set_attn_processor(lf.attn_processors(model, lf.LinFusion()))
    with contextlib.suppress(ValueError):  # diffusers refuses processors that are not its own
        model.set_default_attn_processor()
    lf.restore(model)
    before.check(model)


def test_attn_processors_on_some_layers(tiny, model, inputs, before):
    chosen = lf.attn_processors(model, lf.CLEAR(2), layers=tiny.some)
    assert chosen.keys() == model.attn_processors.keys()
    model.set_attn_processor(chosen)
    want = forward(lf.apply(tiny.build(), lf.CLEAR(2), layers=tiny.some), inputs)
    assert torch.equal(forward(model, inputs), want)
    lf.restore(model)
    before.check(model)


def test_attn_processors_wants_a_model():
    with pytest.raises(ValueError, match=r"set_attn_processor; use linfusion\.apply"):
        lf.attn_processors(TINY["unet-sd15"].build_pipeline(), lf.CLEAR(2))


@pytest.mark.parametrize("kind", [AttnProcessor, "sliced"])
def test_other_processors_of_the_host_come_back_too(kind):
    """A user's own choice among the host's processors is what restore gives back."""
    tiny = TINY["unet-sd15"]
    model, inputs = tiny.build(), tiny.inputs(6, 9)
    model.set_attention_slice("max") if kind == "sliced" else model.set_attn_processor(kind())
    before = State(model, inputs)
    lf.apply(model, lf.Softmax())
    assert gap(forward(model, inputs), before.output) < 1e-3  # not bit for bit: the host's slow paths round otherwise
    lf.restore(model)
    before.check(model)


# which layers


def test_layers_by_pattern_list_and_predicate(tiny, model):
    def chosen(layers):
        return list(mechanisms(lf.apply(model, lf.CLEAR(2), layers=layers)))

    everything = chosen(None)
    assert len(everything) == tiny.layers
    some = chosen(tiny.some)
    assert 0 < len(some) < tiny.layers
    assert chosen([tiny.some]) == chosen((some[0], tiny.some)) == some
    assert chosen(lambda name: name in some) == some
    assert chosen("*") == everything
    assert chosen(everything[0]) == everything[:1]


def test_different_layers_different_mechanisms(tiny, model, inputs):
    """The first matching pattern wins; layers without one stay the host's."""
    rules = {tiny.some: lf.CLEAR(2), "*": lf.Softmax()}
    lf.apply(model, rules)
    configs = {name: type(m.config) for name, m in mechanisms(model).items()}
    assert len(configs) == tiny.layers and set(configs.values()) == {lf.CLEAR, lf.Softmax}
    want = forward(lf.apply(tiny.build(), lf.CLEAR(2), layers=tiny.some), inputs)
    assert torch.equal(forward(model, inputs), want)
    lf.apply(model, rules, layers=tiny.some)  # "*" is for what is left, if anything
    assert {type(m.config) for m in mechanisms(model).values()} == {lf.CLEAR}


def test_a_pipeline_of_two_models_by_the_names_that_describe_prints(tmp_path):
    wan = HOSTS["wan"]
    pipe = wan_pipeline(wan.build(), wan.build())
    both = ["transformer", "transformer_2"]

    def chosen(**settings):
        return [r.layer for r in lf.describe(lf.apply(pipe, lf.CLEAR(2), **settings)).layers if r.mechanism]

    names = chosen()
    assert names == [f"{part}.blocks.{i}.attn1" for part in both for i in range(2)]
    assert chosen(layers=names[2]) == chosen(layers=lambda name: name == names[2]) == names[2:3]
    assert not mechanisms(pipe.transformer) and lf.describe(pipe.transformer).replaced == 0
    assert chosen(layers=["transformer_2.*", "blocks.0.*"]) == [names[i] for i in (0, 2, 3)]
    assert chosen(layers=lambda name: not name.startswith("blocks.0")) == [names[i] for i in (1, 3)]
    lf.apply(pipe, {"transformer_2.*": lf.SLA(topk=0.5), "blocks.1.*": lf.CLEAR(2)})
    assert [r.mechanism and r.mechanism[:3] for r in lf.describe(pipe).layers if "attn1" in r.layer] == [
        None, "CLE", "SLA", "SLA"
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"'transformer_3.*' matches none of the 4 layers \(transformer\.blocks\.0"):
        lf.apply(pipe, lf.CLEAR(2), layers="transformer_3.*")
    lf.restore(pipe)
    assert not mechanisms(pipe.transformer) and not mechanisms(pipe.transformer_2)
    lf.save(lf.apply(pipe.transformer, lf.CLEAR(2)), tmp_path / "a")
    with pytest.raises(ValueError, match=r"saved for one Wan.*, and here are 2.*pipe\.transformer"):
        lf.load(pipe, tmp_path / "a")


# refusals


def refused(model, before, error, match, *args, **kwargs):
    """One clear line, and nothing changed, on a fresh host and on one that has a mechanism already."""
    with pytest.raises(error, match=match) as caught:
        lf.apply(model, *args, **kwargs)
    assert "\n" not in str(caught.value)
    before.check(model)
    lf.apply(model, lf.CLEAR(2))
    after = State(model, before.inputs)
    with pytest.raises(error, match=match):
        lf.apply(model, *args, **kwargs)
    after.check(model)
    lf.restore(model)
    before.check(model)


@pytest.mark.parametrize(
    "layers",
    ["nowhere.*", ["*", "nowhere"], lambda name: False, []],
    ids=["pattern", "one-of-two", "predicate", "empty"],
)
def test_layers_that_match_nothing(model, before, layers):
    refused(model, before, ValueError, r"matches none of|No layer was chosen", lf.CLEAR(2), layers=layers)


def test_rules_that_match_nothing(model, before):
    refused(model, before, ValueError, r"'nowhere' matches none of the \d+ layers \(.*attn", {"nowhere": lf.CLEAR(2)})
    refused(model, before, ValueError, "No layer was chosen", {})


def test_rules_that_never_apply(tiny, model, before):
    rules = {"*": lf.Softmax(), tiny.some: lf.CLEAR(2)}
    refused(model, before, ValueError, r"would have no effect: earlier ones take all its layers, put it before", rules)
    others = [r.layer for r in lf.describe(model).layers if not fnmatchcase(r.layer, tiny.some)]
    rules = {tiny.some: lf.CLEAR(2), "*": lf.Softmax()}
    refused(model, before, ValueError, "would have no effect: layers= leaves it no layer", rules, layers=others[:1])


def test_a_model_without_self_attention():
    model = make_unet(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None)
    with pytest.raises(ValueError, match="UNet2DConditionModel has no self-attention that could be replaced"):
        lf.apply(model, lf.CLEAR(2))


@pytest.mark.parametrize("config", [lf.CLEAR, "clear", None, 3, {"*": "clear"}, {"*": lf.LinFusion}], ids=repr)
def test_what_is_no_config(model, before, config):
    refused(model, before, ValueError, r"must be a config such as linfusion\.CLEAR", config)


@pytest.mark.parametrize("radius", [(2, 3, 4), (2, 3, 4, 5)], ids=repr)
def test_radii_for_other_grids(model, before, radius):
    with pytest.raises(ValueError, match=r"attn.*3 axes, the grid has 2|one number, or one per axis"):
        lf.apply(model, lf.CLEAR(radius))
    before.check(model)


@pytest.mark.parametrize(
    "make",
    [
        *(lambda r=r: lf.CLEAR(r) for r in (0, -1, math.nan, math.inf, True, "8", None, (), (1, -1), (1, 2, 3, 4))),
        *(lambda p=p: lf.CLEAR(2, pool=p) for p in (0, -1, 1.5, True, None)),
        *(lambda n=n: lf.LiT(kernel_size=n) for n in (0, 2, 2.5, True)),
        lambda: lf.LiT(normalize="none"),
        *(lambda n=n: lf.Agent(n) for n in (0, 2.5, True, (), (2, 0))),
        *(lambda m=m: lf.LinFusion(mid_dim=m) for m in (0, -1, 2.5, True, "8")),
        *(lambda e=e: lf.LinFusion(eps=e) for e in (-1, math.nan, "x", None)),
    ],
)
def test_settings_out_of_range(make):
    with pytest.raises(ValueError, match=r"(radius|pool|kernel_size|agents|mid_dim|eps|normalize) must be .*, got "):
        make()


def test_unsupported_models():
    supported = ", ".join(lf.families())
    for thing in (nn.Linear(2, 2), SimpleNamespace(unet=nn.Linear(2, 2))):
        with pytest.raises(ValueError, match=rf"^Linear is not supported\. Supported: {supported}\.$"):
            lf.apply(thing, lf.CLEAR(2))
    for thing in (SimpleNamespace(vae=nn.Linear(2, 2)), object(), None):
        with pytest.raises(ValueError, match=r"has no unet, transformer: pass a diffusers pipeline or model"):
            lf.apply(thing, lf.CLEAR(2))
        with pytest.raises(ValueError, match="has no unet"):
            lf.restore(thing)


def test_sana_is_refused_with_its_reason():
    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, caption_channels=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, sample_size=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"SanaTransformer2DModel.*already linear"):
        lf.apply(model, lf.CLEAR(2))


def test_a_subclass_of_a_supported_model():
    """Families are found along the MRO: users subclass hosts."""
    tiny = TINY["pixart"]
    model = tiny.build()
    model.__class__ = type("MyPixArt", (type(model),), {})
    inputs = tiny.inputs(6, 9)
    before = State(model, inputs)
    lf.apply(model, lf.Softmax())
    assert torch.equal(forward(model, inputs), before.output)
    lf.restore(model)
    before.check(model)


class PAGIdentitySelfAttnProcessor2_0(AttnProcessor2_0):
    """Stands for any plugin's processor."""


@pytest.mark.parametrize("name", ["unet-sd15", "pixart"])
def test_foreign_processors_are_refused(name):
    tiny = TINY[name]
    model = tiny.build()
    layer = next(n for n in processors(model) if n.endswith("attn1"))
    model.get_submodule(layer).set_processor(PAGIdentitySelfAttnProcessor2_0())
    before = State(model, tiny.inputs(6, 9))
    with pytest.raises(NotImplementedError, match=rf"{layer} has a PAGIdentity.*default processors"):
        lf.apply(model, lf.CLEAR(2))
    before.check(model)
    others = [n for n in processors(model) if n.endswith("attn1") and n != layer]
    lf.apply(model, lf.CLEAR(2), layers=others)  # the plugin's layer is left alone
    report = {r.layer: r for r in lf.describe(model).layers}
    assert report[layer].mechanism is None and "PAGIdentity" in report[layer].reason
    assert all(report[n].mechanism for n in others)
    lf.restore(model)
    before.check(model)


def test_context_parallelism_is_refused(model, before):
    model._parallel_config = SimpleNamespace(context_parallel_config=object())
    with pytest.raises(NotImplementedError, match="Context parallelism"):
        lf.apply(model, lf.CLEAR(2))
    del model._parallel_config
    before.check(model)
    lf.apply(model, lf.CLEAR(2))
    for processor in processors(model).values():  # switched on afterwards: diffusers writes it there
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = SimpleNamespace(context_parallel_config=object())
    with pytest.raises(NotImplementedError, match="context parallelism"):
        forward(model, before.inputs)
    lf.restore(model)
    for processor in processors(model).values():
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = None
    before.check(model)


@pytest.mark.parametrize("name", ["unet-sd15", "flux"])
def test_fused_while_on_and_split_after_restore(name):
    """diffusers keeps the processors it found to set them again: ours must not come back that way."""
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(6, 9)
    stock = forward(model, inputs)
    lf.apply(model, lf.CLEAR(2))
    model.fuse_qkv_projections()
    lf.restore(model)
    model.unfuse_qkv_projections()
    assert gap(forward(model, inputs), stock) < 1e-6
    assert gap(forward(lf.apply(model, lf.CLEAR(2)), inputs), stock) > 1e-2
    lf.restore(model)
    assert not any(type(p).__module__.startswith("linfusion") for p in processors(model).values())


@pytest.mark.parametrize("layers", [3, [3], {"*": 1}.items()], ids=str)
def test_layers_that_are_no_patterns(model, layers):
    with pytest.raises(ValueError, match="layers must be a pattern"):
        lf.apply(model, lf.CLEAR(2), layers=layers)
