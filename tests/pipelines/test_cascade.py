"""Cascades over stock pipelines: diffusers' own image-to-image pipelines are the oracle for each stage."""

import diffusers
import pytest
import torch
from PIL import Image

import linfusion as lf
from linfusion.apply import kept, record_of
from linfusion.pipelines import cascade as module
from linfusion.pipelines.cascade import cascade
from linfusion.pipelines.latents import from_vae, to_vae
from linfusion.pipelines.schedule import is_flow, steered
from linfusion.pipelines.stages import Stage, stages
from linfusion.pipelines.vae import encode

from ..models import HOSTS, TEXT, noise
from ..models.parts import stable_diffusion


def embeddings(channels: int, pooled: int = 0, mask: bool = False) -> dict:
    given = {
        "prompt_embeds": noise(1, TEXT, channels, seed=2),
        "negative_prompt_embeds": noise(1, TEXT, channels, seed=3),
    }
    if pooled:
        given["pooled_prompt_embeds"] = noise(1, pooled, seed=4)
        given["negative_pooled_prompt_embeds"] = noise(1, pooled, seed=5)
    if mask:
        given["prompt_embeds_mask"] = torch.ones(1, TEXT, dtype=torch.long)
    return given


def qwen():
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, attn_scales=[], temperal_downsample=[False],
        latents_mean=[0.1] * 4, latents_std=[2.0] * 4,
    ).eval()  # fmt: skip
    return diffusers.QwenImagePipeline(
        vae=vae, text_encoder=None, tokenizer=None, transformer=HOSTS["qwen"].build(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


PIPES = {
    "unet-sd15": (embeddings(16), "StableDiffusionImg2ImgPipeline"),
    "unet-sdxl": (embeddings(16, 8), "StableDiffusionXLImg2ImgPipeline"),
    "pixart": (embeddings(12), None),
    "sd3": (embeddings(12, 24), "StableDiffusion3Img2ImgPipeline"),
    "flux": (embeddings(32, 24), "FluxImg2ImgPipeline"),
    "qwen": (embeddings(24, mask=True), "QwenImageImg2ImgPipeline"),
}
PICTURE = Image.effect_noise((32, 24), 90).convert("RGB")


@pytest.fixture(params=PIPES, scope="module")
def case(request):
    """A pipeline, its embeddings, and the image-to-image pipeline around the same parts."""
    name = request.param
    arguments, other = PIPES[name]
    arguments = dict(arguments)
    pipe = qwen() if name == "qwen" else HOSTS[name].build_pipeline()
    if name == "pixart":
        arguments |= {"negative_prompt": None, "prompt_attention_mask": torch.ones(1, TEXT)}
        arguments["negative_prompt_attention_mask"] = torch.ones(1, TEXT)
    if name == "qwen":
        del arguments["negative_prompt_embeds"]
    pipe.set_progress_bar_config(disable=True)
    components = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    if other == "StableDiffusionImg2ImgPipeline":
        components |= {"feature_extractor": None, "requires_safety_checker": False}
    return pipe, arguments, other and getattr(diffusers, other)(**components)


def test_first_stage_is_the_pipelines_own_picture(case):
    pipe, arguments, _ = case
    drawn = cascade(pipe, None, [(24, 32)], steps=2, seed=3, arguments=arguments)
    own = {"use_resolution_binning": False} if "PixArt" in type(pipe).__name__ else {}
    generator = torch.Generator().manual_seed(3)
    latents = pipe(
        None, height=24, width=32, num_inference_steps=2, output_type="latent", generator=generator, **arguments, **own
    )[0]  # fmt: skip
    assert torch.equal(module.unpack(pipe, latents, (24, 32)), drawn.latents)
    assert drawn.image.size == (32, 24) and drawn.stages[0].steps == 2


def test_stage_is_image_to_image(case):
    """Two steps from the level at which the last two of five begin: schedules differ in where they end."""
    pipe, arguments, other = case
    strength = 0.4 if hasattr(pipe, "_pack_latents") else 0.25075 if is_flow(pipe.scheduler) else 0.201
    drawn = cascade(
        pipe, None, [(24, 32)], image=PICTURE, steps=2, strength=strength, guidance=3.0, seed=3, arguments=arguments
    )
    assert drawn.stages[0].steps == 2 and drawn.stages[0].level == pytest.approx(strength, abs=0.01)
    if other is None:
        return
    other.set_progress_bar_config(disable=True)
    own = {"height": 24, "width": 32} if "height" in module.call_defaults(other) else {}
    latents = other(
        None, image=from_vae(pipe.vae, encode(pipe.vae, PICTURE)), strength=0.4, num_inference_steps=5,
        guidance_scale=3.0, output_type="latent", generator=torch.Generator().manual_seed(3), **arguments, **own,
    )[0]  # fmt: skip
    torch.testing.assert_close(module.unpack(pipe, latents, (24, 32)), drawn.latents, rtol=1e-4, atol=1e-5)


SCHEDULERS = ["PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "DPMSolverMultistep", "UniPCMultistep",
              "DDPM", "LCM"]  # fmt: skip


@pytest.fixture(scope="module")
def sd():
    pipe = HOSTS["unet-sd15"].build_pipeline()
    return pipe, PIPES["unet-sd15"][0]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_starts_from_the_picture(sd, name):
    """At its first call the denoiser sees the picture with the noise of that level, in the scheduler's own scale."""
    pipe, arguments = sd
    before = pipe.scheduler
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(before.config, skip_prk_steps=True)
    seen: list = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args[0], args[1])), with_kwargs=True
    )
    try:
        drawn = cascade(pipe, None, [(16, 16)], image=PICTURE, steps=3, strength=0.3, guidance=1.0, arguments=arguments)
        scheduler = pipe.scheduler
    finally:
        hook.remove()
        pipe.scheduler = before
    level = drawn.stages[0].level
    assert level == pytest.approx(0.3, abs=0.08)
    assert float(seen[0][1]) == pytest.approx(1000 * level) and len(seen) == drawn.stages[0].steps
    clean = from_vae(pipe.vae, encode(pipe.vae, PICTURE.resize((16, 16), Image.Resampling.LANCZOS)))
    alpha = scheduler.alphas_cumprod[round(1000 * level)] ** 0.5
    unit = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(seen[0][0], alpha * clean + (1 - alpha**2) ** 0.5 * unit, rtol=0.01, atol=0.02)
    assert drawn.latents.isfinite().all()


