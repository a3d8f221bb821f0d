"""`torch.compile` of a whole host, and of its repeated blocks, with every mechanism."""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel

import linfusion as lf

from .models import HOSTS, TINY, flux, forward, gap, lively, make_unet, pixart
from .test_compat import CONFIGS, apply, loss_gradients


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, inputs, **settings):
    with torch.no_grad():
        return torch.compile(model, fullgraph=True, backend="aot_eager", **settings)(**inputs, return_dict=False)[0]


def compiled_hosts() -> dict:
    """Hosts as small as the compiler's time asks for, with a layer of its kind for every mechanism."""
    unet = {"block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",), "mid_block_type": None}
    unet |= {"up_block_types": ("CrossAttnUpBlock2D",)}
    unet |= {"transformer_layers_per_block": [2], "reverse_transformer_layers_per_block": [1]}
    deep = {"num_layers": 4}
    return {
        "unet": lambda: make_unet(**unet),
        "pixart": lambda: PixArtTransformer2DModel.from_config(dict(pixart().config) | deep),
        "flux": lambda: FluxTransformer2DModel.from_config(dict(flux().config) | deep | {"num_single_layers": 4}),
    }


def small_flux(single: int = 1) -> FluxTransformer2DModel:
    """One double block, and so many single ones."""
    return FluxTransformer2DModel.from_config(dict(flux().config) | {"num_layers": 1, "num_single_layers": single})


def small_pixart(layers: int = 1) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel.from_config(dict(pixart().config) | {"num_layers": layers})


def one_each(model) -> dict:
    """Rules that hand the mechanisms out in turn, so that one compilation covers all of them."""
    names = [r.layer for r in lf.describe(lf.apply(model, lf.Softmax())).layers if r.mechanism]
    rules = {name: CONFIGS[i % 4] for i, name in enumerate(names)}
    assert len(names) >= 4
    return rules


@pytest.mark.parametrize("name", ["unet", "pixart", "flux"])
def test_whole_models_compile(dynamo, name):
    """Every mechanism without a break in the graph; another shape of equally many tokens gives that shape's answer."""
    model = lively(compiled_hosts()[name]()).eval()
    apply(model, one_each(model))
    dynamic = False if name == "unet" else None  # None is how users compile; the UNet then takes twice as long
    for grid in ((8, 8), (16, 4)):
        inputs = TINY["unet-sd15" if name == "unet" else name].inputs(*grid)
        assert gap(compiled(model, inputs, dynamic=dynamic), forward(model, inputs)) < 1e-5


SIZES = ((8, 8), (6, 9), (4, 8), (6, 8), (16, 4))


@pytest.mark.parametrize(
    ("name", "configs"),
    [("unet", (CONFIGS[3], CONFIGS[6])), ("flux", (CONFIGS[5], CONFIGS[2])), ("wan", (CONFIGS[1], CONFIGS[4]))],
    ids=["unet", "flux", "wan"],
)
def test_at_most_one_graph_for_a_size(dynamo, name, configs):
    """As users compile, with lengths that become symbols at the second size; what was compiled once is found again."""
    model = {"unet": two_layer_unet, "flux": small_flux, "wan": HOSTS["wan"].build}[name]()
    layers = [r.layer for r in lf.describe(model).layers if r.reason == "not chosen"]
    model = apply(lively(model).eval(), dict(zip(layers, configs, strict=True)))
    graphs, sizes = [], SIZES if name == "flux" else SIZES[:3]  # a graph takes seconds

    def backend(graph, _):
        # what reads the layout in front of the model is a graph of its own, of a few numbers
        graphs.extend([graph] if any("linear" in str(node.target) for node in graph.graph.nodes) else [])
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(2):
        for grid in sizes:
            forward(compiled, HOSTS["unet-sd15" if name == "unet" else name].inputs(*grid))
    assert 0 < len(graphs) <= len(sizes)


def test_flux_compiles_where_nothing_needs_the_grid(dynamo):
    tiny = TINY["flux"]
    model, inputs = apply(lively(small_flux()).eval(), lf.LinFusion()), tiny.inputs(6, 9)
    assert gap(compiled(model, inputs), forward(model, inputs)) < 1e-5
    ids = torch.cat((inputs["img_ids"][:27], inputs["img_ids"][:27] + torch.tensor([1.0, 0.0, 0.0])))
    with pytest.raises(RuntimeError, match=r"Reference pictures.*compile_repeated_blocks"):
        compiled(model, inputs | {"img_ids": ids})


