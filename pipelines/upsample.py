"""Doubling a picture and convolving it, without ever doubling it: four small convolutions in place of a large one.

After nearest-neighbour doubling, the nine places that a 3 x 3 kernel looks at hold four different values, and which
they are depends only on whether a row and a column are even or odd. So each of these four kinds of pixel is a 2 x 2
convolution of the small picture, whose weights are sums of the kernel's: 4 multiplications where there were 9, and the
same result within rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def doubled(upsampler: Any) -> Callable[[Tensor], Tensor]:
    """What diffusers' `Upsample2D` does to `[B, C, h, w]`; the module itself where it is of another kind or hooked."""
    conv: Any = getattr(upsampler, "conv", None)
    plain = (
        type(conv) is nn.Conv2d
        and (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
        and (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros")
        and (upsampler.use_conv, upsampler.interpolate, upsampler.use_conv_transpose) == (True, True, False)
        and upsampler.norm is None
        and not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in (conv, upsampler))
    )  # fmt: skip
    if not plain:
        return upsampler
    weights = [[merge(merge(conv.weight.float(), 2, row), 3, column) for column in (0, 1)] for row in (0, 1)]
    weights = [[w.to(conv.weight.dtype) for w in row] for row in weights]

    def run(x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        around = F.pad(x, (1, 1, 1, 1))
        out = x.new_empty(batch, conv.out_channels, 2 * height, 2 * width)
        if x.is_contiguous(memory_format=torch.channels_last):
            out = out.contiguous(memory_format=torch.channels_last)
        for i in (0, 1):
            for j in (0, 1):
                place = around[:, :, i : i + height + 1, j : j + width + 1]
                out[:, :, i::2, j::2] = F.conv2d(place, weights[i][j], conv.bias)
        return out

    return run


def merge(weight: Tensor, dim: int, odd: int) -> Tensor:
    """Three weights along `dim` to two: of an even pixel the last two see one value, of an odd one the first two."""
    first, middle, last = weight.unbind(dim)
    pair = (first + middle, last) if odd else (first, middle + last)
    return torch.stack(pair, dim)
