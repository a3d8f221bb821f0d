"""The stage of `emoji-unet`: a UNet in emoji-flux's latents, told by its CLIP, both of which stay as they are."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

from linfusion.demos.emoji.data import EmojiData
from linfusion.demos.emoji.flow import Examples
from linfusion.demos.emoji.loop import Length, Run, operations
from linfusion.demos.emoji.optim import build_optimizers
from linfusion.demos.emoji.vae import encode_all

LEVELS = 1000
NOISE_ALONE = 0.04  # share of examples at the last step, which every picture starts from


def draw_steps(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Steps of the schedule `[B]`, int64: spread evenly, so that the loss varies little, with more at the last one.

    The schedule's median noise is that of the flow model's sampler, so nothing else needs to lean to one end.
    """
    device = generator.device
    rank = torch.arange(batch, device=device) + torch.rand(batch, generator=generator, device=device)
    return (rank / batch * (LEVELS / (1 - NOISE_ALONE))).long().clamp(max=LEVELS - 1)


def latents_of(vae: AutoencoderKL, data: EmojiData) -> torch.Tensor:
    """Latents `[N, C, h, w]` as StableDiffusionPipeline decodes them: scaled, but never shifted."""
    return encode_all(vae, data) * vae.config.scaling_factor


@torch.no_grad()
def whiten_text(unet: UNet2DConditionModel, tokens: torch.Tensor) -> None:
    """Let the layers that read text begin as the map that gives `tokens` `[N, width]` equal variance everywhere.

    This CLIP only had to sum captions up for emoji-flux, and tells skin tones, over half of the pictures, apart by a
    ninth of its tokens' spread; whitened, by a quarter.
    """
    tokens = tokens.double()
    mean, (values, axes) = tokens.mean(0), torch.linalg.eigh(torch.cov(tokens.T))
    # the floor leaves directions alone in which there is nothing but rounding
    weight = axes * (values + 1e-3 * values.mean()).rsqrt() @ axes.T
    for layer in (unet.encoder_hid_proj, unet.add_embedding.pool.v_proj):
        layer.weight.copy_(weight)
        layer.bias.copy_(-weight @ mean)


def train_unet(
    pipe: StableDiffusionPipeline,
    examples: Examples,
    folder: Path,
    length: Length,
    batch: int = 256,
    compile: bool = False,
    bf16: bool = False,
    report: Callable[[], str] | None = None,
    **limits,
) -> bool:
    """Train `pipe.unet` in place to predict v = a noise - b picture, where a^2 + b^2 = 1 are the schedule's.

    Returns:
        False where a limit ended the run early.
    """
    device, unet = examples.device, pipe.unet.to(memory_format=torch.channels_last)
    pipe.text_encoder.requires_grad_(False)
    run = Run("unet", unet, build_optimizers(unet, 2e-3, 1e-3), folder, length, averaging=0.9995)
    predict: Callable = torch.compile(unet, dynamic=False) if compile else unet
    encode: Callable = torch.compile(pipe.text_encoder, dynamic=False) if compile else pipe.text_encoder
    alphas = pipe.scheduler.alphas_cumprod.to(device)

    def loss(generator: torch.Generator) -> torch.Tensor:
        index, steps, noise = examples.draw(batch, generator)
        clean, signal = examples.latents[index], alphas[steps][:, None, None, None]
        a, b = signal.sqrt(), (1 - signal).sqrt()
        noisy = (a * clean + b * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                text = encode(examples.captions(index, generator))[0]
            predicted = predict(noisy, steps, text, return_dict=False)[0]
        return F.mse_loss(predicted.float(), a * noise - b * clean)

    def one() -> torch.Tensor:
        text = pipe.text_encoder(examples.empty[None])[0]
        return unet(examples.latents[:1], torch.zeros(1, device=device), text, return_dict=False)[0]

    if not run.finished:
        run.train(loss, report=report, work=operations(one, batch), **limits)
    return run.finish()