@pytest.mark.parametrize("name", ["unet", "pixart", "flux"])
def test_local_branches_agents_and_blocks_compile(dynamo, name):
    """As above, for mechanisms whose shapes depend on the grid; in FLUX it is a tensor while the graph is traced."""
    model = {"unet": compiled_hosts()["unet"], "pixart": lambda: small_pixart(3), "flux": lambda: small_flux(2)}[name]()
    first, second, *others = (r.layer for r in lf.describe(model).layers if r.reason == "not chosen")
    sla, lit, agent = CONFIGS[4:]
    rules = {
        "unet": dict.fromkeys((first, second), agent) | dict.fromkeys(others[:1], sla) | {"*": lit},
        "pixart": {first: sla, second: lf.LiT(heads=1, text="linear"), "*": agent},
        "flux": {first: lf.LiT(heads=1, text="linear"), second: agent, "*": sla},
    }[name]
    model = apply(lively(model).eval(), rules)
    dynamic = False if name == "unet" else None
    for grid in ((8, 8), (16, 4)):
        inputs = TINY["unet-sd15" if name == "unet" else name].inputs(*grid)
        assert gap(compiled(model, inputs, dynamic=dynamic), forward(model, inputs)) < 1e-5


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("unet", lf.CLEAR(2, pool=2)),
        ("unet", {"down*.0.attn1": CONFIGS[4], "down*": CONFIGS[5], "*": CONFIGS[6]}),
        ("flux", lf.CLEAR(2, pool=2)),
        ("flux", lf.LinFusion(mid_dim=4)),
        ("flux", {"single*": CONFIGS[4], "*": CONFIGS[6]}),
    ],
    ids=["unet-window", "unet-others", "flux-window", "flux-linear", "flux-others"],
)
def test_repeated_blocks_compile(dynamo, name, config):
    """The hook then runs outside of the graphs, and the grid reaches them as plain numbers."""
    host = compiled_hosts()["unet"]() if name == "unet" else small_flux()
    model = apply(lively(host).eval(), config)
    plain = copy.deepcopy(model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for grid in ((8, 8), (16, 4)):
        inputs = TINY["unet-sd15" if name == "unet" else name].inputs(*grid)
        assert gap(forward(model, inputs), forward(plain, inputs)) < 1e-5


def two_layer_unet():
    return make_unet(
        block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None,
        up_block_types=("UpBlock2D",), transformer_layers_per_block=[2],
    )  # fmt: skip


def one_layer_unet():
    return make_unet(
        block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None,
        up_block_types=("UpBlock2D",),
    )  # fmt: skip


def wide(inputs, step):
    """In float64, where rounding does not swap what is merged; at one of a schedule's steps."""
    inputs = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    return inputs | {"timestep": torch.tensor([step, step])}


@pytest.mark.parametrize(("host", "how"), [("unet-sd15", "whole"), ("unet-sd15", "blocks"), ("pixart", "whole")])
def test_agent_sd_compiles(dynamo, host, how):
    """One graph for early and late steps: it reads the noise level and draws its targets when it runs."""
    make = small_pixart if host == "pixart" else one_layer_unet
    plain = lf.apply(lively(make()).eval().double(), lf.AgentSD(cell=2))
    model = copy.deepcopy(plain)
    never = lf.apply(copy.deepcopy(plain), lf.AgentSD(cell=2, early=0.0))
    if how == "whole":
        model = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for grid in ((8, 8), (16, 4)) if host == "unet-sd15" else ((8, 8),):
        inputs = TINY[host].inputs(*grid)
        for step in (650, 651, 550):
            with torch._dynamo.config.patch(error_on_recompile=step != 650):
                got, want = (forward(m, wide(inputs, step)) for m in (model, plain))
            assert gap(got, want) < 1e-9
            assert (gap(got, forward(never, wide(inputs, step))) > 1e-3) == (step != 550)


def test_agent_sd_learns_in_one_graph(dynamo):
    plain = lf.apply(lively(one_layer_unet()).double(), lf.AgentSD(cell=2))
    model = torch.compile(copy.deepcopy(plain), fullgraph=True, backend="aot_eager")
    inputs = TINY["unet-sd15"].inputs(6, 9)
    for step in (650, 550):
        got, want = (loss_gradients(m, wide(inputs, step)) for m in (model, plain))
        for key, grad in want.items():
            torch.testing.assert_close(got[f"_orig_mod.{key}"], grad)


def test_agent_sd_in_one_graph_leaves_equally_many_tokens(dynamo):
    """Late steps have four times as many targets, which stay."""
    model, inputs = (
        lf.apply(one_layer_unet().double(), lf.AgentSD(merge=0.9)),
        wide(TINY["unet-sd15"].inputs(8, 8), 650),
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"equally many tokens.*merge=0.9.*without fullgraph"):
        forward(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    torch._dynamo.reset()
    assert gap(forward(torch.compile(model, backend="eager"), inputs), forward(model, inputs)) < 1e-9


def test_a_compiled_module_is_looked_through(dynamo):
    """`pipe.transformer = torch.compile(...)` wraps the model."""
    tiny = TINY["pixart"]
    model, inputs = tiny.build(), tiny.inputs(6, 9)
    stock = forward(model, inputs)
    pipe = SimpleNamespace(transformer=torch.compile(model, fullgraph=True, backend="eager"))
    lf.apply(pipe, lf.CLEAR(2))
    changed = forward(pipe.transformer, inputs)
    assert gap(changed, stock) > 1e-2
    assert lf.describe(pipe).replaced == tiny.layers
    lf.restore(pipe)
    assert gap(forward(pipe.transformer, inputs), stock) < 1e-5