def test_schedules_that_cannot_be_cut(sd):
    pipe, arguments = sd
    before = pipe.scheduler
    pipe.scheduler = diffusers.KDPM2DiscreteScheduler.from_config(before.config)
    try:
        with pytest.raises(NotImplementedError, match="KDPM2.*EulerDiscrete"):
            cascade(pipe, None, [16], steps=2, arguments=arguments)
    finally:
        pipe.scheduler = before
    with pytest.raises(ValueError, match="shift.*DDIM"):
        cascade(pipe, None, [16], steps=2, shift=3.0, arguments=arguments)


@pytest.fixture(scope="module")
def flow():
    """FLUX.1's rule for the shift."""
    pipe = HOSTS["flux"].build_pipeline()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return pipe, PIPES["flux"][0]


def sigmas(pipe, arguments, size, **settings):
    """The noise levels of a stage, the last one left out; the denoiser does nothing."""
    with steered(pipe, start=lambda noise, scheduler: noise, **settings):
        with pytest.raises(RuntimeError, match="enough"):
            hook = pipe.transformer.register_forward_pre_hook(stop)
            try:
                pipe(None, height=size, width=size, num_inference_steps=4, **arguments)
            finally:
                hook.remove()
        return pipe.scheduler.sigmas.clone()


def stop(*args):
    raise RuntimeError("enough")


def shifted(u, s):
    return s * u / (1 + (s - 1) * u)


def test_shift_of_flows(flow):
    """Inside the model's range the pipeline's line, above it the root of the tokens; a stage's own shift acts."""
    pipe, arguments = flow
    u = torch.tensor([1.0, 0.75, 0.5, 0.25])
    tokens = (64 // 4) ** 2
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    assert torch.allclose(sigmas(pipe, arguments, 64, steps=4)[:-1], shifted(u, torch.tensor(mu).exp()))
    assert torch.allclose(sigmas(pipe, arguments, 64, steps=4, shift=10.0)[:-1], shifted(u, 10))
    big = torch.tensor(1.15).exp() * (512**2 / 4**2 / 4096) ** 0.5
    assert torch.allclose(sigmas(pipe, arguments, 512, steps=4)[:-1], shifted(u, big))
    static = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.scheduler, before = static, pipe.scheduler
    try:
        assert torch.allclose(sigmas(pipe, arguments, 64, steps=4, shift=10.0)[:-1], shifted(u, 10))
        assert torch.allclose(sigmas(pipe, arguments, 64, steps=4)[:-1], shifted(u, 3))
    finally:
        pipe.scheduler = before
    assert "set_timesteps" not in vars(static) and "prepare_latents" not in vars(pipe)


@pytest.mark.parametrize("size", [64, 512])
def test_strength_is_the_noise_level(flow, size):
    """Whatever the shift; the steps are those of the shifted schedule."""
    pipe, arguments = flow
    got = sigmas(pipe, arguments, size, steps=5, level=0.35)
    assert len(got) == 6 and got[0] == pytest.approx(0.35) and got[-1] == 0
    assert (got[:-1] > got[1:]).all() and got[1] > 0.25


def test_mechanisms_change_with_the_stage_and_stand_again(flow):
    pipe, arguments = flow
    torch.manual_seed(1)
    lf.apply(pipe, lf.LinFusion(mid_dim=4))
    for p in pipe.transformer.transformer_blocks[0].attn.linfusion.parameters():
        torch.nn.init.normal_(p)
    own, weights = record_of(pipe.transformer), dict(pipe.transformer.state_dict())
    seen: list = []
    see = lambda report, small: seen.append((report.stage.mechanism, small.size))  # noqa: E731
    names: list = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda m, a: names.append(str(next(iter(record_of(m).entries.values())).mechanism.config))
    )
    try:
        drawn = cascade(
            pipe, None, (16, 32), steps=1, strength=0.5, arguments=arguments, mechanism=[lf.CLEAR(3), None],
            on_stage=see,
        )  # fmt: skip
    finally:
        hook.remove()
    assert names == ["CLEAR(radius=3)", "LinFusion(mid_dim=4)"]
    assert seen == [(lf.CLEAR(3), (16, 16)), (None, (32, 32))] and drawn.image.size == (32, 32)
    now = pipe.transformer.state_dict()
    assert record_of(pipe.transformer) is own and now.keys() == weights.keys()
    assert all(torch.equal(now[name], weights[name]) for name in now)
    lf.restore(pipe)
    with pytest.raises(KeyError), kept(pipe):
        lf.apply(pipe, lf.CLEAR(3))
        raise KeyError
    assert record_of(pipe.transformer) is None


