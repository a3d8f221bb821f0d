"""What people do with a host while a mechanism is on: LoRA, offload, training, copies, files, backends."""

import copy
import functools
import gc
import io
import pickle
import threading

import accelerate
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch import nn

import linfusion as lf
from linfusion.call import AttnCall, sdpa
from linfusion.kernels import sparse_linear_torch
from linfusion.mechanisms import agent_sd

from .models import TEXT, TINY, Quantised, cast, forward, gap, noise, processors

CONFIGS = [
    lf.Softmax(), lf.LinFusion(mid_dim=4), lf.CLEAR(3), lf.CLEAR(2, pool=2),
    lf.SLA(topk=0.4, block_q=16, block_k=16, linear="complement"), lf.LiT(heads=1), lf.Agent(6),
]  # fmt: skip
CELLS = [(host, config) for host in TINY for config in CONFIGS]
CELLS += [(host, lf.AgentSD(cell=2)) for host in TINY if host != "flux"]  # which has text in every sequence
everywhere = pytest.mark.parametrize(
    ("tiny", "config"), [pytest.param(h, c, id=f"{h}-{c}") for h, c in CELLS], indirect=["tiny"]
)
"""Every mechanism on every host that takes it."""


def test_no_mechanism_is_forgotten():
    assert {c.name for _, c in CELLS} == set(lf.mechanisms())


