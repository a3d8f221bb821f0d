"""Decode and encode pictures of any size, without seams and without a full-size copy in floats.

What `AutoencoderKL` computes, strip by strip (strips.py): the result equals the whole decode within rounding, since the
group norms see the whole picture. Up to `WHOLE` latents the attention in the middle does so too; above that, where its
cost grows with the square, each place attends to a window of `WINDOW x WINDOW` latents around it.

Other autoencoders (Qwen-Image's, tiny ones) decode as they do by themselves, with their own blended tiles.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .strips import Layer, Moments, Norms, Rows, Strips, whole_picture_norms
from .upsample import doubled

logger = logging.getLogger(__name__)

WINDOW, MARGIN = 256, 32  # latents; a window's middle is used, its margin only looked at
WHOLE = WINDOW**2
FUSE_BYTES = 2**33  # an upsampled activation above this is not kept but made anew for each pass over the next layer
WORK_BYTES = 2**32  # of the strips at work: several activations of `STRIP_BYTES` and what convolutions need
Sink = Callable[[int, Tensor], Any]


def decode(vae: Any, latents: Tensor) -> Image.Image:
    """The first picture of latents `[B, C, h, w]` in the VAE's scale, in 8 bits."""
    parts: list[np.ndarray] = []
    decode_rows(vae, latents[:1], lambda first, rows: parts.append(to_bytes(rows)))
    return Image.fromarray(np.concatenate(parts))


def to_bytes(rows: Tensor) -> np.ndarray:
    """`[1, 3, h, w]` in [-1, 1] to `[h, w, 3]` uint8."""
    pixels = (rows[0].float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
    return np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())


@torch.no_grad()
def decode_rows(vae: Any, latents: Tensor, sink: Sink, store: torch.device | str | None = None) -> None:
    """Decode latents and hand out the picture from top to bottom.

    Args:
        latents: `[B, C, h, w]` in the VAE's scale.
        sink: called with the first row's number and `[B, 3, rows, W]`, about [-1, 1].
        store: where activations wait, at most one of the picture's size with the last block's channels; None for the
            VAE's device if it fits there, else the CPU.
    """
    if not supported(vae):
        sink(0, _own_decode(vae, latents))
        return
    with _ready(vae) as (device, dtype), whole_picture_norms(vae.decoder) as norms:
        _run(_decoder_layers(vae, latents, dtype), latents, sink, norms, device, dtype, store)


