"""What else people switch on in the same pipeline: adapters, other tasks, few steps, tiling, caches."""

import diffusers
import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    LCMScheduler,
    PyramidAttentionBroadcastConfig,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from PIL import Image

import linfusion as lf

from .families.matrix import CONFIGS
from .models import HOSTS, TINY, forward, gap, noise, processors
from .models.flux import flux_draw
from .models.parts import stable_diffusion


@pytest.fixture(params=CONFIGS)
def config(request):
    """Each mechanism in turn."""
    return CONFIGS[request.param]


@pytest.fixture
def pipe():
    pipe = stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def emoji():
    pipe = lf.demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **settings):
    defaults = {"prompt": "red apple", "num_inference_steps": 3, "output_type": "np"}
    if not isinstance(pipe, (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline)):
        defaults |= {"height": 64, "width": 96}
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe(**(defaults | settings), generator=generator).images)


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((96, 64)).convert("RGB")


def check(pipe, config, run):
    """Softmax changes nothing, the others do, and restore brings the stock answer back."""
    stock = run()
    torch.manual_seed(0)
    lf.apply(pipe, config)
    changed = run()
    if isinstance(config, lf.Softmax):
        assert torch.equal(changed, stock)
    else:
        assert changed.isfinite().all() and gap(changed, stock) > 1e-3
    lf.restore(pipe)
    assert torch.equal(run(), stock)
    return changed


@pytest.mark.parametrize("task", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline], ids=str)
def test_other_tasks(pipe, config, task):
    settings = {"image": picture(), "strength": 0.8}
    if task is StableDiffusionInpaintPipeline:
        mask = Image.new("L", (96, 64))
        mask.paste(255, (0, 0, 48, 64))
        settings |= {"mask_image": mask, "height": 64, "width": 96}
    other = task.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    changed = check(other, config, lambda: draw(other, **settings))
    with lf.applied(pipe, config):  # one model behind both pipelines
        if not isinstance(config, lf.LinFusion):  # whose fresh branch is random
            assert torch.equal(draw(other, **settings), changed)


@pytest.mark.parametrize("config", [lf.Softmax(), lf.CLEAR(4), lf.Agent(16)], ids=str)
@pytest.mark.parametrize("task", [FluxImg2ImgPipeline, FluxInpaintPipeline], ids=lambda c: c.__name__)
def test_other_tasks_of_flux(emoji, task, config):
    """The embedded model behind diffusers' own pipelines for them."""
    other = task.from_pipe(emoji)
    other.set_progress_bar_config(disable=True)
    settings = {"image": picture().resize((256, 192)), "strength": 0.8, "height": 192, "width": 256}
    if task is FluxInpaintPipeline:
        mask = Image.new("L", (256, 192))
        mask.paste(255, (0, 0, 128, 192))
        settings |= {"mask_image": mask}

    check(other, config, lambda: draw(other, **settings, max_sequence_length=16))


@pytest.mark.parametrize("config", [lf.Softmax(), lf.CLEAR(4), lf.SLA(0.3, 16, 16)], ids=str)
def test_loras_by_the_pipelines_own_calls(emoji, config):
    """Loaded, weighed, fused into the weights and out again, switched off and unloaded while the mechanism is on."""
    generator = torch.Generator().manual_seed(3)

    def factors():
        found = {}
        for name, m in emoji.transformer.named_modules():
            if name.endswith(("attn.to_q", "attn.to_v", "attn.to_out.0")):
                for key, shape in (("lora_A", (4, m.in_features)), ("lora_B", (m.out_features, 4))):
                    found[f"transformer.{name}.{key}.weight"] = 0.1 * torch.randn(shape, generator=generator)
        return found

    def run():
        return draw(emoji, height=128, width=192)

    stock = run()
    lf.apply(emoji, config)
    base = run()
    emoji.load_lora_weights(factors(), adapter_name="one")
    one = run()
    emoji.load_lora_weights(factors(), adapter_name="two")
    emoji.set_adapters(["one", "two"], [1.0, 0.5])
    both = run()
    assert min(gap(one, base), gap(both, one), gap(both, base)) > 1e-2
    emoji.fuse_lora()
    assert gap(run(), both) < 1e-4
    emoji.unfuse_lora()
    assert gap(run(), both) < 1e-4
    emoji.disable_lora()
    assert gap(run(), base) < 1e-4
    emoji.enable_lora()
    emoji.unload_lora_weights()
    assert gap(run(), base) < 1e-4
    lf.restore(emoji)
    assert gap(run(), stock) < 1e-4  # what was fused came out again but for rounding


