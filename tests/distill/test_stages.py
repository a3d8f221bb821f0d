"""What the student learns from: examples by position, noise, and the losses of both stages, against formulas."""

import math
from itertools import islice

import pytest
import torch
from diffusers import DDPMScheduler

import linfusion as lf
from linfusion.apply import record_of
from linfusion.distill.config import TrainConfig
from linfusion.distill.data.store import Store
from linfusion.distill.data.stream import Positions, Stream, batches, collate
from linfusion.distill.losses import finite, layer_loss
from linfusion.distill.noise import Schedule
from linfusion.distill.probe import denoiser
from linfusion.distill.stages import EndToEnd, Transfer
from linfusion.distill.stages.base import Inputs
from linfusion.distill.trainable import LORA, add_lora, choose, frozen_copy, projections

from .tiny import build

CPU = torch.device("cpu")
CONFIGS = [
    lf.LinFusion(mid_dim=4),
    lf.CLEAR(2, pool=2),
    lf.SLA(0.5, block_q=16, block_k=16),
    lf.LiT(kernel_size=3),
    lf.Agent((2, 2)),
]


def make(stage, name, data, mechanism, trainable="mechanism", **settings):
    """A stage as `train` makes it, and a batch of three."""
    config = TrainConfig(stage="transfer", **settings)
    pipe, store = build(name), Store(data(name))
    _, student = denoiser(pipe)
    student.requires_grad_(False)
    lf.apply(student, mechanism)
    layers = list(record_of(student).entries)
    targets = projections(student, layers)
    lf.restore(student)
    teacher = frozen_copy(student, targets if trainable == "mechanism+qkvo" else [], share=True)
    lf.apply(student, mechanism)
    if trainable == "mechanism+lora":
        add_lora(student, targets, 2, None)
    trained = choose(student, layers, trainable, targets)
    batch = collate([Stream(store, 0, 0.0)[i] for i in range(3)])
    return stage(student, teacher, layers, Inputs(store, config, CPU, torch.float32), config), trained, batch


def stir(trained):
    """Away from the start, where zero-initialised branches hide what stands before them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


def test_order_is_by_position_alone(data):
    """Two processes see together what one with twice the batch sees; a later start sees what was to come."""
    stream = Stream(Store(data("sd")), seed=3, caption_dropout=0.5)

    def draw(first, batch, rank, world, count):
        return list(islice(batches(stream, Positions(first, batch, rank, world), 0, False), count))

    one = draw(0, 4, 0, 1, 6)  # two and a half epochs
    two = [collate_pair(a, b) for a, b in zip(draw(0, 2, 0, 2, 6), draw(0, 2, 1, 2, 6), strict=True)]
    late = draw(4, 4, 0, 1, 2)
    for a, b in [*zip(one, two, strict=True), *zip(one[4:], late, strict=True)]:
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(one[0]["noise"], one[1]["noise"])
    first_epoch = torch.cat([b["latents"] for b in one])[:10]
    assert len(first_epoch.flatten(1).unique(dim=0)) == 10  # every sample once
    dropped = torch.cat([b["dropped"] for b in one])
    assert 0 < dropped.sum() < len(dropped)


def collate_pair(a, b):
    return {k: torch.cat((a[k], b[k])) for k in a}


def test_times_are_spread_evenly(data):
    stream = Stream(Store(data("sd")), seed=0, caption_dropout=0.0)
    for first in (0, 17):
        quantiles = torch.stack([stream[i]["quantile"] for i in range(first, first + 16)])
        assert (torch.histc(quantiles, bins=4, min=0, max=1) >= 3).all()


def test_samples_of_different_shapes_are_refused(data):
    example = Stream(Store(data("sd")), 0, 0.0)[0]
    with pytest.raises(ValueError, match="differ in latents.*train_batch_size 1"):
        collate([example, example | {"latents": example["latents"][:, :2]}])


def schedule(kind, **settings):
    config = {"prediction_type": kind, "num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}
    meta = {"schedule": config, "scheduler": "FlowMatchEulerDiscreteScheduler" if kind == "flow" else "DDIMScheduler"}
    meta["convention"] = {"sign": 1, "clock": "t", "time_dtype": "float32"} | settings.pop("convention", {})
    return Schedule(meta, CPU, **{"scheme": "none", "mean": 0.0, "std": 1.0, "mode_scale": 1.29} | settings)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_discrete_noise(kind):
    """As diffusers' own scheduler adds it, and what gives the picture back."""
    clean, noise = torch.randn(2, 2, 4, 3, 3)
    noised = schedule(kind)(clean, noise, torch.tensor([0.25, 0.9]))
    assert noised.time.tolist() == [250, 900]
    host = DDPMScheduler(prediction_type=kind, beta_schedule="scaled_linear")
    steps = noised.time.long()
    assert torch.allclose(noised.sample, host.add_noise(clean, noise, steps), atol=1e-6)
    wanted = {"epsilon": noise, "v_prediction": host.get_velocity(clean, noise, steps), "sample": clean}[kind]
    assert torch.allclose(noised.target, wanted, atol=1e-6)


