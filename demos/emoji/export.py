"""Trained modules to an ordinary diffusers folder, in bf16 safetensors."""

import json
import os
import shutil
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from linfusion.demos.emoji.models import Denoiser, Sizes, build_ddim, build_scheduler, build_unet

# the class that is there in transformers 4 and 5; 5 would write its own new name for it
_TOKENIZER_CLASS = "PreTrainedTokenizerFast"


def build_flux(denoiser: Denoiser, vae: AutoencoderKL, tokenizer: PreTrainedTokenizerFast) -> FluxPipeline:
    """The modules as a FluxPipeline; both text encoders share one tokenizer."""
    return FluxPipeline(
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=denoiser.text_encoder_2,
        tokenizer_2=deepcopy(tokenizer),
        transformer=denoiser.transformer,
    )


def build_stable_diffusion(
    sizes: Sizes, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: PreTrainedTokenizerFast
) -> StableDiffusionPipeline:
    """A new UNet between parts that exist."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=build_unet(sizes),
        scheduler=build_ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(pipe: DiffusionPipeline, folder: Path) -> Path:
    """Write `folder` so that the class of `pipe` opens it; an older one is replaced whole."""
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    pipe = deepcopy(pipe)  # the cast to bf16 is for the files alone
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.bfloat16().to("cpu", memory_format=torch.contiguous_format)
    pipe.save_pretrained(part, safe_serialization=True)
    tokenizers = [path.name for path in part.glob("tokenizer*")]
    entries = {name: ["transformers", _TOKENIZER_CLASS] for name in tokenizers}
    _edit(part / "model_index.json", lambda index: {**index, **entries})
    for name in tokenizers:
        _edit(part / name / "tokenizer_config.json", lambda config: {**config, "tokenizer_class": _TOKENIZER_CLASS})
    for path in part.glob("text_encoder*"):
        # transformers 5 loads in this dtype when asked for none, diffusers in fp32: the two must agree
        _edit(path / "config.json", lambda config: {**config, "dtype": "float32"})
    # transformers 5 dropped this prefix of CLIP's parameters but still reads it; 4 needs it
    clip = part / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(clip).items()}
    save_file(weights, clip, metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    return folder


def _edit(path: Path, change) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text())), indent=2) + "\n")