def test_several_loras(pipe, config):
    """Two adapters, weighed against each other while the mechanism is on."""
    from peft import LoraConfig

    for i, name in enumerate(("one", "two")):
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]), adapter_name=name)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for key, p in pipe.unet.named_parameters():
                if f".{name}." in key:
                    p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    pipe.unet.set_adapters(["one", "two"], [1.0, 0.5])
    both = check(pipe, config, lambda: draw(pipe))
    torch.manual_seed(0)
    lf.apply(pipe, config)
    seen = [both]
    for weights in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]):
        pipe.unet.set_adapters(["one", "two"], weights)
        seen.append(draw(pipe))
    assert min(gap(a, b) for i, a in enumerate(seen) for b in seen[:i]) > 1e-4
    pipe.unet.set_adapters(["one", "two"], [1.0, 0.5])
    assert torch.equal(draw(pipe), both)


def test_textual_inversion(pipe, config):
    """A new word after the mechanism: only the text encoder learns it."""
    lf.apply(pipe, config)
    without = draw(pipe, prompt="<toy> apple")
    pipe.load_textual_inversion({"<toy>": torch.full((16,), 3.0)})
    assert gap(draw(pipe, prompt="<toy> apple"), without) > 1e-4
    lf.restore(pipe)
    check(pipe, config, lambda: draw(pipe, prompt="<toy> apple"))


@pytest.mark.parity
def test_vae_tiling(pipe, config):
    untiled = draw(lf.apply(pipe, config))
    lf.restore(pipe)
    # the oldest supported diffusers has it on the pipeline, the newest on the autoencoder
    getattr(pipe, "enable_vae_tiling", pipe.vae.enable_tiling)()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 32
    assert gap(check(pipe, config, lambda: draw(pipe)), untiled) > 1e-4


def test_few_steps(pipe, config):
    pipe.scheduler = LCMScheduler()
    check(pipe, config, lambda: draw(pipe, num_inference_steps=2, guidance_scale=1.0))


def test_many_pictures_and_sizes_in_a_row(pipe, config):
    """Several pictures a prompt, several prompts, other sizes with as many tokens: each as it would be alone."""
    torch.manual_seed(0)
    lf.apply(pipe, config)
    first = draw(pipe)
    assert draw(pipe, prompt=["red apple", "green apple"], num_images_per_prompt=2).shape == (4, 64, 96, 3)
    assert draw(pipe, height=96, width=64).shape == (1, 96, 64, 3)
    assert torch.equal(draw(pipe), first)


CACHES = {
    "first-block": lambda: FirstBlockCacheConfig(threshold=10.0),
    "broadcast": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500, spatial_attention_block_identifiers=("transformer_blocks", "blocks"),
    ),
    "taylor": lambda: diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, cache_identifiers=[r".*blocks\.\d+\.attn1?"]
    ),
    "magnitude": lambda: diffusers.MagCacheConfig(
        threshold=10.0, num_inference_steps=4, retention_ratio=0.0, mag_ratios=torch.ones(4)
    ),
}  # fmt: skip
beside_caches = pytest.mark.parametrize("config", [c for name, c in CONFIGS.items() if name != "agent-sd"], ids=str)


