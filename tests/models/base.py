"""What a tiny host is, and what tests do with one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

import linfusion as lf

TEXT = 7
"""Text tokens of every sample."""


class Run(NamedTuple):
    """One kind of self-attention sequence in a host: a token grid, with so many tokens before and after it.

    Of those after it, `references` are reference pictures', which mechanisms see before it.
    """

    grid: tuple[int, ...]
    before: int = 0
    after: int = 0
    references: int = 0

    @property
    def tokens(self) -> int:
        return self.before + math.prod(self.grid) + self.after + self.references


@dataclass(frozen=True)
class Tiny:
    """A host to test on.

    Attributes:
        family: the class name that `linfusion.families()` lists.
        make: the model as its class initialises it.
        inputs: `(height, width) -> forward's arguments` for batch 2, in tokens of the finest attention grid.
        layers: how many self-attention layers it has.
        some: a pattern that picks some of them.
        pipeline: a pipeline around the model, without text encoders.
        draw: `(pipeline, guidance) -> latents` of two prompts; 1.0 turns the guidance batch (or second pass) off.
        rows: the batch that attention layers see; more than 2 where frames are pictures of their own.
        frames: of video hosts, whose grids are `(frames, height, width)`.
        square: hosts that take square grids only.
        runs: `grid -> the sequences of its self-attention layers`; by default the grid alone, behind `TEXT` tokens
            where the family is joint.
        masks: `(grid, inside) -> {length: mask}` for hosts whose samples differ in where their tokens stand.
    """

    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict]
    layers: int
    some: str
    pipeline: Callable[[nn.Module], DiffusionPipeline] | None = None
    draw: Callable[[DiffusionPipeline, float], Tensor] | None = None
    rows: int = 2
    frames: int | None = None
    square: bool = False
    runs: Callable[[tuple[int, ...]], list[Run]] | None = None
    masks: Callable[..., dict[int, Tensor]] | None = None

    def build(self) -> nn.Module:
        """A model in which attention matters: what each layer attends to decides much of the output."""
        torch.manual_seed(0)
        return lively(self.make()).eval()

    def build_pipeline(self) -> DiffusionPipeline:
        assert self.pipeline is not None
        pipe = self.pipeline(self.build())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def grid(self, height: int, width: int) -> tuple[int, ...]:
        """The token grid that `inputs(height, width)` makes."""
        return (height, width) if self.frames is None else (self.frames, height, width)

    def sequences(self, height: int, width: int) -> list[Run]:
        """Every kind of self-attention sequence in a forward of `inputs(height, width)`."""
        grid = self.grid(height, width)
        if self.runs is not None:
            return self.runs(grid)
        return [Run(grid, before=TEXT if lf.families()[self.family].joint else 0)]


def grids_for(tiny: Tiny, *grids: tuple[int, int]) -> list[tuple[int, int]]:
    """The grids a host can take; a square host gets a square one instead of those that are not."""
    return [g for g in grids if g[0] == g[1]] or [(6, 6)] if tiny.square else list(grids)


def lively(model: nn.Module) -> nn.Module:
    """Fresh hosts attend almost evenly and add almost nothing; here scores and outputs spread widely."""
    names = {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                nn.init.normal_(p, float(name.endswith("weight")), 0.2)
            elif any(part in name for part in (".to_q.", ".to_k.", "add_q_proj", "add_k_proj")):
                p.mul_(6)
            elif any(part in name for part in (".to_v.", "to_out", "add_v_proj", "to_add_out")):
                p.mul_(3)
            elif "to_qkv_mlp_proj" in name:  # q, k and v above the MLP's input
                width = p.shape[1]
                p[: 2 * width].mul_(6)
                p[2 * width : 3 * width].mul_(3)
            elif "norm1" in name and name.replace("weight", "bias") not in names:
                p.mul_(6)  # AuraFlow's gates, which no bias opens
            elif "controlnet_" in name and p.ndim == 2:  # starts at zero
                nn.init.normal_(p, 0.0, p.shape[1] ** -0.5)
    return model


def forward(model: nn.Module, inputs: dict) -> Tensor:
    """The host's output, without gradients."""
    with torch.no_grad():
        return whole(model(**inputs, return_dict=False))


def cast(x, dtype: torch.dtype):
    """Arguments of a forward in another dtype, `model.to(dtype)` to go with it."""
    if isinstance(x, dict):
        return {k: cast(v, dtype) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(cast(v, dtype) for v in x)
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def whole(out: tuple | list | Tensor) -> Tensor:
    """All that a host returns as one tensor: ControlNets return many, Z-Image one a sample."""
    parts = flat(out)
    if len(parts) == 1:
        return parts[0]
    same = len({p.shape for p in parts}) == 1
    return torch.stack(parts) if same else torch.cat([p.flatten(1) for p in parts], dim=1)


def flat(out: tuple | list | Tensor) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [p for part in out for p in flat(part)]


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, against the largest value of `b`. Rounding stays under 1e-5, mistakes go over 1e-2."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


class Quantised(nn.Module):
    """A projection that can only be called, as quantised layers are; asking for its weight is a mistake."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("packed", linear.weight.detach().to(torch.float64))
        self.register_buffer("offset", None if linear.bias is None else linear.bias.detach())

    @property
    def weight(self):
        raise RuntimeError("packed: there is no weight to read")

    bias = in_features = out_features = weight

    def forward(self, x):
        return nn.functional.linear(x, self.packed.to(x.dtype), self.offset)


def processors(model: nn.Module) -> dict[str, object]:
    """Every attention layer's processor, cross-attention included."""
    return {name: m.processor for name, m in model.named_modules() if hasattr(m, "set_processor")}


def padded_text() -> Tensor:
    """`[2, TEXT]` bool: all of the first prompt, the first three tokens of the second."""
    return torch.arange(TEXT) < torch.tensor([[TEXT], [3]])


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vae() -> AutoencoderKL:
    """Halves the size; four latent channels."""
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
        mid_block_add_attention=False, scaling_factor=1.0, shift_factor=0.0,
    ).eval()  # fmt: skip


def ddim() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, steps_offset=1)


def two_steps(pipe: DiffusionPipeline, **arguments) -> Tensor:
    """The latents after two steps; Z-Image hands over one of each sample."""
    generator = torch.Generator().manual_seed(0)
    out = pipe(**{"num_inference_steps": 2} | arguments, generator=generator, output_type="latent")[0]
    return out if isinstance(out, Tensor) else torch.stack(list(out))


def draw(pipe: DiffusionPipeline, channels: int, **arguments) -> Tensor:
    """Two steps on a grid that is not square, for two prompts given as embeddings."""
    arguments |= {
        "prompt_embeds": noise(2, TEXT, channels, seed=2), "negative_prompt_embeds": noise(2, TEXT, channels, seed=3)
    }  # fmt: skip
    here = pipe._execution_device
    arguments = {name: x.to(here) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    return two_steps(pipe, **arguments)