@torch.no_grad()
def encode(vae: Any, image: Image.Image, store: torch.device | str | None = None) -> Tensor:
    """The mean latents `[1, C, h, w]` of a picture in RGB, in the VAE's scale."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
    if not supported(vae, encoder=True):
        return _own_encode(vae, pixels)
    parts: list[Tensor] = []
    with _ready(vae) as (device, dtype), whole_picture_norms(vae.encoder) as norms:
        _run(_encoder_layers(vae), pixels, lambda first, rows: parts.append(rows), norms, device, dtype, store)
    return torch.cat(parts, dim=2).chunk(2, dim=1)[0]


def supported(vae: Any, encoder: bool = False) -> bool:
    """Whether this is an `AutoencoderKL` of plain blocks, whose weights are in place."""
    if not any(cls.__name__ == "AutoencoderKL" for cls in type(vae).__mro__):
        return False
    blocks = vae.encoder.down_blocks if encoder else vae.decoder.up_blocks
    plain = ("DownEncoderBlock2D",) if encoder else ("UpDecoderBlock2D",)
    offloaded = any(p.is_meta for p in vae.parameters())
    return not offloaded and all(type(block).__name__ in plain for block in blocks)


def room_needed(vae: Any, latents: Tensor) -> int:
    """Bytes that decoding keeps: the largest activation, and some strips."""
    if not supported(vae):
        return 0
    dtype = next(vae.parameters()).dtype
    return _largest(_decoder_layers(vae, latents, dtype), latents, dtype) + WORK_BYTES


def _run(
    layers: list[Layer | nn.Module], x: Tensor, sink: Sink, norms: Norms, device: torch.device, dtype: torch.dtype,
    store: torch.device | str | None,
) -> None:  # fmt: skip
    free = _free(device)
    halves = [half for layer in layers for half in (layer.halves() if isinstance(layer, Residual) else [layer])]
    if store is None and _largest(halves, x, dtype) + WORK_BYTES < free:
        layers, store = halves, device
    elif store is None:
        store = device if _largest(layers, x, dtype) + WORK_BYTES < free else torch.device("cpu")
    strips, rows = Strips(norms, device, torch.device(store), dtype), Rows(x)
    for layer, after in zip(layers, layers[1:], strict=False):
        ahead = _first_norm(after)
        if isinstance(layer, Layer):
            rows = strips.layer(layer, rows, ahead, after.passed if isinstance(after, Layer) else 0)
        else:
            rows = Rows(_attend(layer, rows[0 : rows.height], norms, device, ahead))
    assert isinstance(layers[-1], Layer)
    strips.stream(layers[-1], rows, sink)


def _first_norm(layer: Layer | nn.Module) -> nn.GroupNorm | None:
    """The norm that the layer begins with; not where others stand before it."""
    if isinstance(layer, Layer):
        return layer.norms[0] if layer.norms and layer.up == layer.down else None
    norm: Any = layer.group_norm
    return norm


def _largest(layers: list[Layer | nn.Module], x: Tensor, dtype: torch.dtype) -> int:
    """Bytes of the largest activation that is kept."""
    area, sizes = x.shape[0] * x.shape[2] * x.shape[3], [0]
    for layer in layers[:-1]:
        if isinstance(layer, Layer):
            area = area * layer.up**2 // layer.down**2
            sizes.append(area * layer.channels * torch.finfo(dtype).bits // 8)
    return max(sizes)


def _free(device: torch.device) -> int:
    """Bytes that activations may take: what a GPU has left; on a CPU, where nothing tells, enough for 4096 pixels."""
    if device.type != "cuda":
        return 3 * WORK_BYTES
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _decoder_layers(vae: Any, latents: Tensor, dtype: torch.dtype) -> list[Layer | nn.Module]:
    decoder = vae.decoder
    layers: list[Layer | nn.Module] = [_first(decoder.conv_in, vae.post_quant_conv), *_middle(decoder.mid_block)]
    pixels = latents.shape[0] * latents.shape[2] * latents.shape[3]
    upsample: nn.Module | None = None  # one that has not become a layer yet
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            layers.append(_resnet(resnet) if upsample is None else _upsampled(upsample, resnet))
            upsample = None
        for upsampler in block.upsamplers or []:
            pixels, channels = 4 * pixels, upsampler.out_channels
            if pixels * channels * torch.finfo(dtype).bits // 8 > FUSE_BYTES:
                upsample = upsampler
            else:
                layers.append(Layer(doubled(upsampler), [], 2, channels, up=2))
    layers.append(_last(decoder))
    return layers


def _encoder_layers(vae: Any) -> list[Layer | nn.Module]:
    encoder = vae.encoder
    first = encoder.conv_in
    layers: list[Layer | nn.Module] = [Layer(lambda x: first(x / 127.5 - 1), [], 1, first.out_channels)]
    for block in encoder.down_blocks:
        layers += [_resnet(resnet) for resnet in block.resnets]
        layers += [Layer(d, [], 2, d.out_channels, down=2) for d in block.downsamplers or []]
    layers += _middle(encoder.mid_block)
    layers.append(_last(encoder, vae.quant_conv))
    return layers


def _first(conv: nn.Conv2d, before: nn.Module | None) -> Layer:
    return Layer(conv if before is None else lambda x: conv(before(x)), [], 1, conv.out_channels)


def _middle(block: Any) -> list[Layer | nn.Module]:
    layers: list[Layer | nn.Module] = [_resnet(block.resnets[0])]
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        layers += [_resnet(resnet)] if attention is None else [attention, _resnet(resnet)]
    return layers


@dataclass
class Residual(Layer):
    """A residual block. As one layer its first convolution is run twice, the first time for the norm after it."""

    block: Any = None

    def halves(self) -> list[Layer | nn.Module]:
        """As two layers, between which the block's input is kept beside the first convolution's output."""
        block, passed = self.block, self.block.in_channels

        def first(x: Tensor) -> Tensor:
            return torch.cat((x, block.conv1(block.nonlinearity(block.norm1(x)))), dim=1)

        def second(pair: Tensor) -> Tensor:
            x, hidden = pair[:, :passed], block.conv2(block.nonlinearity(block.norm2(pair[:, passed:])))
            x = x if block.conv_shortcut is None else block.conv_shortcut(x)
            return (x + hidden) / block.output_scale_factor

        return [
            Layer(first, [block.norm1], 2, passed + block.out_channels),
            Layer(second, [block.norm2], 2, block.out_channels, passed=passed),
        ]


def _resnet(resnet: Any) -> Layer:
    norms = [resnet.norm1, resnet.norm2]
    return Residual(lambda x: resnet(x, None), norms, 2, resnet.out_channels, block=resnet)


def _upsampled(upsample: Any, resnet: Any) -> Layer:
    norms, double = [resnet.norm1, resnet.norm2], doubled(upsample)
    return Layer(lambda x: resnet(double(x), None), norms, 2, resnet.out_channels, up=2)


def _last(part: Any, after: nn.Module | None = None) -> Layer:
    def run(x: Tensor) -> Tensor:
        x = part.conv_out(part.conv_act(part.conv_norm_out(x)))
        return x if after is None else after(x)

    return Layer(run, [part.conv_norm_out], 1, part.conv_out.out_channels)


def _attend(attention: Any, x: Tensor, norms: Norms, device: torch.device, ahead: nn.GroupNorm | None) -> Tensor:
    """The attention in the middle, with its residual: over everything, or in windows whose middles make the output."""
    height, width = x.shape[2:]
    if height * width <= WHOLE:
        out = attention(x.to(device).contiguous()).to(x)
    else:
        out = torch.empty_like(x)
        for top, rows in _windows(height):
            for left, columns in _windows(width):
                piece = attention(x[:, :, top : top + WINDOW, left : left + WINDOW].to(device).contiguous())
                piece = piece[:, :, rows.start - top :, columns.start - left :]
                out[:, :, rows, columns] = piece[:, :, : rows.stop - rows.start, : columns.stop - columns.start].to(x)
    del norms.known[attention.group_norm]
    if ahead is not None:
        moments = Moments(ahead.num_groups)
        for rows in out.to(device).split(64, dim=2):
            moments.add(rows)
        norms.known[ahead] = moments.affine(ahead)
    return out


def _windows(length: int) -> Iterator[tuple[int, slice]]:
    """Where a window begins and which places it is for; windows at the ends lie inside the picture."""
    step = WINDOW - 2 * MARGIN
    for first in range(0, length, step):
        start = max(0, min(first - MARGIN, length - WINDOW))
        yield start, slice(first, min(first + step, length))


@contextmanager
def _ready(vae: Any) -> Iterator[tuple[torch.device, torch.dtype]]:
    """The VAE on its device, in fp32 where it overflows in half precision; as it was afterwards."""
    hook = getattr(vae, "_hf_hook", None)
    if hook is not None:  # model offload acts on decode and encode, which are not called
        hook.pre_forward(vae)
    upcast = vae.dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))
    if upcast:
        vae.to(dtype=torch.float32)
    try:
        parameter = next(vae.parameters())
        yield parameter.device, parameter.dtype
    finally:
        if upcast:
            vae.to(dtype=torch.float16)


def _own_decode(vae: Any, latents: Tensor) -> Tensor:
    with _own_tiles(vae, latents.shape[2] * latents.shape[3] > WHOLE):
        picture = vae.decode(_own_form(vae, latents.to(vae.device, vae.dtype)), return_dict=False)[0]
    return picture[:, :, 0] if picture.ndim == 5 else picture


def _own_encode(vae: Any, pixels: Tensor) -> Tensor:
    with _own_tiles(vae, pixels.shape[2] * pixels.shape[3] > 64 * WHOLE):
        encoded = vae.encode(_own_form(vae, pixels.to(vae.device, vae.dtype) / 127.5 - 1))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return latents[:, :, 0] if latents.ndim == 5 else latents


def _own_form(vae: Any, x: Tensor) -> Tensor:
    """A picture as a video of one frame where the VAE is one of videos."""
    return x[:, :, None] if any(p.ndim == 5 for p in vae.parameters()) else x


@contextmanager
def _own_tiles(vae: Any, large: bool) -> Iterator[None]:
    before = getattr(vae, "use_tiling", None)
    if large and before is False:
        logger.warning("%s works on large pictures in its own blended tiles.", type(vae).__name__)
        vae.use_tiling = True
    try:
        yield
    finally:
        if before is not None:
            vae.use_tiling = before