@beside_caches
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("host", ["flux", "wan"])
def test_caches_on_top(host, cache, config):
    """diffusers' own caches skip blocks or whole attention layers: what they keep is the mechanism's output."""
    tiny = HOSTS[host]
    model, inputs = tiny.build(), tiny.inputs(3, 5)
    torch.manual_seed(0)
    want = forward(lf.apply(model, config), inputs)
    other = inputs | {"hidden_states": inputs["hidden_states"] + 0.1}
    plain = forward(model, other)
    model.enable_cache(CACHES[cache]())
    with model.cache_context("a"):
        assert gap(forward(model, inputs), want) < 1e-6
        skipped = forward(model, other)
    assert gap(skipped, plain) > 1e-4
    model.disable_cache()
    assert gap(forward(model, other), plain) < 1e-6


@beside_caches
def test_cache_dit_on_top(config):
    """The package, before or after: whole blocks are skipped, and those that run have the mechanism."""
    cache_dit = pytest.importorskip("cache_dit")
    tiny, layers, calls, answers = TINY["flux"], TINY["flux"].layers, [], []
    settings = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 2, "residual_diff_threshold": 10.0}

    def draw(pipe):
        return flux_draw(pipe, 1.0, num_inference_steps=4)

    for first in ("apply", "cache"):
        pipe = tiny.build_pipeline()
        stock = draw(pipe)
        torch.manual_seed(0)
        if first == "apply":
            lf.apply(pipe, config)
        cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**settings))
        if first == "cache":
            lf.apply(pipe, config)
        for module in pipe.transformer.modules():
            if hasattr(module, "linfusion"):
                module.linfusion.register_forward_hook(lambda *_: calls.append(1))
        answers.append(draw(pipe))
        assert len(calls) == 2 * layers + 2  # two whole steps, then the first block of each
        calls.clear()
        cache_dit.disable_cache(pipe)
        assert torch.equal(draw(lf.restore(pipe)), stock)
    assert torch.equal(*answers) and gap(answers[0], stock) > 1e-3


SKIPS = {
    "attention": {"skip_attention": True, "skip_ff": False},
    "scores": {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("skip", SKIPS)
def test_layer_skip(skip, order):
    """Skip-layer and perturbed-attention guidance: a layer answers its input, or its values."""
    tiny = TINY["unet-sd15"]
    block = "down_blocks.0.attentions.0.transformer_blocks"
    inputs = tiny.inputs(6, 9)

    def skipping(config):
        model = tiny.build()
        if config is not None and order == "before":
            lf.apply(model, config)
        apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn=block, **SKIPS[skip]))
        return model if config is None or order == "before" else lf.apply(model, config)

    stock = forward(skipping(None), inputs)
    assert gap(stock, forward(tiny.build(), inputs)) > 1e-2
    assert torch.equal(forward(skipping(lf.Softmax()), inputs), stock)
    for config in (lf.CLEAR(1000), lf.LinFusion(mid_dim=4)):
        model = skipping(config)
        if skip == "scores":
            with pytest.raises(NotImplementedError, match=f"{block}.0.attn1: .*skip_attention_scores"):
                forward(model, inputs)
            assert torch.equal(forward(lf.restore(model), inputs), stock)
        elif isinstance(config, lf.CLEAR):
            assert gap(forward(model, inputs), stock) < 1e-5
        else:
            assert forward(model, inputs).isfinite().all()


def ip_adapter(unet) -> list[dict]:
    """Weights of a tiny IP-Adapter, in the form that `load_ip_adapter` reads from a file."""
    generator = torch.Generator().manual_seed(9)

    def weight(*shape):
        return 0.5 * torch.randn(*shape, generator=generator)

    layers, number = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            attn = unet.get_submodule(name.removesuffix(".processor"))
            for key in ("to_k_ip", "to_v_ip"):
                layers[f"{number}.{key}.weight"] = weight(attn.inner_dim, 16)
            number += 2
    projection = {"proj.weight": weight(4 * 16, 6), "proj.bias": weight(64), "norm.weight": weight(16)}
    return [{"image_proj": projection | {"norm.bias": weight(16)}, "ip_adapter": layers}]


