"""What a user would take instead: the formulas in PyTorch, compiled or not, and published kernels where present."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .op import Missing, Provider

ROOT = Path(__file__).parents[2]

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "elu1": lambda x: F.elu(x) + 1,
    "relu_eps": lambda x: F.relu(x) + 1e-6,
}


def linear_attention(q: Tensor, k: Tensor, v: Tensor, feature_map: str, eps: float) -> Tensor:
    """Linear attention on `[B, H, S, D]` as published code writes it (LinFusion, arXiv 2409.02097, eq. 6).

    The mean over keys is split between the two factors of the state, so that fp16 keeps its range.
    """
    q, k = FEATURES[feature_map](q), FEATURES[feature_map](k)
    share = k.shape[-2] ** -0.5
    normaliser = q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + eps
    return q @ ((k.transpose(-2, -1) * share) @ (v * share)) / normaliser


def heads_first(name: str, x: Tensor) -> Tensor:
    """`[B, S, H, D]` to `[B, H, S, D]` in memory, and back; anything else stays."""
    return x.transpose(1, 2).contiguous() if x.ndim == 4 else x


def eager_linear(feature_map: str, eps: float) -> Provider:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, feature_map, eps)

    return Provider(call, heads_first, heads_first)


def convolve(v: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
    """cuDNN's depthwise convolution on `[B, N, H, D]`: its memory is a channels-last picture already."""
    image = v.reshape(-1, *grid, v.shape[2] * v.shape[3]).permute(0, 3, 1, 2)
    return _conv2d(image, weight, bias).permute(0, 2, 3, 1).reshape(v.shape)


def convolve_heads_first(v: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
    """On `[B, H, N, D]`, weights `[D, k, k]` that the heads share: every head is one more picture."""
    image = v.reshape(-1, *grid, v.shape[3]).permute(0, 3, 1, 2)
    return _conv2d(image, weight, bias).permute(0, 2, 3, 1).reshape(v.shape)


def _conv2d(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    copies = image.shape[1] // weight.shape[0]
    weight, bias = weight.repeat(copies, 1, 1).unsqueeze(1), bias.repeat(copies)
    return F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=image.shape[1])


def eager_conv(grid: tuple[int, int], dim: int) -> list[Provider]:
    """Convolution and add in both layouts that cuDNN has."""

    def channels_last(v: Tensor, add: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return add + convolve(v, weight, bias, grid)

    def channels_first(v: Tensor, add: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return add + _conv2d(v, weight, bias)

    def to_image(name: str, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2).unflatten(2, grid).contiguous() if x.ndim == 4 else x

    def to_tokens(name: str, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2).unflatten(2, (-1, dim)) if x.ndim == 4 else x

    return [Provider(channels_last), Provider(channels_first, to_image, to_tokens)]


def eager_lit(grid: tuple[int, int], eps: float) -> list[Provider]:
    """LiT (arXiv 2501.12976) in both layouts: that of the products first, that of the projections second."""

    def heads_before(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_attention(q, k, v, "relu_eps", eps) + convolve_heads_first(v, weight, bias, grid)

    def tokens_before(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        q, k, image = (x.transpose(1, 2) for x in (q, k, v))
        out = linear_attention(q, k, image, "relu_eps", eps)
        return out.transpose(1, 2) + convolve(v, weight, bias, grid)

    return [Provider(heads_before, heads_first, heads_first), Provider(tokens_before)]


def eager_agents(
    grid: tuple[int, int] | None, agent_scale: float | None = None, shortcut: float = 0.0
) -> list[Provider]:
    """Agent attention as two calls of SDPA, and the convolution where there is a grid; in both layouts."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, agents: Tensor, token_weights: Tensor | None = None,
        key_table: Tensor | None = None, query_table: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        biases: tuple[Tensor | None, Tensor | None] = (None, None)
        if token_weights is not None and key_table is not None and query_table is not None:
            biases = (key_table @ token_weights.T)[None], (token_weights @ query_table.mT)[None]
        gathered = F.scaled_dot_product_attention(agents, k, v, attn_mask=biases[0])
        out = F.scaled_dot_product_attention(q, agents, gathered, attn_mask=biases[1], scale=agent_scale)
        return torch.add(out, v, alpha=shortcut) if shortcut else out

    def heads_before(v: Tensor, weight: Any = None, bias: Any = None, **given: Tensor) -> Tensor:
        out = attend(v=v, **given)
        return out if grid is None else out + convolve(v.transpose(1, 2), weight, bias, grid).transpose(1, 2)

    def tokens_before(v: Tensor, weight: Any = None, bias: Any = None, **given: Tensor) -> Tensor:
        given = {name: x.transpose(1, 2) if x.ndim == 4 else x for name, x in given.items()}
        out = attend(v=v.transpose(1, 2), **given).transpose(1, 2)
        return out if grid is None else out + convolve(v, weight, bias, grid)

    return [Provider(tokens_before), Provider(heads_before, heads_first, heads_first)]


def exact(backend: SDPBackend | None = None) -> Provider:
    """Softmax attention over all tokens: what a mechanism stands in for, so it leaves the other inputs alone.

    By the backend named, else by the one that torch chooses.
    """

    def call(q: Tensor, k: Tensor, v: Tensor, **others: Tensor) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return Provider(call, heads_first, heads_first, other=True)


def compiled(providers: list[Provider]) -> list[Provider]:
    """By `torch.compile`, for this shape alone: code for any length would be slower."""
    functorch.donated_buffer = False  # a backward pass that is timed runs many times on what one forward pass saved
    return [p._replace(call=torch.compile(p.call, dynamic=False)) for p in providers]


def fbi_la(feature_map: str, eps: float) -> Provider:
    """Triton kernels of flash-bidirectional-linear-attention, whose features are made by PyTorch.

    Raises:
        Missing: the package `fbi_la` is neither installed nor in the folder that PEERS names (`.carry/peers`).
    """
    phi, kernel = FEATURES[feature_map], _published("fbi_la.ops.linear_attn.attention", "linear_attention")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernel(phi(q), phi(k), v, eps=eps)

    return Provider(call, heads_first, heads_first)


def official_sla(dim: int, topk: float, block_q: int) -> Provider:
    """The Triton kernels of github.com/thu-ml/SLA with its routing, linear part and projection, as published.

    Raises:
        Missing: the package `sparse_linear_attention` is neither installed nor in the folder that PEERS names.
    """
    module = _published("sparse_linear_attention", "SparseLinearAttention")(dim, topk, BLKQ=block_q, BLKK=64)

    def call(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"proj_l.weight": weight, "proj_l.bias": bias}, (q, k, v))

    return Provider(call, heads_first, heads_first)


def _published(module: str, name: str) -> Any:
    folder = os.environ.get("PEERS") or str(ROOT / ".carry" / "peers")
    sys.path.append(folder)
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise Missing(f"no {package} in {folder} ({error}); PEERS names a folder with published code") from None
    finally:
        sys.path.remove(folder)
    return getattr(found, name)
