"""Latents as pictures: from a pipeline's own form to `[B, C, h, w]` and back, to pixels and back, and their scales."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def unpack(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """A pipeline's latents for `size` (height, width in pixels) as `[B, C, h, w]`.

    Raises:
        NotImplementedError: a form that is neither a picture nor packed as FLUX.1 and Qwen-Image do.
    """
    if latents.ndim == 3 and hasattr(pipe, "_unpack_latents"):
        latents = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
    if latents.ndim == 5 and latents.shape[2] == 1:
        latents = latents[:, :, 0]
    factor = pipe.vae_scale_factor
    if latents.ndim != 4 or latents.shape[2:] != (size[0] // factor, size[1] // factor):
        raise NotImplementedError(
            f"{type(pipe).__name__} holds latents {tuple(latents.shape)} for {size[0]} x {size[1]} pixels; only "
            "pictures and FLUX-like packed latents can be brought to another size."
        )
    return latents


def pack(pipe: Any, latents: Tensor, like: Tensor) -> Tensor:
    """`[B, C, h, w]` in the form, dtype and place of `like`, latents of the pipeline's own."""
    if like.ndim == 3:
        latents = pipe._pack_latents(latents, *latents.shape)
    return latents.reshape(like.shape).to(like)


def to_vae(vae: Any, latents: Tensor) -> Tensor:
    """From the denoiser's scale to the VAE's, `[B, C, h, w]`."""
    scale, shift = _affine(vae, latents)
    return latents * scale + shift


def from_vae(vae: Any, latents: Tensor) -> Tensor:
    """From the VAE's scale to the denoiser's, `[B, C, h, w]`."""
    scale, shift = _affine(vae, latents)
    return (latents - shift) / scale


def _affine(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Each VAE has some of: one factor, one shift, a mean and a deviation for each channel."""
    config = vae.config
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    scale = latents.new_tensor(1.0 if std is None else std).view(-1, 1, 1)
    shift = latents.new_tensor((getattr(config, "shift_factor", None) or 0.0) if mean is None else mean).view(-1, 1, 1)
    return scale / (getattr(config, "scaling_factor", None) or 1.0), shift


def resize(latents: Tensor, size: tuple[int, int]) -> Tensor:
    """`[B, C, h, w]` at another size: bicubic upwards, averaged over areas downwards."""
    if size[0] <= latents.shape[2] and size[1] <= latents.shape[3]:
        return F.interpolate(latents, size, mode="area")
    return F.interpolate(latents.float(), size, mode="bicubic").to(latents.dtype)


def coarse(latents: Tensor, size: tuple[int, int]) -> Tensor:
    """What a grid of `size` can hold of `[B, C, h, w]`, at full size: down and up again."""
    return resize(resize(latents, size), (latents.shape[2], latents.shape[3]))


def dct_matrix(n: int, device: torch.device | str = "cpu") -> Tensor:
    """The orthonormal DCT-II, `[n, n]` in float64: `x -> dct_matrix(n) @ x`."""
    k = torch.arange(n, dtype=torch.float64, device=device)
    matrix = torch.cos(math.pi / n * (k[None] + 0.5) * k[:, None]) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def dct_resize(latents: Tensor, size: tuple[int, int], high: Tensor | None = None) -> Tensor:
    """`[B, C, h, w]` on a finer grid with the same spectrum: no frequency that it had changes its amplitude.

    Args:
        size: the finer grid's height and width.
        high: `[B, C, *size]`, whose frequencies above the coarse grid's are taken over; none by default.
    """
    h, w = latents.shape[2:]
    if size[0] < h or size[1] < w:
        raise ValueError(f"The finer grid {size} must not be smaller than {(h, w)}.")
    rows, columns = (dct_matrix(n, latents.device) for n in size)
    spectrum = dct_matrix(h, latents.device) @ latents.double() @ dct_matrix(w, latents.device).T
    spectrum = spectrum * math.sqrt(size[0] * size[1] / (h * w))
    if high is None:
        fine = F.pad(spectrum, (0, size[1] - w, 0, size[0] - h))
    else:
        fine = rows @ high.double() @ columns.T
        fine[:, :, :h, :w] = spectrum
    return (rows.T @ fine @ columns).to(latents.dtype)