@pytest.mark.parametrize("order", ["ip-first", "ip-second"])
@pytest.mark.parametrize("name", ["unet-sd15", "unet-sdxl"])
def test_ip_adapter(name, order):
    """Loading one makes self-attention's processors anew, by class and without arguments."""
    tiny = HOSTS[name]
    inputs = tiny.inputs(6, 9)
    inputs["added_cond_kwargs"] = inputs.get("added_cond_kwargs", {}) | {"image_embeds": [noise(2, 1, 6, seed=8)]}
    stock_model = tiny.build()
    plain = forward(stock_model, tiny.inputs(6, 9))
    stock_model._load_ip_adapter_weights(ip_adapter(stock_model), low_cpu_mem_usage=False)
    stock = forward(stock_model, inputs)
    assert gap(stock, plain) > 1e-2
    outs = {}
    for config in CONFIGS.values():
        model = tiny.build()
        for step in (
            lambda m=model: m._load_ip_adapter_weights(ip_adapter(m), low_cpu_mem_usage=False),
            lambda m=model, c=config: lf.apply(m, c),
        )[:: 1 if order == "ip-first" else -1]:
            step()
        outs[config.name] = forward(model, inputs)
        report = lf.describe(model)
        assert report.replaced == tiny.layers or (report.replaced > 0 and config.name == "agent-sd")
        lf.restore(model)
        assert torch.equal(forward(model, inputs), stock)
    assert torch.equal(outs.pop("softmax"), stock)
    assert min(gap(out, stock) for out in outs.values()) > 1e-2


@pytest.mark.parametrize("order", ["ip-first", "ip-second"])
def test_ip_adapter_of_flux(order):
    """It sits in the double blocks' processors: refused there by name, never lost and never silently on top."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    tiny = TINY["flux"]
    model, inputs = tiny.build(), tiny.inputs(6, 9)

    def load():
        for block in model.transformer_blocks:
            block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 32))

    if order == "ip-first":
        load()
        with pytest.raises(NotImplementedError, match="FluxIPAdapterAttnProcessor"):
            lf.apply(model, lf.CLEAR(2))
        lf.apply(model, lf.CLEAR(2), layers="single_transformer_blocks.*")
        assert lf.describe(model).replaced == 2
    else:
        lf.apply(model, lf.CLEAR(2))
        load()
        with pytest.raises(RuntimeError, match=r"FluxIPAdapterAttnProcessor was set over CLEAR on transformer_blocks"):
            forward(model, inputs)
    lf.restore(model)
    assert {type(b.attn.processor) for b in model.transformer_blocks} == {FluxIPAdapterAttnProcessor}


def sd3_ip_adapter(model) -> dict:
    """Weights of a tiny IP-Adapter of SD3, in the form that `load_ip_adapter` reads from a file."""
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
    from diffusers.models.embeddings import IPAdapterTimeImageProjection

    torch.manual_seed(9)
    one = SD3IPAdapterJointAttnProcessor2_0(32, 32, 16, timesteps_emb_dim=64)
    layers = {
        f"{i}.{key}": p + 0.3 * torch.randn(p.shape)
        for i in range(len(model.attn_processors))
        for key, p in one.state_dict().items()
    }
    proj = IPAdapterTimeImageProjection(6, 32, 64, heads=1, num_queries=4, timestep_in_dim=320).state_dict()
    return {"ip_adapter": layers, "image_proj": proj}


@pytest.mark.parametrize("order", ["ip-first", "ip-second"])
@pytest.mark.parametrize("name", ["sd3", "sd3.5"])
def test_ip_adapter_of_sd3(name, order):
    """It sits in every processor, `attn2`'s included: refused by name, or told of at the first call."""
    tiny = HOSTS[name]
    model, inputs = tiny.build(), tiny.inputs(6, 9)

    def load():
        model._load_ip_adapter_weights(sd3_ip_adapter(model), low_cpu_mem_usage=False)

    def draw():
        return forward(model, inputs | {"joint_attention_kwargs": {"ip_adapter_image_embeds": noise(2, 1, 6, seed=8)}})

    plain = forward(model, inputs)
    if order == "ip-first":
        load()
        stock = draw()
        for config in (lf.Softmax(), lf.CLEAR(2)):
            with pytest.raises(NotImplementedError, match=r"SD3IPAdapterJointAttnProcessor2_0, which .* layers="):
                lf.apply(model, config)
    else:
        lf.apply(model, lf.CLEAR(2))
        load()
        with pytest.raises(RuntimeError, match=r"SD3IPAdapterJointAttnProcessor2_0 was set over CLEAR on transformer_"):
            draw()
        lf.restore(model)
        stock = draw()
    assert {type(p).__name__ for p in processors(model).values()} >= {"SD3IPAdapterJointAttnProcessor2_0"}
    assert gap(stock, plain) > 1e-2 and lf.describe(model).replaced == 0
    lf.restore(model)
    assert torch.equal(draw(), stock)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("order", ["sliced-first", "sliced-second"])
