"""Measures: does a drawn picture land on the training picture that has its caption?"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from linfusion.demos.emoji.data import EmojiData, load_data
from linfusion.demos.emoji.flow import Examples
from linfusion.demos.emoji.models import Denoiser, build_scheduler, unpack
from linfusion.demos.emoji.text import normalise

THUMBNAIL = 32


def thumbnails(pixels: torch.Tensor) -> torch.Tensor:
    """Pictures `[B, 3, H, W]` in [-1, 1] as vectors `[B, 3 * 32 * 32]`."""
    return F.adaptive_avg_pool2d(pixels.float(), THUMBNAIL).flatten(1)


def data_thumbnails(data: EmojiData, batch: int = 256) -> torch.Tensor:
    """`thumbnails` of every picture of `data`."""
    return torch.cat([thumbnails(data.pixels(slice(i, i + batch))) for i in range(0, len(data), batch)])


def choose_captions(data: EmojiData, count: int, seed: int = 0) -> list[str]:
    """`count` different captions, uniformly at random."""
    captions = sorted(set(data.captions))
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed))
    return [captions[i] for i in order[:count].tolist()]


def retrieved(drawn: torch.Tensor, captions: list[str], reference: torch.Tensor, names: list[str]) -> list[bool]:
    """Whether the picture nearest to each drawn one has its caption.

    Some flags are one picture under two names; where several pictures are exactly as near, any of them counts.

    Args:
        drawn: `thumbnails` of the pictures drawn for `captions`.
        reference: `thumbnails` of the pictures that are called `names`.
    """
    found = []
    for part, wanted in zip(drawn.split(128), _chunks(captions, 128), strict=True):
        # not by a matrix product, whose rounding would tell equal pictures apart
        distance = torch.cdist(part, reference, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distance <= distance.min(dim=1, keepdim=True).values
        for row, caption in zip(nearest.cpu(), wanted, strict=True):
            found.append(any(names[i] == caption for i in row.nonzero().flatten().tolist()))
    return found


def draw(
    pipe: DiffusionPipeline,
    captions: list[str],
    guidance: float = 3.0,
    steps: int = 28,
    seed: int = 0,
    batch: int = 32,
) -> torch.Tensor:
    """Pictures `[N, 3, H, W]` in [-1, 1] by the sampler of an embedded pipeline."""
    pipe.set_progress_bar_config(disable=True)
    size, device = pipe.vae.config.sample_size, pipe._execution_device
    parts = []
    for start in range(0, len(captions), batch):
        pictures = pipe(
            captions[start : start + batch],
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator(device).manual_seed(seed + start),
            output_type="pt",
        ).images
        parts.append(pictures.float() * 2 - 1)
    return torch.cat(parts)


def top_1(source: str | Path, device: str = "cpu") -> Callable[[torch.Tensor, Sequence[str]], float]:
    """The same share for any pictures `[N, 3, H, W]` in [0, 1] and their captions; `source` as `load_data` takes it."""
    data = load_data(source)
    reference = data_thumbnails(data).to(device)

    def measure(pictures: torch.Tensor, captions: Sequence[str]) -> float:
        wanted = [normalise(caption) for caption in captions]
        return float(np.mean(retrieved(thumbnails(pictures * 2 - 1).to(device), wanted, reference, data.captions)))

    return measure


def retrieval(pipe: DiffusionPipeline, data: EmojiData, captions: list[str], **settings) -> float:
    """Share of `captions` whose drawn picture is nearest to a training picture with that caption."""
    drawn = thumbnails(draw(pipe, captions, **settings))
    return float(np.mean(retrieved(drawn, captions, data_thumbnails(data), data.captions)))


@torch.no_grad()
def draw_in_training(
    denoiser: Denoiser,
    vae: torch.nn.Module,
    ids: torch.Tensor,
    empty: torch.Tensor,
    guidance: float,
    distilled: bool,
    bf16: bool = False,
    steps: int = 28,
    seed: int = 0,
) -> torch.Tensor:
    """Pictures for token ids `[B, 16]` with weights in training; the guided pair of forwards unless `distilled`."""
    device, grid = ids.device, denoiser.sizes.grid
    scheduler = build_scheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=calculate_shift(grid**2), device=device)
    noise = torch.Generator(device).manual_seed(seed)
    channels = denoiser.transformer.config.in_channels
    latents = torch.randn(len(ids), grid**2, channels, generator=noise, device=device)
    rotary = denoiser.rotary(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        text, pooled = denoiser.encode(ids if distilled else torch.cat([ids, empty.expand_as(ids)]))
        scale = torch.full((len(text),), guidance if distilled else 1.0, device=device)
        for t in scheduler.timesteps:
            both = latents if distilled else latents.repeat(2, 1, 1)
            velocity = denoiser.velocity(both, (t / 1000).expand(len(both)), scale, text, pooled, rotary).float()
            if not distilled:
                given, free = velocity.chunk(2)
                velocity = free + guidance * (given - free)
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
        latents = unpack(latents, grid) / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(latents).sample.float()


def training_report(
    denoiser: Denoiser,
    vae: torch.nn.Module,
    data: EmojiData,
    examples: Examples,
    distilled: bool,
    bf16: bool = False,
    count: int = 128,
) -> Callable[[], str]:
    """A function for `Run.train(report=)`: retrieval over `count` captions at guidance 3."""
    captions = choose_captions(data, count)
    first = {caption: i for i, caption in reversed(list(enumerate(data.captions)))}
    ids = examples.ids[[first[caption] for caption in captions]]
    reference = data_thumbnails(data)

    def report() -> str:
        drawn = draw_in_training(denoiser, vae, ids, examples.empty, 3.0, distilled, bf16)
        found = retrieved(thumbnails(drawn), captions, reference, data.captions)
        return f"retrieval {100 * np.mean(found):.1f} % of {len(found)}"

    return report


def pipeline_report(
    pipe: DiffusionPipeline, data: EmojiData, bf16: bool = False, count: int = 128
) -> Callable[[], str]:
    """The same drawn by a whole pipeline that is in training."""
    captions = choose_captions(data, count)

    def report() -> str:
        with torch.autocast(pipe.device.type, torch.bfloat16, enabled=bf16):
            found = retrieval(pipe, data, captions, batch=count)
        return f"retrieval {100 * found:.1f} % of {len(captions)}"

    return report


def _chunks(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]
