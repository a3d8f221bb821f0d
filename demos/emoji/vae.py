"""Stage 1: the autoencoder, on whole pictures."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from linfusion.demos.emoji.data import EmojiData
from linfusion.demos.emoji.loop import Length, Run
from linfusion.demos.emoji.models import Sizes, build_vae
from linfusion.demos.emoji.optim import adamw

# nats an element: small enough to leave the error alone, large enough that useless latent channels fall silent
KL_WEIGHT = 1e-4


class Reconstruct(nn.Module):
    """Encode, draw from the posterior with the given noise, decode."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures `[B, 3, H, W]` to their copies and the mean divergence of a latent element in nats."""
        posterior = self.vae.encode(pixels).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        copies = self.vae.decode(mean + torch.exp(0.5 * logvar) * noise).sample
        return copies, 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()


def train_vae(
    data: EmojiData,
    sizes: Sizes,
    folder: Path,
    length: Length,
    batch: int = 32,
    compile: bool = False,
    bf16: bool = False,
    **limits,
) -> AutoencoderKL | None:
    """Train the autoencoder to reproduce `data`; None where a limit ended the run early.

    Mostly squared error, which is what PSNR measures; a little L1 on pixels and their differences keeps edges clean.
    """
    device = data.images.device
    vae = build_vae(sizes).to(device, memory_format=torch.channels_last)
    run = Run("vae", vae, [adamw(list(vae.parameters()), 1.5e-3)], folder, length, averaging=0.998)
    reconstruct: Callable = torch.compile(Reconstruct(vae), dynamic=False) if compile else Reconstruct(vae)
    latent = (batch, sizes.latent_channels, sizes.image // 8, sizes.image // 8)

    def loss(generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(data), (batch,), generator=generator, device=device)
        pixels = data.pixels(index)
        # mirrored pictures are pictures too; only the denoiser must not see them (captions say left and right)
        flip = torch.rand(batch, 1, 1, 1, generator=generator, device=device) < 0.5
        pixels = torch.where(flip, pixels.flip(3), pixels).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(latent, generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            copies, divergence = reconstruct(pixels, noise)
        error = copies.float() - pixels
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.square().mean() + 0.05 * (error.abs().mean() + edges) + KL_WEIGHT * divergence

    if not run.finished:
        run.train(loss, report=lambda: f"PSNR {psnr(vae, data, range(0, len(data), 16)):.2f} dB", reports=4, **limits)
    return vae.eval().requires_grad_(False) if run.finish() else None


@torch.no_grad()
def encode_all(vae: AutoencoderKL, data: EmojiData, batch: int = 64) -> torch.Tensor:
    """Posterior means `[N, C, h, w]` of every picture, not normalised."""
    return torch.cat(
        [vae.encode(data.pixels(slice(i, i + batch))).latent_dist.mean for i in range(0, len(data), batch)]
    )


def set_normalisation(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Write the shift and scale that give `latents` mean 0 and deviation 1 into the autoencoder's config."""
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def normalise_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the denoiser sees them; FluxPipeline undoes this before it decodes."""
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def psnr(vae: AutoencoderKL, data: EmojiData, pictures: range | None = None, batch: int = 64) -> float:
    """PSNR in dB of the copies of `pictures` (all by default), from the mean squared error over all of them."""
    index = torch.tensor(list(pictures or range(len(data))), device=data.images.device)
    total = 0.0
    for part in index.split(batch):
        pixels = data.pixels(part)
        copies = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        total += F.mse_loss(copies, pixels, reduction="sum").item()
    return 10 * math.log10(4 * len(index) * data.images[0].numel() / total)