def test_flow_noise():
    clean, noise = torch.randn(2, 2, 5, 4)
    noised = schedule("flow", convention={"clock": "1-t/1000", "sign": -1})(clean, noise, torch.tensor([0.25, 0.9]))
    assert torch.allclose(noised.time, torch.tensor([0.75, 0.1]))
    assert torch.allclose(noised.sample[0], 0.75 * clean[0] + 0.25 * noise[0])
    assert torch.allclose(noised.target, clean - noise)


def test_densities_of_times():
    """Quantiles of the distributions that diffusers draws from."""
    from diffusers.training_utils import compute_density_for_timestep_sampling as density

    u = (torch.arange(4000) + 0.5) / 4000
    for scheme in ("logit_normal", "mode", "none"):
        torch.manual_seed(0)
        drawn = density(scheme, 40000, logit_mean=0.5, logit_std=1.2, mode_scale=1.29)
        mine = schedule("flow", scheme=scheme, mean=0.5, std=1.2).density(u)
        for q in (0.1, 0.5, 0.9):
            assert abs(mine.quantile(q) - drawn.quantile(q)) < 0.02
    with pytest.raises(ValueError, match="for flow models"):
        schedule("epsilon", scheme="mode")


def test_layer_loss():
    a, b, c, d = (x.double() for x in torch.randn(4, 2, 5, 4))
    per_sample = [
        ((a[i] - b[i]).square().sum() + (c[i] - d[i]).square().sum()) / (b[i].square().sum() + d[i].square().sum())
        for i in range(2)
    ]
    relative = layer_loss((a, c), (b, d), relative=True)
    assert math.isclose(relative, sum(per_sample) / 2, rel_tol=1e-5)
    whole = ((a - b).square().sum() + (c - d).square().sum()) / (2 * a.numel())
    assert math.isclose(layer_loss((a, c), (b, d), relative=False), whole, rel_tol=1e-5)
    assert finite((a, b)) and not finite((a, b * math.nan)) and not finite(a / 0)


@pytest.mark.parametrize("name", ["sd", "flux"])
@pytest.mark.parametrize("mechanism", CONFIGS, ids=repr)
def test_transfer(name, mechanism, data):
    """The teacher's output goes on; each layer is compared on the teacher's input, and learns by itself."""
    stage, trained, batch = make(Transfer, name, data, mechanism)
    stir(trained)
    seen = {}

    def keep(module, args, kwargs, output):
        seen[module] = args, kwargs, output

    for layer in stage.layers:
        stage.teacher.get_submodule(layer).register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        wanted = stage.teacher(**stage.inputs(batch)[0])[0]
        theirs = {layer: seen[stage.teacher.get_submodule(layer)] for layer in stage.layers}
    result = stage(batch)
    assert torch.equal(stage.answer(stage.inputs(batch)[0]), wanted)
    for layer, loss in zip(stage.layers, result["layers"], strict=True):
        args, kwargs, output = theirs[layer]
        with stage.paused():
            mine = stage.student.get_submodule(layer)(*args, **kwargs)
        assert torch.allclose(loss, layer_loss(mine, output, relative=True), rtol=1e-3)
        assert loss > 1e-4
    first = stage.layers[0]
    gradients = torch.autograd.grad(stage.seen[first][0], list(trained.values()), allow_unused=True)
    assert [g is not None for g in gradients] == [n.startswith(first + ".") for n in trained]


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_end_to_end(name, data):
    """Task + 0.5 output + 0.5 attention, every term written out."""
    stage, trained, batch = make(EndToEnd, name, data, lf.LinFusion(mid_dim=4))
    stir(trained)
    arguments, noised = stage.inputs(batch)
    result = stage(batch)
    features = {}
    for label, model in (("student", stage.student), ("teacher", stage.teacher)):
        for layer in stage.layers:
            model.get_submodule(layer).register_forward_hook(
                lambda module, args, output, key=(label, layer): features.__setitem__(key, output)
            )
    with torch.no_grad(), stage.paused():
        ours, theirs = stage.student(**arguments)[0], stage.teacher(**arguments)[0]
    task, output = (ours - noised.target).square().mean(), (ours - theirs).square().mean()
    attention = [layer_loss(features["student", n], features["teacher", n], False) for n in stage.layers]
    assert torch.allclose(result["task"], task) and torch.allclose(result["output"], output)
    wanted = task + 0.5 * output + 0.5 * sum(attention) / len(attention)
    assert torch.allclose(result["loss"], wanted, rtol=1e-5)
    assert output > 1e-4 and result["finite"].all()
    alone, _, _ = make(EndToEnd, name, data, lf.LinFusion(mid_dim=4), output_weight=0.0, attention_weight=0.0)
    alone.teacher.forward = None  # SLA's fine-tuning: no teacher is called
    result = alone(batch)
    assert torch.equal(result["loss"], result["task"].float())


