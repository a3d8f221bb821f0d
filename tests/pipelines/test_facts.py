"""`linfusion.pipelines.facts`: what pipelines tell about themselves, and what they would do unasked."""

from types import SimpleNamespace

import pytest
from diffusers import FluxPipeline

from linfusion.pipelines.facts import (
    Reader,
    call_defaults,
    check_pipeline,
    cut_text,
    made_for,
    size_multiple,
    text_reader,
    unknown_words,
)

from ..models import TINY
from ..models.parts import stable_diffusion, tokenizer


class Calls:
    def __call__(self, prompt, num_inference_steps=4, max_sequence_length=512, height=None):
        pass


class Wrapped(Calls):
    """As a subclass with its own defaults is written."""

    def __call__(self, prompt=None, **kwargs):
        return super().__call__(prompt, **({"num_inference_steps": 3} | kwargs))


def test_call_defaults_look_through_keyword_arguments():
    assert call_defaults(Wrapped())["num_inference_steps"] == 4
    flux = TINY["flux"].build_pipeline()
    assert call_defaults(flux)["num_inference_steps"] == 28
    assert "callback_on_step_end" in call_defaults(type("Mine", (FluxPipeline,), {})(**flux.components))


def test_size_multiples():
    """The VAE halves here; PixArt's and FLUX's tokens are 2 x 2 latents."""
    multiples = {name: size_multiple(tiny.build_pipeline()) for name, tiny in TINY.items()}
    known = {"unet-sd15": 2, "unet-sdxl": 2, "pixart": 4, "flux": 4}
    assert {name: multiples[name] for name in known} == known


def flux(sample_size, default=128, factor=8):
    """FluxPipeline with a VAE that says so; None for one without such a setting."""
    pipe = TINY["flux"].build_pipeline()
    config = SimpleNamespace() if sample_size is None else SimpleNamespace(sample_size=sample_size)
    parts = SimpleNamespace(vae=SimpleNamespace(config=config))
    pipe.__dict__.update(vars(parts), default_sample_size=default, vae_scale_factor=factor)
    return pipe


@pytest.mark.parametrize(
    ("sample_size", "made"),
    [(256, 256), (512, 512), (1024, None), (2048, None), (None, None), (250, None), ([256, 256], None)],
)
def test_what_a_flux_was_made_for(sample_size, made):
    """Only what is smaller than FluxPipeline's 1024 and can be drawn: 250 is no multiple of 16."""
    assert made_for(flux(sample_size)) == made


def test_other_pipelines_know_their_size():
    assert made_for(stable_diffusion()) is None  # though its VAE's sample_size is 64


def test_limits():
    pipe = Calls()
    pipe.size_limits = (16, 64)
    check_pipeline(pipe, 16), check_pipeline(pipe, 64), check_pipeline(pipe, None)
    for size in (8, 72):
        with pytest.raises(ValueError, match=f"^--size must be between 16 and 64 pixels for this model, got {size}"):
            check_pipeline(pipe, size, prefix="--")


class T5EncoderModel:
    pass


class CLIPTextModel:
    pass


class Qwen3Model:
    pass


def pipe(encoders, lengths):
    built = Calls()
    for suffix, encoder, length in zip(("", "_2", "_3"), encoders, lengths, strict=False):
        setattr(built, f"text_encoder{suffix}", encoder and encoder())
        setattr(built, f"tokenizer{suffix}", encoder and SimpleNamespace(model_max_length=length))
    return built


@pytest.mark.parametrize(
    ("encoders", "lengths", "which", "tokens", "t5"),
    [
        ([CLIPTextModel, T5EncoderModel], [77, 16], "tokenizer_2", 16, True),  # FLUX
        ([CLIPTextModel, T5EncoderModel], [77, 10**30], "tokenizer_2", 512, True),
        ([CLIPTextModel, CLIPTextModel, T5EncoderModel], [77, 77, 256], "tokenizer_3", 256, True),  # SD 3
        ([CLIPTextModel, CLIPTextModel, None], [77, 77, None], "tokenizer", 77, False),  # and without its T5
        ([T5EncoderModel], [120], "tokenizer", 120, True),  # PixArt
        ([CLIPTextModel], [77], "tokenizer", 77, False),
    ],
)
def test_who_reads_the_prompt(encoders, lengths, which, tokens, t5):
    built = pipe(encoders, lengths)
    assert text_reader(built) == Reader(getattr(built, which), tokens, t5)


def test_language_models_frame_the_prompt():
    """A CLIP beside one (Kandinsky 5) must not set its length."""
    assert text_reader(pipe([Qwen3Model, CLIPTextModel], [10**6, 77])) is None


def test_unknown_and_cut_words():
    """8 tokens, the last of them the end."""
    words = tokenizer()
    assert unknown_words(words, "red zorp, apple") == ["zorp", ","]
    assert unknown_words(words, "red apple") == []
    reader = Reader(words, 8, t5=True)
    assert cut_text(reader, "red " * 7) == ""
    assert cut_text(reader, "red " * 7 + "green apple ") == "green apple"
    assert cut_text(Reader(words, 4, t5=True), "red red red green") == "green"
    slow = SimpleNamespace(is_fast=False, num_special_tokens_to_add=lambda: 1, unk_token_id=2)
    assert unknown_words(slow, "zorp") == [] and cut_text(Reader(slow, 8, t5=False), "red " * 9) == ""
