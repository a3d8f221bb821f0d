"""Stage 2: flow matching, the denoiser and its text encoders together."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from linfusion.demos.emoji.data import EmojiData
from linfusion.demos.emoji.loop import Length, Run, operations
from linfusion.demos.emoji.models import Denoiser, Rotary
from linfusion.demos.emoji.optim import build_optimizers
from linfusion.demos.emoji.text import EOS_ID, MAX_TOKENS, PAD_ID, UNKNOWN_ID, tokenize

DROP_CAPTION = 0.1  # for guidance
DROP_WORD = 0.01  # so that unknown words mean "anything" rather than nothing in particular


class Examples:
    """Draws training examples on the device, with no wait for the host.

    Args:
        data: pictures and captions.
        latents: as the denoiser takes them, `[N, ...]`.
        times: from a batch size and a generator to the times `[B]` of its noise.
    """

    def __init__(
        self,
        data: EmojiData,
        latents: torch.Tensor,
        tokenizer: PreTrainedTokenizerFast,
        times: Callable[[int, torch.Generator], torch.Tensor] | None = None,
    ):
        self.device, self.latents, self.times = latents.device, latents, times or draw_times
        self.ids = tokenize(tokenizer, data.captions).to(self.device)
        self.edges = data.sampling_weights().to(self.device).cumsum(0)
        self.empty = torch.full((MAX_TOKENS,), PAD_ID, device=self.device)
        self.empty[0] = EOS_ID

    def draw(self, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Indices `[B]`, times `[B]` and noise `[B, ...]`."""
        uniform = torch.rand(batch, generator=generator, device=self.device)
        index = torch.searchsorted(self.edges, uniform).clamp(max=len(self.edges) - 1)
        noise = torch.randn((batch, *self.latents.shape[1:]), generator=generator, device=self.device)
        return index, self.times(batch, generator), noise

    def captions(self, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Token ids `[B, 16]`, some captions and a few words dropped."""
        ids = self.ids[index]
        lost = torch.rand(ids.shape, generator=generator, device=self.device) < DROP_WORD
        ids = torch.where(lost & (ids > UNKNOWN_ID), UNKNOWN_ID, ids)
        return torch.where(self.dropped(len(index), generator)[:, None], self.empty, ids)

    def dropped(self, batch: int, generator: torch.Generator) -> torch.Tensor:
        """Which examples lose their caption, `[B]`."""
        return torch.rand(batch, generator=generator, device=self.device) < DROP_CAPTION


def draw_times(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Times `[B]` in (0, 1), one in each of B equal quantiles, which lowers the variance of the loss.

    85 % logit-normal around 0.65 (half of the sampler's steps lie above 0.62) and 15 % uniform: which picture it will
    be is decided in the first, noisiest steps, which a plain logit-normal all but leaves out.
    """
    device = generator.device
    rank = torch.arange(batch, device=device) + torch.rand(batch, generator=generator, device=device)
    quantile = (rank / batch).clamp(1e-4, 1 - 1e-4)
    normal = math.sqrt(2) * torch.erfinv(2 * quantile - 1)
    plain = torch.rand(batch, generator=generator, device=device) < 0.15
    return torch.where(plain, quantile, torch.sigmoid(0.6 + 1.2 * normal))


def coarse_times(times: torch.Tensor) -> torch.Tensor:
    """The times as the denoiser is told them: every second one rounded as a pipeline in bf16 would."""
    told = times.clone()
    told[::2] = told[::2].bfloat16().float()
    return told


def one_forward(denoiser: Denoiser, rotary: Rotary) -> Callable[[], torch.Tensor]:
    """A function that runs one example."""
    device = rotary[0].device
    tokens, channels = denoiser.sizes.grid**2, denoiser.transformer.config.in_channels
    one, ids = torch.ones(1, device=device), torch.full((1, MAX_TOKENS), EOS_ID, device=device)
    return lambda: denoiser(torch.zeros(1, tokens, channels, device=device), one, one, ids, rotary)


def train_flow(
    denoiser: Denoiser,
    examples: Examples,
    folder: Path,
    length: Length,
    batch: int = 256,
    compile: bool = False,
    bf16: bool = False,
    report: Callable[[], str] | None = None,
    **limits,
) -> bool:
    """Train `denoiser` in place on velocity prediction at guidance 1; False where a limit ended the run early."""
    device = examples.device
    run = Run("flow", denoiser, build_optimizers(denoiser, 2e-3, 1e-3), folder, length, averaging=0.9995)
    rotary = denoiser.rotary(device)
    velocity: Callable = torch.compile(denoiser.velocity, dynamic=False) if compile else denoiser.velocity
    encode: Callable = torch.compile(denoiser.encode, dynamic=False) if compile else denoiser.encode
    guidance = torch.ones(batch, device=device)

    def loss(generator: torch.Generator) -> torch.Tensor:
        index, times, noise = examples.draw(batch, generator)
        clean, mix = examples.latents[index], times[:, None, None]
        noisy = torch.lerp(clean, noise, mix)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            text, pooled = encode(examples.captions(index, generator))
            predicted = velocity(noisy, coarse_times(times), guidance, text, pooled, rotary)
        return F.mse_loss(predicted.float(), noise - clean)

    if not run.finished:
        run.train(loss, report=report, work=operations(one_forward(denoiser, rotary), batch), **limits)
    return run.finish()