def test_variance_term(data):
    """Of models that answer twice the channels (LiT's term)."""
    stage, _, batch = make(EndToEnd, "sd", data, lf.LinFusion(mid_dim=4), variance_weight=0.25)
    stage.inputs.convention["variance"] = True
    for model, factor in ((stage.student, 2.0), (stage.teacher, 3.0)):
        model.register_forward_hook(
            lambda m, args, out, f=factor: (torch.cat((out[0], f * torch.ones_like(out[0])), 1),)
        )
    result = stage(batch)
    assert torch.allclose(result["variance"], torch.tensor(1.0))
    terms = result["task"] + 0.5 * result["output"] + 0.5 * result["attention"] + 0.25 * result["variance"]
    assert torch.allclose(result["loss"], terms)


def test_dropped_captions(data):
    """A dropped sample is told what the pipeline's pass without caption is."""
    stage, _, batch = make(EndToEnd, "sd", data, lf.LinFusion(mid_dim=4))
    batch["dropped"] = torch.tensor([False, True, False])
    arguments, _ = stage.inputs(batch)
    empty = build("sd").encode_prompt("", "cpu", 1, False)[0][0]
    assert torch.allclose(arguments["encoder_hidden_states"][1], empty, atol=1e-5)
    assert torch.equal(arguments["encoder_hidden_states"][0], batch["encoder_hidden_states"][0])
    assert not torch.allclose(batch["encoder_hidden_states"][1], empty, atol=1e-2)


@pytest.mark.parametrize("stage", [Transfer, EndToEnd])
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_gradient_checkpointing(stage, name, data):
    """The same losses and gradients, with layers run again in the backward pass."""
    found = []
    for again in (False, True):
        one, trained, batch = make(stage, name, data, lf.LinFusion(mid_dim=4), "mechanism+lora")
        stir(trained)
        if again:
            one.student.enable_gradient_checkpointing()
        result = one(batch)
        result["loss"].backward()
        assert not one.seen  # what the backward pass runs again is not kept
        found.append([result["loss"].detach(), *(p.grad for p in trained.values())])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found, strict=True))
    assert all(g.abs().sum() > 0 for g in found[1][1:])


@pytest.mark.parametrize("trainable", ["mechanism", "mechanism+qkvo", "mechanism+lora"])
@pytest.mark.parametrize("name", ["sd", "flux"])
@pytest.mark.parametrize("stage", [Transfer, EndToEnd])
def test_what_is_trained(stage, name, trainable, data):
    """Exactly that gets a gradient and moves; the teacher shares the rest, and never moves."""
    one, trained, batch = make(stage, name, data, lf.LinFusion(mid_dim=4), trainable)
    stir(trained)
    own = {n for n, p in one.student.named_parameters() if p.requires_grad}
    assert own == set(trained)
    kinds = {"mechanism": [".linfusion."], "mechanism+qkvo": [".to_q.", ".to_v.", ".linfusion."],
             "mechanism+lora": [f".lora_A.{LORA}.", f".to_k.lora_B.{LORA}.", ".linfusion."]}[trainable]  # fmt: skip
    assert all(any(kind in n for n in own) for kind in kinds)
    assert not any("add_q_proj" in n or ".norm" in n or "attn2" in n for n in own)
    one(batch)["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    before = [p.clone() for p in one.teacher.parameters()]
    torch.optim.SGD(list(trained.values()), lr=0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(before, one.teacher.parameters(), strict=True))
    shared = {id(p) for p in one.student.parameters()} & {id(p) for p in one.teacher.parameters()}
    apart = [n for n, p in one.teacher.named_parameters() if id(p) not in shared]
    assert bool(apart) == (trainable == "mechanism+qkvo")


@pytest.mark.parametrize("mechanism", CONFIGS, ids=repr)
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_bf16(name, mechanism, data):
    """Frozen weights in bf16, trained ones in fp32, under autocast, as accelerate runs it."""
    one, trained, batch = make(EndToEnd, name, data, mechanism)
    stir(trained)
    exact = one(batch)["loss"]
    one.student.to(torch.bfloat16)
    one.teacher.to(torch.bfloat16)
    one.inputs.dtype = torch.bfloat16
    choose(one.student, one.layers, "mechanism", [])
    with torch.autocast("cpu", torch.bfloat16):
        loss = one(batch)["loss"]
    loss.backward()
    assert abs(loss - exact) / exact < 0.05
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in trained.values())


def test_nothing_to_train(data):
    with pytest.raises(ValueError, match="CLEAR has no parameters of its own.*mechanism.lora"):
        make(Transfer, "flux", data, lf.CLEAR(2))
