"""Window attention on a token grid (CLEAR, arXiv 2412.16112, eq. 4): a disc of image keys, text and pooled keys."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import why_not_triton
from .checks import check_grid, check_head_dim_of_values, check_qkv, check_radius
from .reference import window_weights
from .window_launch import why_not
from .window_op import eager, window_op
from .window_torch import Window

SHAPES = ("ellipsoid", "box")
TEXT_SEES = ("all", "image")


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int] | Tensor,
    radius: float | Sequence[float],
    text: int = 0,
    text_first: bool = True,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    pooled_k: Tensor | None = None,
    pooled_v: Tensor | None = None,
    return_lse: bool = False,
    shape: str = "ellipsoid",
    text_sees: str = "all",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which an image query sees its neighbours, the text and the pooled keys; text sees all.

    On a GPU in Triton; elsewhere, and for what its kernels do not know, in PyTorch, tile by tile. Either way memory
    grows with the tokens, not with their square, and results are the same at every run.

    Args:
        q, k, v: `[B, S, H, D]`, rotated already; S = text + grid, the grid row by row. k and v may have fewer heads.
        grid: `(h, w)` or `(frames, h, w)` in tokens, or an int64 tensor of these on the CPU.
        radius: in tokens. One number is a disc (a ball on a 3-D grid) with the strict rule
            `dy^2 + dx^2 < radius^2`; one number per axis is an ellipsoid. 1 is the token itself.
        text: number of tokens outside the grid; `text_first` says whether they stand before the image.
        text_mask: `[B, text]` bool, which text keys are real; None for all.
        scale: of the scores, default `D ** -0.5`.
        pooled_k, pooled_v: `[B, P, H, D]`, further keys that image queries see and text queries do not.
        return_lse: also return the log-sum-exp of each query's scores, `[B, S, H]` in fp32 or wider.
        shape: "ellipsoid" as above, or "box": `|dy| < radius and |dx| < radius`, a square of `2 radius - 1` tokens a
            side around its query, cut off at the grid's border (NATTEN's squares are moved inside instead).
        text_sees: "all" or "image". Where several GPUs share a picture, each with the whole text, all but one pass
            "image": text queries then see no text, and what they got merges exactly by the log-sum-exps.

    Returns:
        `[B, S, H, D]`, and the log-sum-exp when asked for.

    Raises:
        ValueError: shapes that do not belong together, a grid that does not match S, a radius that is not positive, an
            unknown `shape` or `text_sees`.
    """
    check_qkv(q, k, v)
    check_head_dim_of_values(q, v)
    device_grid, sizes = (grid, []) if isinstance(grid, Tensor) else (None, list(grid))
    if device_grid is None:
        sizes = list(check_grid(sizes, q.shape[1], text, text_mask, q.shape[0]))
    reach = check_radius(radius, len(grid))
    for name, value, known in (("shape", shape, SHAPES), ("text_sees", text_sees, TEXT_SEES)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}.")
    if (pooled_k is None) != (pooled_v is None):
        raise ValueError("pooled_k and pooled_v go together; one of them is missing.")
    pooled: list[Tensor] = []
    if pooled_k is not None and pooled_v is not None:
        check_qkv(q, pooled_k, pooled_v)
        if pooled_k.shape[2] != k.shape[2]:
            raise ValueError(f"pooled_k must have the heads of k, {k.shape[2]}, got {pooled_k.shape[2]}.")
        pooled = [pooled_k, pooled_v]
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    window = Window(tuple(sizes), reach, shape == "box", text, text_first, text_sees == "all", scale)
    triton = why_not_triton("window_attention", q.shape[-1], q, k, v, *pooled, lacking=why_not(window)) is None
    arguments = (
        q, k, v, pooled_k, pooled_v, text_mask, device_grid, sizes, list(reach), window.box, text, text_first,
        window.text_sees_text, scale, return_lse, triton,
    )  # fmt: skip
    out, lse = (window_op if torch.compiler.is_compiling() else eager)(*arguments)
    return (out, lse.transpose(1, 2)) if return_lse else out


def window_pairs(grid: Sequence[int], radius: float | Sequence[float]) -> int:
    """How many (query, key) pairs of image tokens lie within the window, clipped at the grid's border."""
    grid = tuple(grid)
    reach = check_radius(radius, len(grid))
    weights, bound = window_weights(reach)
    total = torch.zeros((), dtype=torch.float64)
    counts = torch.ones((), dtype=torch.float64)
    for axis, (n, r, weight) in enumerate(zip(grid, reach, weights, strict=True)):
        halo = min(math.ceil(r) - 1, n - 1)
        step = torch.arange(-halo, halo + 1, dtype=torch.float64)
        shape = [1] * axis + [-1]
        total = total.unsqueeze(-1) + (weight * step**2).reshape(shape)
        counts = counts.unsqueeze(-1) * (n - step.abs()).reshape(shape)
    return int(counts[total < bound].sum())
