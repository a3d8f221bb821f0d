"""Stage 3: guidance distillation. One forward of the student equals the teacher's guided pair (arXiv:2210.03142)."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F

from linfusion.demos.emoji.flow import Examples, coarse_times, one_forward
from linfusion.demos.emoji.loop import Length, Run, operations
from linfusion.demos.emoji.models import Denoiser
from linfusion.demos.emoji.optim import build_optimizers

SCALES = (1.0, 5.0)


@torch.no_grad()
def encode_captions(denoiser: Denoiser, ids: torch.Tensor, batch: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Text features `[N, 16, width]` and pooled `[N, width]` of token ids `[N, 16]`."""
    text, pooled = zip(*(denoiser.encode(part) for part in ids.split(batch)), strict=True)
    return torch.cat(text), torch.cat(pooled)


def train_guidance(
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
    """Turn the flow model `denoiser` into its guided student, in place; False where a limit ended the run early.

    The text encoders stay as they are, so their features are computed once. The last row of them is the empty caption.
    """
    device = examples.device
    teacher = deepcopy(denoiser.transformer).requires_grad_(False)
    teacher = _as_denoiser(denoiser, teacher)
    denoiser.requires_grad_(False)
    denoiser.transformer.requires_grad_(True)
    optimizers = build_optimizers(denoiser, 3e-4, 5e-4)
    run = Run("guidance", denoiser, optimizers, folder, length, averaging=0.998, seed=1)
    rotary = denoiser.rotary(device)
    texts, pools = encode_captions(denoiser, torch.cat([examples.ids, examples.empty[None]]))
    one = torch.ones(batch, device=device)
    student: Callable = torch.compile(denoiser.velocity, dynamic=False) if compile else denoiser.velocity
    target: Callable = torch.compile(teacher.velocity, dynamic=False) if compile else teacher.velocity

    def loss(generator: torch.Generator) -> torch.Tensor:
        index, times, noise = examples.draw(batch, generator)
        noisy = torch.lerp(examples.latents[index], noise, times[:, None, None])
        index = torch.where(examples.dropped(batch, generator), len(texts) - 1, index)
        scale = torch.empty(batch, device=device).uniform_(*SCALES, generator=generator)
        told = coarse_times(times)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                given = target(noisy, told, one, texts[index], pools[index], rotary).float()
                empty = texts[-1:].expand(batch, -1, -1).contiguous(), pools[-1:].expand(batch, -1).contiguous()
                free = target(noisy, told, one, *empty, rotary).float()
            guided = free + scale[:, None, None] * (given - free)
            predicted = student(noisy, told, scale, texts[index], pools[index], rotary)
        return F.mse_loss(predicted.float(), guided)

    if not run.finished:
        work = operations(one_forward(denoiser, rotary), batch) * 5 / 3  # and two forward passes of the teacher
        run.train(loss, report=report, work=work, **limits)
    return run.finish()


def _as_denoiser(like: Denoiser, transformer: torch.nn.Module) -> Denoiser:
    # shares the text encoders and is no child of `like`
    other = Denoiser.__new__(Denoiser)
    torch.nn.Module.__init__(other)
    other.sizes, other.transformer = like.sizes, transformer
    return other