def test_attention_slicing(pipe, config, order):
    """It sets processors of its own, which must not put an end to the mechanism in silence."""
    stock = draw(pipe)
    if order == "sliced-first":
        pipe.enable_attention_slicing()
        stock = draw(pipe)
        out = draw(lf.apply(pipe, config))
        assert (gap(out, stock) < 1e-4) == isinstance(config, lf.Softmax)
    else:
        lf.apply(pipe, config)
        pipe.enable_attention_slicing()
        with pytest.raises(RuntimeError, match=r"SlicedAttnProcessor was set over \w+ on .* Apply again"):
            draw(pipe)
        out = draw(lf.apply(pipe, config))
        assert lf.describe(pipe).replaced > 0
    lf.restore(pipe)
    assert gap(draw(pipe), stock) < 1e-4


def test_xformers_over_a_mechanism():
    """Its package need not be there for its processor to be set."""
    from diffusers.models.attention_processor import XFormersAttnProcessor

    tiny = TINY["unet-sd15"]
    model = lf.apply(tiny.build(), lf.CLEAR(2))
    model.set_attn_processor(XFormersAttnProcessor())
    with pytest.raises(RuntimeError, match=r"XFormersAttnProcessor was set over CLEAR on .* Apply again"):
        forward(model, tiny.inputs(6, 9))


def test_something_else_merges_tokens():
    """As tomesd does between a block's norm and its attention: the grid no longer fits, which is said."""
    tiny = TINY["unet-sd15"]
    for config in CONFIGS.values():
        model, inputs = tiny.build(), tiny.inputs(6, 9)
        stock = forward(model, inputs)
        lf.apply(model, config)
        handles = [
            model.get_submodule(r.layer).register_forward_pre_hook(lambda attn, args: (args[0][:, ::2], *args[1:]))
            for r in lf.describe(model).layers if r.mechanism
        ]  # fmt: skip
        handles += [
            model.get_submodule(r.layer).register_forward_hook(lambda attn, args, out: out.repeat_interleave(2, 1))
            for r in lf.describe(model).layers if r.mechanism
        ]  # fmt: skip
        inputs = tiny.inputs(8, 12)
        if any("grid" in m.needs for m in model.modules() if hasattr(m, "needs")):
            with pytest.raises(ValueError, match=r"grid 8 x 12"):
                forward(model, inputs)
        else:
            assert forward(model, inputs).isfinite().all()
        for handle in handles:
            handle.remove()
        lf.restore(model)
        assert torch.equal(forward(model, tiny.inputs(6, 9)), stock)


def test_projections_fused_while_on():
    tiny = TINY["unet-sd15"]
    model, inputs = tiny.build(), tiny.inputs(6, 9)
    lf.apply(model, lf.CLEAR(2))
    model.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match=r"FusedAttnProcessor2_0 was set over CLEAR"):
        forward(model, inputs)
