"""The local branch of LiT and Agent: a depthwise convolution of the image's values, of no effect at first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..call import AttnCall
from ..kernels import depthwise_conv
from ..kernels.checks import repeat_heads, split_heads


def check_kernel_size(size: int) -> None:
    """ValueError unless a convolution of this size has a centre."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % 2 == 0:
        raise ValueError(f"kernel_size must be an odd number of tokens, got {size!r}.")


class LocalBranch(nn.Module):
    """Adds `conv(v)` to the image tokens; on video frame by frame.

    Zero at first, where the papers train from scratch with PyTorch's default: the host's weights are inherited here.

    Args:
        channels: of the weight; those of one head when all heads share it, else those of all heads.
        size: tokens along each side of the kernel, odd.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, size, size))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, call: AttnCall, out: Tensor, heads: int | None = None) -> Tensor:
        """`out` `[B, S, H, D]` with the branch added; `heads` regroups the channels of v for a shared weight."""
        assert call.grid is not None  # the processor has checked `needs`
        text, image = call.split(out)
        v = repeat_heads(call.split(call.v)[1], out.shape[2]).to(out.dtype)
        if heads is not None:
            v, image, text = (split_heads(x, heads) for x in (v, image, text))
        whole = depthwise_conv(
            v, grid=call.grid, weight=self.weight, bias=self.bias, add=image,
            text=text if call.text else None, text_first=call.text_first, inplace=True,
        )  # fmt: skip
        return whole.reshape(out.shape)

    def pairs(self, tokens: int) -> float:
        """One multiplication per place of the kernel and channel; a query-key pair costs two per channel."""
        return tokens * self.weight[0].numel() / 2
