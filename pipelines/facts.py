"""What a pipeline tells about itself: its call's defaults, its sizes, how much of a prompt it reads."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

SEEDS = 2**64


def call_defaults(pipe: Any) -> dict[str, Any]:
    """Arguments that the pipeline's call takes, with their defaults; `**kwargs` are those of the class above."""
    known: dict[str, Any] = dict(getattr(pipe, "defaults", {}))  # of an embedded model
    for cls in type(pipe).__mro__:
        if "__call__" not in vars(cls):
            continue
        parameters = inspect.signature(cls.__call__).parameters.values()
        for p in parameters:
            if p.kind is not p.VAR_KEYWORD:
                known.setdefault(p.name, p.default)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return known


def size_multiple(pipe: Any) -> int:
    """What height and width must be multiples of, in pixels: the VAE's factor times the denoiser's patch."""
    factor = getattr(pipe, "vae_scale_factor", 8)
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        return factor
    patch = getattr(transformer.config, "patch_size", None) or 1
    packs = "_pack_latents" in dir(type(pipe))  # FLUX-like pipelines fold 2 x 2 latents into a token themselves
    return factor * (2 if packs else int(patch))


def made_for(pipe: Any) -> int | None:
    """Height and width in pixels that a small FLUX was made for; None where the pipeline's own default may stand.

    FluxPipeline's default, 128 latents a side, is a constant of the class: right for FLUX.1, whatever model it holds.
    A model of smaller pictures can only say so in its VAE's `sample_size`.
    """
    from diffusers import FluxPipeline

    if not issubclass(type(pipe), FluxPipeline):
        return None
    size = getattr(getattr(pipe.vae, "config", None), "sample_size", None)
    if not isinstance(size, int) or not 0 < size < pipe.default_sample_size * pipe.vae_scale_factor:
        return None
    return size if size % size_multiple(pipe) == 0 else None


def native_size(pipe: Any) -> int | None:
    """Height and width in pixels that the model was made for, None where nothing tells."""
    if (own := made_for(pipe)) is not None:
        return own
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    size = getattr(pipe, "default_sample_size", None) or getattr(getattr(denoiser, "config", None), "sample_size", None)
    if isinstance(size, (list, tuple)):
        size = size[0]
    return size * getattr(pipe, "vae_scale_factor", 8) if isinstance(size, int) else None


@dataclass(frozen=True)
class Reader:
    """The tokenizer that reads the whole prompt, how many tokens of it count, and whether a T5 reads them."""

    tokenizer: Any
    tokens: int
    t5: bool


def text_reader(pipe: Any) -> Reader | None:
    """T5 where there is one, since a CLIP next to it gives one summary vector only; None for other language models.

    Those wrap the prompt in text of their own, so that tokens cannot be counted from here.
    """
    for suffix in ("_3", "_2", ""):
        tokenizer = getattr(pipe, f"tokenizer{suffix}", None)
        if tokenizer is None or "T5" not in type(getattr(pipe, f"text_encoder{suffix}", None)).__name__:
            continue
        default = call_defaults(pipe).get("max_sequence_length")
        tokens = min(tokenizer.model_max_length, default) if isinstance(default, int) else tokenizer.model_max_length
        return Reader(tokenizer, tokens, t5=True)
    if type(getattr(pipe, "text_encoder", None)).__name__.startswith("CLIPTextModel"):
        return Reader(pipe.tokenizer, pipe.tokenizer.model_max_length, t5=False)
    return None


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """Parts of `prompt` that the tokenizer has no token for."""
    return [prompt[a:b].strip() for token, (a, b) in _tokens(tokenizer, prompt) if token == tokenizer.unk_token_id]


def cut_text(reader: Reader, prompt: str) -> str:
    """The end of `prompt` that does not fit, empty when all of it does."""
    tokens = _tokens(reader.tokenizer, prompt)
    room = reader.tokens - reader.tokenizer.num_special_tokens_to_add()
    return prompt[tokens[room][1][0] :].strip() if len(tokens) > room else ""


def _tokens(tokenizer: Any, prompt: str) -> list[tuple[int, tuple[int, int]]]:
    """Each token's id and where in `prompt` it stands; none for tokenizers in Python, which cannot tell that."""
    if not getattr(tokenizer, "is_fast", False):
        return []
    read = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    return list(zip(read["input_ids"], read["offset_mapping"], strict=True))


def check_request(
    prompt: str, size: int | None, steps: int | None, guidance: float | None, seed: int, *, prefix: str = ""
) -> None:
    """ValueError for what no pipeline can draw; `prefix` stands before the argument's name."""
    if not prompt.strip():
        raise ValueError("The prompt is empty; say what to draw.")
    if size is not None and size < 1:
        raise ValueError(f"{prefix}size must be positive, got {size}.")
    if steps is not None and steps < 1:
        raise ValueError(f"{prefix}steps must be at least 1, got {steps}.")
    if guidance is not None and not 0 <= guidance < math.inf:
        raise ValueError(f"{prefix}guidance must be finite and not negative, got {guidance}.")
    if not 0 <= seed < SEEDS:
        raise ValueError(f"{prefix}seed must be between 0 and 2**64 - 1, got {seed}.")


def check_pipeline(pipe: Any, size: int | None, *, prefix: str = "") -> None:
    """NotImplementedError for a pipeline that makes videos, ValueError for a size that this one cannot draw."""
    if "num_frames" in call_defaults(pipe):
        raise NotImplementedError(
            f"generate draws one picture, and {type(pipe).__name__} makes videos. In Python: "
            "linfusion.apply(pipe, ...), call the pipeline, and save the frames with diffusers.utils.export_to_video."
        )
    if size is None:
        return
    low, high = getattr(pipe, "size_limits", (1, math.inf))
    if not low <= size <= high:
        raise ValueError(f"{prefix}size must be between {low} and {high} pixels for this model, got {size}.")
    if size % (multiple := size_multiple(pipe)):
        raise ValueError(f"{prefix}size must be a multiple of {multiple} pixels for this model, got {size}.")


def remarks(pipe: Any, prompt: str, size: int | None = None, guidance: float | None = None) -> list[str]:
    """What can be drawn, but not as asked."""
    found = []
    reader = text_reader(pipe)
    if reader is not None:
        if unknown := unknown_words(reader.tokenizer, prompt):
            found.append(f"The model does not know: {', '.join(unknown)}.")
        if cut := cut_text(reader, prompt):
            room = reader.tokens - reader.tokenizer.num_special_tokens_to_add()
            found.append(f"The prompt is too long, only its first {room} tokens (words, or parts) count. Cut: {cut}")
    own = made_for(pipe)
    if own is not None and size not in (None, own):
        found.append(f"The model was made for {own} x {own} pixels; at other sizes it repeats or smears things.")
    low, high = getattr(pipe, "guidance_range", (0, math.inf))
    if guidance is not None and not low <= guidance <= high:
        found.append(f"The model learned guidance from {low:g} to {high:g}; {guidance:g} is outside.")
    return found