def test_going_on_from_finished_stages(flow, tmp_path):
    """Interrupted in the second stage: the first is kept, and the picture ends as it would have."""
    pipe, arguments = flow
    settings = dict(steps=2, strength=0.5, arguments=arguments)
    whole = cascade(pipe, None, (16, 32), **settings)

    def interrupt(stage, done, total):
        if stage == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cascade(pipe, None, (16, 32), folder=tmp_path, on_step=interrupt, **settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stage-1.png", "stage-1.safetensors"]
    steps: list = []
    again = cascade(pipe, None, (16, 32), folder=tmp_path, on_step=lambda *s: steps.append(s), **settings)
    assert torch.equal(again.latents, whole.latents) and steps == [(2, 1, 2), (2, 2, 2)]
    assert [s.resumed for s in again.stages] == [True, False]
    assert [s.resumed for s in cascade(pipe, None, (16, 32, 64), folder=tmp_path, **settings).stages] == [1, 1, 0]
    with pytest.raises(ValueError, match="another picture"):
        cascade(pipe, None, (16, 32), folder=tmp_path, seed=1, **settings)
    (tmp_path / "stage-1.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be read"):
        cascade(pipe, None, (16, 32), folder=tmp_path, **settings)


def test_the_old_picture_guides(flow):
    """Skip and low hold the result to the picture before, low by its coarse part only; pixels can be upscaled too."""
    pipe, arguments = flow
    base = cascade(pipe, None, [16], steps=1, arguments=arguments).image
    settings = dict(image=base, steps=4, strength=0.9, arguments=arguments)
    start = from_vae(pipe.vae, encode(pipe.vae, base.resize((32, 32), Image.Resampling.LANCZOS)))

    def away(**more):
        latents = cascade(pipe, None, [32], **settings, **more).latents
        coarse = module.resize(latents - start, (8, 8))
        return (latents - start).norm().item(), coarse.norm().item()

    free, skip, low = away(), away(skip=1.0), away(low=1.0)
    assert skip[0] < 0.9 * free[0] and low[1] < 0.9 * free[1]
    latent = cascade(pipe, None, (16, 32), steps=1, strength=0.2, arguments=arguments, upscale="latent")
    pixel = cascade(pipe, None, (16, 32), steps=1, strength=0.2, arguments=arguments, upscale="pixel")
    assert latent.latents.shape == pixel.latents.shape and not torch.equal(latent.latents, pixel.latents)


def test_a_prompt_and_a_file(tmp_path):
    pipe = stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    done = cascade(
        pipe, "red apple", (64, 128), steps=(2, 1), guidance=3.0, arguments={"negative_prompt": "green"},
        out=tmp_path / "a.png", folder=tmp_path / "f",
    )  # fmt: skip
    assert done.image is None and Image.open(done.path).size == (128, 128)
    assert torch.allclose(to_vae(pipe.vae, from_vae(pipe.vae, done.latents)), done.latents, atol=1e-6)


def test_refusals(flow):
    pipe, arguments = flow
    for sizes, settings, error in [
        ((), {}, "at least one size"), ((30,), {}, "multiples of 4"), ((32, 16), {}, "must grow"),
        ((16,), {"strength": 0}, "strength"), ((16,), {"steps": 0}, "steps"), ((16,), {"skip": 2}, "skip"),
        ((16,), {"upscale": "x"}, "latent, pixel"), ((16,), {"what": 2}, "what"), ((16, 32), {"steps": [1]}, "1 val"),
        (("16",), {}, "number of pixels"), ((16,), {"ntk": 0}, "ntk"),
        ((16,), {"out": "a.txt"}, "must end as a picture"),
        ((16,), {"arguments": {"sigmas": [1.0], "latents": 1}}, "latents"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=error):
            cascade(pipe, None, sizes, **settings)
    assert [s.steps for s in stages((16, Stage(32, steps=5)), strength=[1, 0.5])] == [None, 5]