def apply(model, config):
    """With made-up trained values: a fresh branch has no effect that could get lost."""
    lf.apply(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".linfusion." in name:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def mechanisms(model) -> dict:
    return {name: m.linfusion for name, m in model.named_modules() if hasattr(m, "linfusion")}


# LoRA


def add_lora(model) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj"]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("order", ["lora-first", "lora-second"])
def test_lora_acts_on_replaced_layers(tiny, model, inputs, order):
    from peft.tuners.tuners_utils import BaseTunerLayer

    add_lora(model)
    stock, names = forward(model, inputs), list(model.state_dict())
    assert gap(stock, forward(tiny.build(), inputs)) > 1e-2
    other = tiny.build()
    for config in [c for host, c in CELLS if TINY[host] is tiny and c != lf.CLEAR(3)]:
        torch.manual_seed(0)
        without = forward(apply(tiny.build(), config), inputs)
        if order == "lora-first":
            out = forward(apply(model, config), inputs)
        else:
            other = apply(tiny.build(), config)
            add_lora(other)
            assert not [n for n, _ in other.named_parameters() if "linfusion" in n and "lora" in n]
            out = forward(other, inputs)
        if isinstance(config, lf.Softmax):
            assert torch.equal(out, stock)
        assert gap(out, without) > 1e-2
    lf.restore(model), lf.restore(other)
    assert torch.equal(forward(model, inputs), stock)
    if order == "lora-second":
        assert torch.equal(forward(other, inputs), stock)
        assert list(other.state_dict()) == names
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    assert torch.equal(forward(model, inputs), forward(tiny.build(), inputs))


# offload


@everywhere
def test_layers_offloaded_after_apply(model, inputs, config):
    """accelerate's `cpu_offload` is what enable_sequential_cpu_offload runs; the CPU stands in for the accelerator."""
    want = forward(apply(model, config), inputs)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    for _ in range(2):
        assert torch.equal(forward(model, inputs), want)


def test_a_model_that_is_offloaded_already(model, inputs):
    stock = forward(model, inputs)
    accelerate.cpu_offload(model, execution_device="cpu")
    lf.apply(model, lf.Softmax())  # no parameters: nothing that the hooks would miss
    assert torch.equal(forward(model, inputs), stock)
    on = processors(model)
    for change in (lf.apply, lf.attn_processors):
        with pytest.raises(ValueError, match=r"offloaded layer by layer.*before the model is offloaded"):
            change(model, lf.LinFusion())
        assert processors(model) == on and len(mechanisms(model)) > 0
    lf.restore(model)
    assert torch.equal(forward(model, inputs), stock)


def test_host_weights_and_an_offloaded_model(tmp_path, model, inputs):
    """Values that live elsewhere cannot be put back: restore says so and leaves all as it is."""
    lf.save(apply(model, lf.CLEAR(2)), tmp_path / "a", host=["*to_q.weight"])
    want = forward(lf.load(model, tmp_path / "a"), inputs)
    accelerate.cpu_offload(model, execution_device="cpu")
    for change in (lambda: lf.restore(model), lambda: lf.apply(model, lf.Softmax())):
        with pytest.raises(ValueError, match="offloaded layer by layer"):
            change()
        assert torch.equal(forward(model, inputs), want)
    with pytest.raises(NotImplementedError, match="offloaded layer by layer"):
        lf.save(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_pipeline_offloaded_layer_by_layer(tmp_path, monkeypatch, tiny):
    """Through the pipeline everything works, since the offload is lifted for the moment of the change."""
    real = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda m, *a, **k: real(m, execution_device="cpu", **k))
    pipe = tiny.build_pipeline()
    stock = tiny.draw(pipe, 5.0)
    model = lf.describe(pipe) and (getattr(pipe, "unet", None) or pipe.transformer)
    want = tiny.draw(lf.apply(pipe, lf.CLEAR(2, pool=2)), 5.0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("to_v.weight"):
                p.mul_(0.5)
    lf.save(pipe, tmp_path / "a", host=["*to_v.weight"])
    trained = tiny.draw(pipe, 5.0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("to_v.weight"):
                p.mul_(2)
    lf.restore(pipe)
    pipe.enable_sequential_cpu_offload(device="cpu")
    for change, expected in (
        (lambda: lf.apply(pipe, lf.CLEAR(2, pool=2)), want),
        (lambda: lf.load(pipe, tmp_path / "a"), trained),
        (lambda: lf.apply(pipe, lf.Softmax()), stock),
        (lambda: lf.load(pipe, tmp_path / "a"), trained),
        (lambda: lf.restore(pipe), stock),
    ):
        change()
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert torch.equal(tiny.draw(pipe, 5.0), expected)


@everywhere
def test_model_offload(tiny, config):
    """Whole models move, mechanisms with them, and hooks of the host's own kind come and go with every call."""
    pipe = tiny.build_pipeline()
    apply(getattr(pipe, "unet", None) or pipe.transformer, config)
    want = tiny.draw(pipe, 5.0)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(tiny.draw(pipe, 5.0), want)


needs_accelerator = pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="needs an accelerator: there is nothing to offload from"
)


@needs_accelerator
@pytest.mark.parametrize("enable", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("order", ["apply-first", "offload-first"])
def test_offload_from_an_accelerator(tiny, enable, order):
    pipe, config = tiny.build_pipeline(), lf.CLEAR(2, pool=2)
    # that device computes other digits than the CPU: convolutions in TF32, for one
    want = tiny.draw(lf.apply(pipe.to(torch.accelerator.current_accelerator()), config), 5.0)
    lf.restore(pipe).to("cpu")
    for step in (lambda: lf.apply(pipe, config), lambda: getattr(pipe, enable)())[
        :: 1 if order == "apply-first" else -1
    ]:
        step()
    for _ in range(2):
        assert gap(tiny.draw(pipe, 5.0), want) < 1e-4


# training


def loss_gradients(model, inputs):
    model.zero_grad()
    model(**inputs, return_dict=False)[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@everywhere
def test_gradient_checkpointing(model, inputs, config):
    apply(model, config).train()
    want = loss_gradients(model, inputs)
    model.enable_gradient_checkpointing()
    got = loss_gradients(model, inputs)
    assert got.keys() == want.keys()
    assert any(".linfusion." in name for name in want) == bool(
        list(next(iter(mechanisms(model).values())).parameters())
    )
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-6, rtol=1e-4)


LEARNERS = [lf.LinFusion(), lf.LinFusion(mid_dim=4, text="linear"), lf.CLEAR(2, pool=2), lf.LiT(), lf.Agent(6)]
LEARNERS += [lf.SLA(topk=0.4, block_q=16, block_k=16)]  # "complement" of the only block of a tiny grid is nothing


@pytest.mark.parametrize("config", LEARNERS, ids=repr)
def test_every_trainable_parameter_learns(model, inputs, config):
    """From the fresh state; what stands behind a zero-initialised layer from the second step on."""
    lf.apply(model.requires_grad_(False), config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".linfusion." in name for name in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=1e-2)
    loss_gradients(model, inputs)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    optimizer.step()
    loss_gradients(model, inputs)
    still = [name for name, p in trained.items() if not p.grad.abs().max() > 0]
    assert not still


def test_training_mode_follows_the_layer(model):
    assert not any(m.training for m in mechanisms(lf.apply(model.eval(), lf.LinFusion())).values())
    assert all(m.training for m in mechanisms(lf.apply(model.train(), lf.LinFusion())).values())
    model.eval()
    assert not any(m.training for m in mechanisms(model).values())


# copies, files, threads


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@everywhere
def test_copies_stand_alone(model, inputs, config, how):
    stock = forward(model, inputs)
    changed = forward(apply(model, config), inputs)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(forward(twin, inputs), changed)
    assert lf.describe(twin).replaced == lf.describe(model).replaced > 0
    lf.restore(model)
    assert torch.equal(forward(model, inputs), stock)
    assert torch.equal(forward(twin, inputs), changed)  # the original's restore did not touch it
    lf.restore(twin)
    assert torch.equal(forward(twin, inputs), stock)
    assert not mechanisms(twin) and list(twin.state_dict()) == list(model.state_dict())


def test_a_copy_reads_its_own_grid(tiny, model):
    """Hooks keep their state on the module, not in a closure over the original."""
    lf.apply(model, lf.CLEAR(2))
    twin = copy.deepcopy(model)
    forward(model, tiny.inputs(6, 9))
    assert {r.grid for r in lf.describe(twin).layers} == {None}
    want = forward(lf.apply(tiny.build(), lf.CLEAR(2)), tiny.inputs(9, 6))
    assert torch.equal(forward(twin, tiny.inputs(9, 6)), want)


@everywhere
def test_save_pretrained_of_a_changed_model(tmp_path, tiny, model, inputs, config):
    """The folder opens as the plain host; its own weights are all there."""
    stock = forward(model, inputs)
    apply(model, config).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert not mechanisms(again)
    assert torch.equal(forward(again, inputs), stock)


def test_two_models_in_two_threads(tiny):
    """Sizes differ, so a layout shared by mistake would show."""
    grids = [(6, 9), (9, 6)]
    models = [lf.apply(tiny.build(), lf.CLEAR(2)) for _ in grids]
    want = [forward(m, tiny.inputs(*g)) for m, g in zip(models, grids, strict=True)]
    wrong = []

    def work(i):
        for _ in range(5):
            if not torch.equal(forward(models[i], tiny.inputs(*grids[i])), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("config", [c for host, c in CELLS if host == "unet-sd15"], ids=str)
def test_from_pipe_shares_the_changed_model(config):
    tiny = TINY["unet-sd15"]
    pipe = tiny.build_pipeline()
    stock = tiny.draw(pipe, 5.0)
    changed = tiny.draw(lf.apply(pipe, config), 5.0)
    assert torch.equal(changed, stock) == isinstance(config, lf.Softmax)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet and lf.describe(other).replaced == lf.describe(pipe).replaced > 0
    assert torch.equal(tiny.draw(type(pipe).from_pipe(other), 5.0), changed)
    lf.restore(other)
    assert torch.equal(tiny.draw(pipe, 5.0), stock)


def test_nothing_keeps_a_model_alive(tiny):
    import weakref

    model = lf.apply(tiny.build(), lf.CLEAR(2))
    forward(model, tiny.inputs(6, 9))
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None


# attention backends


@pytest.fixture
def backends():
    """diffusers remembers the last backend set anywhere, also after a reset."""
    from diffusers.models import attention_dispatch

    registry = attention_dispatch._AttentionBackendRegistry
    active = registry._active_backend
    yield
    registry._active_backend = active


def dispatched(monkeypatch):
    """The backends that diffusers' dispatcher was asked for by our processors."""
    from linfusion.families import base

    asked, real = [], base.dispatch_attention_fn
    monkeypatch.setattr(
        base,
        "dispatch_attention_fn",
        lambda *a, backend=None, **k: asked.append(backend) or real(*a, backend=backend, **k),
    )
    return asked


@pytest.mark.parametrize("order", ["before", "after"])
def test_softmax_honours_the_attention_backend(monkeypatch, backends, order):
    tiny = TINY["flux"]
    model, inputs = tiny.build(), tiny.inputs(6, 9)
    other = tiny.build()
    other.set_attention_backend("_native_math")
    stock = forward(other, inputs)
    asked = dispatched(monkeypatch)
    for step in (lambda: model.set_attention_backend("_native_math"), lambda: lf.apply(model, lf.Softmax()))[
        :: 1 if order == "before" else -1
    ]:
        step()
    assert torch.equal(forward(model, inputs), stock)
    assert {str(getattr(b, "value", b)) for b in asked} == {"_native_math"} and len(asked) == tiny.layers


@pytest.mark.parametrize("config", CONFIGS[1:], ids=repr)
def test_other_mechanisms_refuse_an_attention_backend(backends, config):
    tiny = TINY["flux"]
    model, inputs = tiny.build(), tiny.inputs(6, 9)
    model.set_attention_backend("_native_math")
    with pytest.raises(ValueError, match=r"'_native_math' would have no effect.*reset_attention_backend"):
        lf.apply(model, config)
    assert not mechanisms(model)
    model.reset_attention_backend()
    lf.apply(model, config)
    forward(model, inputs)
    model.set_attention_backend("_native_math")
    with pytest.raises(ValueError, match=r"'_native_math' has no effect.*reset_attention_backend"):
        forward(model, inputs)
    model.reset_attention_backend()
    assert forward(model, inputs).isfinite().all()


@pytest.mark.parametrize("name", ["unet-sd15", "pixart"])
def test_backends_on_hosts_that_ignore_them(backends, name):
    """The processors of UNets and PixArt call PyTorch directly: a backend means nothing to them, so to Softmax."""
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(6, 9)
    stock = forward(model, inputs)
    lf.apply(model, lf.Softmax())
    if hasattr(model, "set_attention_backend"):
        model.set_attention_backend("_native_math")
    assert torch.equal(forward(model, inputs), stock)


# dtypes, quantisation, plugins


half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


class Choices:
    """What blocks are routed by and tokens merged by in a first run is what a second run chooses by.

    Where two blocks score almost the same, the rounding of the host's layers before decides between them.
    """

    def __init__(self, monkeypatch):
        self.kept: list = []
        self.replay = None
        route, slots = sparse_linear_torch.Problem.__init__, agent_sd.merge_slots

        def routed(problem, *args):
            route(problem, *args)
            problem.pooled_q, problem.pooled_k = self.hold(problem.pooled_q, problem.pooled_k)

        monkeypatch.setattr(sparse_linear_torch.Problem, "__init__", routed)
        monkeypatch.setattr(agent_sd, "merge_slots", lambda hidden, **k: slots(*self.hold(hidden), **k))

    def hold(self, *tensors):
        if self.replay is None:
            self.kept.append(tensors)
            return tensors
        return next(self.replay)


def half_error(tiny, change, dtype, choices=None):
    """Of the half-precision model against the same in fp32, in the mean square; cast after `change`."""
    model, inputs = change(tiny.build()), tiny.inputs(6, 9)
    exact = forward(model, inputs)
    if choices is not None:
        choices.replay = iter(choices.kept)
    out = forward(model.to(dtype), cast(inputs, dtype))
    assert out.dtype == dtype and out.isfinite().all()
    assert choices is None or next(choices.replay, None) is None
    return ((out.float() - exact).square().mean() / exact.square().mean()).item()


@functools.cache
def half_bound(tiny, dtype):
    """The tiny hosts amplify rounding on purpose, so the host's own error is the measure."""
    return 3 * half_error(tiny, lambda m: m, dtype) + 1e-3


@half
@everywhere
def test_half_precision(monkeypatch, tiny, config, dtype):
    """Finite, in the host's dtype, and close to the fp32 answer of the same mechanism; cast before or after apply."""
    assert half_error(tiny, lambda m: apply(m, config), dtype, Choices(monkeypatch)) < half_bound(tiny, dtype)
    monkeypatch.undo()
    fresh = lf.apply(tiny.build().to(dtype), config)
    assert {p.dtype for m in mechanisms(fresh).values() for p in m.parameters()} <= {dtype}
    assert forward(fresh, cast(tiny.inputs(6, 9), dtype)).isfinite().all()


def test_rounding_may_choose_another_block(monkeypatch):
    """Why choices are held above: PixArt in bf16 has two blocks of near equal scores, and swaps them."""
    tiny, config = TINY["pixart"], lf.SLA(topk=0.4, block_q=16, block_k=16, linear="complement")
    error, bound = half_error(tiny, lambda m: apply(m, config), torch.bfloat16), half_bound(tiny, torch.bfloat16)
    choices = Choices(monkeypatch)
    held = half_error(tiny, lambda m: apply(m, config), torch.bfloat16, choices)
    assert held < bound < error


@half
@everywhere
def test_half_precision_layer_by_layer(tiny, config, dtype):
    """On what each layer really gets, the mechanism in half loses no more than twice what softmax loses there.

    Against itself in float64; one rounding of the output is granted on top. Blocks are chosen twice, and alike.
    """
    model, lost = apply(tiny.build(), config).to(dtype), []

    def compare(mechanism, args, out):
        call = args[0]

        def plain(kind):
            agents = None if call.agents is None else call.agents.to(kind)
            return AttnCall(
                *(x.to(kind) for x in (*call.rotated(), call.v)), grid=call.grid, text=call.text,
                text_first=call.text_first, text_mask=call.text_mask, scale=call.scale, agents=agents,
            )  # fmt: skip

        def loss(run, exact):
            got, want = run(plain(dtype)).double(), exact(plain(torch.float64))
            return ((got - want).square().mean() / want.square().mean()).sqrt().item()

        def softmax(call):
            return sdpa(call.q, call.k, call.v, scale=call.scale)

        lost.append((loss(mechanism.forward, copy.deepcopy(mechanism).double().forward), loss(softmax, softmax)))

    for mechanism in mechanisms(model).values():
        mechanism.register_forward_hook(compare)
    forward(model, cast(tiny.inputs(6, 9), dtype))
    assert len(lost) == len(mechanisms(model)) > 0
    assert all(mine <= 2 * theirs + torch.finfo(dtype).eps / 2 for mine, theirs in lost), lost


@everywhere
def test_quantised_projections(model, inputs, config):
    torch.manual_seed(0)
    want = forward(apply(copy.deepcopy(model), config), inputs)
    for module in list(model.modules()):
        for child in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            if isinstance(getattr(module, child, None), nn.Linear):
                setattr(module, child, Quantised(getattr(module, child)))
    stock = forward(model, inputs)
    torch.manual_seed(0)
    assert torch.equal(forward(apply(model, config), inputs), want)
    lf.restore(model)
    assert torch.equal(forward(model, inputs), stock)


def sample(inputs, i):
    """The arguments of the i-th sample alone."""
    if isinstance(inputs, dict):
        return {k: sample(v, i) for k, v in inputs.items()}
    return inputs[i : i + 1] if torch.is_tensor(inputs) and inputs.shape[:1] == (2,) else inputs


@everywhere
def test_sizes_in_a_row_and_samples_apart(tiny, config):
    """As guidance batches and pipelines of several sizes need it: each sample, at each size, as in a fresh model."""
    fresh = apply(tiny.build(), config).double()
    model, seen = copy.deepcopy(fresh), []
    for grid in ((8, 8), (16, 4)):
        inputs = cast(tiny.inputs(*grid), torch.float64)
        inputs["timestep"] = inputs["timestep"].flatten()[0].expand(2)  # as pipelines do, at one noise level
        seen.append(forward(model, inputs))
        other = copy.deepcopy(fresh)
        alone = [forward(other, sample(inputs, i)) for i in range(2)]
        assert gap(alone[0], alone[1]) > 1e-2  # samples differ
        assert gap(seen[-1], torch.cat(alone)) < 1e-9


@pytest.mark.parametrize("order", ["cast-first", "apply-first"])
@everywhere
def test_layerwise_casting(tiny, inputs, config, order):
    """diffusers keeps weights in 8 bits and casts each layer's for its call; some layers then have no wider weight."""
    model, inputs = tiny.build().to(torch.bfloat16), cast(inputs, torch.bfloat16)

    def narrow():
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)

    for step in (narrow, lambda: apply(model, config))[:: 1 if order == "cast-first" else -1]:
        step()
    out = forward(model, inputs)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    lf.restore(model)
    other = tiny.build().to(torch.bfloat16)
    other.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    stock = forward(model, inputs)
    assert torch.equal(stock, forward(other, inputs))
    assert (gap(out, stock) > 1e-3) == (not isinstance(config, lf.Softmax))


def test_text_length_may_change():
    """Prompts of other lengths between calls, where text stands in the sequence."""
    tiny = TINY["flux"]
    model = lf.apply(tiny.build(), lf.CLEAR(1000))
    for length in (TEXT, 3, 12):
        inputs = tiny.inputs(6, 9) | {"encoder_hidden_states": noise(2, length, 32), "txt_ids": torch.zeros(length, 3)}
        assert gap(forward(model, inputs), forward(tiny.build(), inputs)) < 1e-5
