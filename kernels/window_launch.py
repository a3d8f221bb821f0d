"""Launches of the window kernels: tiles, boxes and warps by head dim, and how text is cut into pieces."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import window_plan
from .backend import HAS_TRITON, multiprocessors
from .launch import launch

if HAS_TRITON:
    from . import window_triton as triton_kernels

    try:
        from triton.tools.tensor_descriptor import TensorDescriptor
    except ImportError:  # before 3.4
        TensorDescriptor = None

LOG2E = 1.4426950408889634
Shape = tuple[int, int, int]
# tokens of a tile on a picture and on video, by their number
TILES: dict[int, tuple[Shape, Shape]] = {
    16: ((1, 4, 4), (1, 4, 4)), 32: ((1, 4, 8), (1, 4, 8)), 64: ((1, 8, 8), (1, 8, 8)), 128: ((1, 8, 16), (2, 8, 8)),
}  # fmt: skip


class Blocks(NamedTuple):
    """Tokens that a program owns, tokens of a block that it meets, warps, and depth of the software pipeline."""

    own: int
    met: int
    warps: int
    stages: int
    registers: int | None = None


# by kernel and largest head dim, for 16-bit inputs; measured on an H100 (bench/NOTES.md)
BLOCKS = {
    "forward": {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 4, 3), 256: Blocks(64, 32, 4, 1)},
    "query": {64: Blocks(64, 64, 4, 2), 128: Blocks(64, 64, 4, 2), 256: Blocks(32, 32, 4, 1)},
    "key": {64: Blocks(64, 64, 4, 2), 128: Blocks(64, 32, 4, 2), 256: Blocks(32, 16, 4, 1)},
}
# sums of exponentials that may leave room for none of their parts to overflow
MOST = {torch.bfloat16: 2.0**60, torch.float16: 2.0**15}
# a piece of what text sees, in blocks: shorter ones cost more to merge than they save
SHORTEST_PIECE = 8


class Window(NamedTuple):
    """What is seen: see `window_attention`; `grid` and `radius` along each axis."""

    grid: tuple[int, ...]
    radius: tuple[float, ...]
    box: bool
    text: int
    text_first: bool
    scale: float


class _Run(NamedTuple):
    """How one kernel runs: its grid, pieces of text, and the arguments that all three kernels have in common."""

    grid: tuple[int, int, int]
    pieces: int
    tables: tuple[Tensor, Tensor]
    places: tuple[int, ...]
    rule: tuple[float, ...]
    settings: dict[str, Any]


def _run(kernel: str, q: Tensor, window: Window, masked: bool, text: int | None = None, met: int | None = None) -> _Run:
    """`text` and `met`, tokens of both sides, in place of the window's: a launch for text alone."""
    batch, tokens, heads, dim = q.shape
    video, alone = len(window.grid) == 3, text is not None
    shape: Shape = window.grid if video else (1, *window.grid)  # type: ignore[assignment]
    block = next(blocks for most, blocks in BLOCKS[kernel].items() if dim <= most)
    if q.element_size() == 4:
        block = Blocks(64, 32 if dim <= 128 else 16, 4, 1)
    tile, box = TILES[block.own][video], TILES[block.met][video]
    decided = window_plan.rule(shape, window.radius, window.box)
    assert decided is not None  # `why_not` has asked
    table = window_plan.plan(shape, *decided, window.box, tile, box, q.device)
    text = window.text if text is None else text
    met = tokens if met is None else met
    lanes, images = batch * heads, 0 if alone else math.prod(table.tiles)
    tiles = -(-text // block.own)
    wanted = -(-2 * multiprocessors(q.device) // (tiles * lanes)) if text else 1
    piece = -(-met // (max(1, min(wanted, met // (SHORTEST_PIECE * block.met))) * block.met)) * block.met
    pieces = -(-met // piece)
    text_at, image_at = (0, window.text) if window.text_first else (tokens - window.text, 0)
    settings = {
        "D": dim, "BD": max(16, 1 << (dim - 1).bit_length()), "TF": tile[0], "TY": tile[1], "TX": tile[2],
        "BF": box[0], "BY": box[1], "BX": box[2], "AXES": len(window.grid), "BOX": window.box, "EVEN": table.even,
        "RAGGED": text > 0 and (text % block.met != 0 or met % block.met != 0 or alone), "MASKED": masked,
        "STAGES": block.stages, "num_warps": block.warps,
    }  # fmt: skip
    if block.registers is not None:
        settings["maxnreg"] = block.registers
    places = (*shape, *table.tiles[1:], pieces, piece, tiles * pieces, images)
    return _Run(
        ((tiles * pieces + images) * lanes, 1, 1), pieces, (table.boxes, table.starts),
        (text, 0 if alone else text_at, image_at, *places), (*table.weights, table.bound, window.scale * LOG2E), settings,
    )  # fmt: skip


def why_not(q: Tensor, window: Window) -> str | None:
    """What stands in the way of the kernels, or None."""
    shape = window.grid if len(window.grid) == 3 else (1, *window.grid)
    if max(window.grid) >= 1 << 13 or len(window.grid) == 3 and window.grid[0] > 1 << 9:
        return f"the grid {window.grid} is larger than 8191 x 8191 or 512 frames"
    if window_plan.rule(shape, window.radius, window.box) is None:  # type: ignore[arg-type]
        return f"fp32 cannot tell what is within the radius {window.radius}"
    return None


def _tiles(x: Tensor, y: Tensor, window: Window, settings: dict[str, Any]) -> tuple[Any, ...]:
    """x and y `[B, S, H, D]` for Hopper's copy engine, as runs of the sequence and as boxes of the grid; or x and y
    themselves, where it cannot read them. Sets `TMA`."""
    settings["TMA"] = _tma(x) and _tma(y)
    if not settings["TMA"]:
        return x, y, x, y
    width = settings["BD"]
    run = [1, settings["BF"] * settings["BY"] * settings["BX"], width]
    box = [1, *((settings["BF"],) if len(window.grid) == 3 else ()), settings["BY"], settings["BX"], width]
    image = slice(window.text, None) if window.text_first else slice(0, x.shape[1] - window.text)

    def boxes(x: Tensor) -> Any:
        flat = x[:, image].flatten(2).unflatten(1, window.grid)
        return TensorDescriptor(flat, flat.shape, flat.stride(), box)

    def runs(x: Tensor) -> Any:
        flat = x.flatten(2)
        return TensorDescriptor(flat, flat.shape, flat.stride(), run)

    return runs(x), runs(y), boxes(x), boxes(y)


def _tma(x: Tensor) -> bool:
    """Whether Hopper's copy engine can read the heads of x: side by side, everything aligned to 16 bytes."""
    if TensorDescriptor is None or x.element_size() != 2 or x.stride(2) != x.shape[3] or not _engine(x.device):
        return False
    return x.data_ptr() % 16 == 0 and all(n % 8 == 0 for n in (*x.stride()[:3], x.storage_offset()))


@functools.cache
def _engine(device: torch.device) -> bool:
    """Whether there is one; the interpreter has what stands for it."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def _real(text_mask: Tensor | None, q: Tensor, window: Window) -> tuple[Tensor, int]:
    """Which tokens of the sequence are real, as int8, and the stride of samples; `q` stands in where all are."""
    if text_mask is None or window.text == 0:
        return q, 0
    real = torch.ones(q.shape[:2], dtype=torch.int8, device=q.device)
    real[:, : window.text] = text_mask
    return (real if window.text_first else real.roll(-window.text, 1)), q.shape[1]


def forward(
    q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor | None, pooled_v: Tensor | None, text_mask: Tensor | None,
    window: Window, keep_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output `[B, S, H, D]`, and log-sum-exps `[B * H, S]` in fp32, empty unless kept."""
    batch, tokens, heads, dim = q.shape
    real, real_b = _real(text_mask, q, window)
    run = _run("forward", q, window, real_b > 0)
    out = torch.empty((batch, tokens, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch * heads, tokens) if keep_lse else (0,), dtype=torch.float32, device=q.device)
    cut = run.pieces > 1 and window.text > 0
    part = torch.empty((run.pieces, batch * heads, window.text, dim + 1) if cut else (0,), dtype=torch.float32, device=q.device)
    pooled = 0 if pooled_k is None else pooled_k.shape[1]
    more = (k, v) if pooled_k is None or pooled_v is None else (pooled_k, pooled_v)
    text, text_at, image_at, *places = run.places
    # fp32 keeps what fp16 would not: its exponents end at 2^16
    modes = ("fast", "repair") if q.dtype in MOST else ("safe",)
    repair = torch.empty(run.grid[:1] if len(modes) > 1 else (0,), dtype=torch.int32, device=q.device)
    tiles = _tiles(k, v, window, run.settings)
    for mode in modes:
        launch(
            triton_kernels.forward_kernel, run.grid,
            (q, k, v, *more, real, *run.tables, repair, out, lse, part,
             tokens, text, text_at, image_at, pooled, *places, heads, heads // k.shape[2], *run.rule,
             *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *more[0].stride()[:3], *more[1].stride()[:3], real_b),
            run.settings | {"POOLED": pooled > 0, "SAME": k.stride(1) == v.stride(1), "KEEP_LSE": keep_lse, "MODE": mode, "MOST": MOST.get(q.dtype, 1.0)},
            tiles,
        )  # fmt: skip
    if cut:
        record = part[..., dim]
        top = record.logsumexp(0)
        merged = (part[..., :dim] * (record - top).exp()[..., None]).sum(0)
        words = slice(text_at, text_at + text)
        out[:, words] = merged.view(batch, heads, text, dim).transpose(1, 2)
        if keep_lse:
            lse[:, words] = top
    return out, lse


def backward(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    pooled_k: Tensor | None, pooled_v: Tensor | None, text_mask: Tensor | None, window: Window,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and the pooled keys and values, the latter four of each query head."""
    batch, tokens, heads, dim = q.shape
    real, real_b = _real(text_mask, q, window)
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    delta = torch.empty_like(lse)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    pooled = 0 if pooled_k is None else pooled_k.shape[1]
    more = (k, v) if pooled_k is None or pooled_v is None else (pooled_k, pooled_v)

    run = _run("query", q, window, real_b > 0)
    cut = run.pieces > 1 and window.text > 0
    dq = torch.empty((batch, tokens, heads, dim), dtype=q.dtype, device=q.device)
    part = torch.empty((run.pieces, batch * heads, window.text, dim) if cut else (0,), dtype=torch.float32, device=q.device)
    text, text_at, image_at, *places = run.places
    tiles = _tiles(k, v, window, run.settings)
    launch(
        triton_kernels.query_backward_kernel, run.grid,
        (q, k, v, *more, real, *run.tables, out, grad, lse, lse if grad_lse is None else grad_lse, delta, dq, part,
         tokens, text, text_at, image_at, pooled, *places, heads, heads // k.shape[2], *run.rule,
         *strides, *more[0].stride()[:3], *more[1].stride()[:3], real_b, *grad.stride()[:3],
         *((0, 0, 0) if grad_lse is None else grad_lse.stride())),
        run.settings | {"POOLED": pooled > 0, "SAME": k.stride(1) == v.stride(1), "LSE_HAS_GRAD": grad_lse is not None},
        tiles,
    )  # fmt: skip
    words = slice(text_at, text_at + text)
    if cut:
        dq[:, words] = part.sum(0).view(batch, heads, text, dim).transpose(1, 2)

    def keys(k: Tensor, v: Tensor, run: _Run, first: int, last: int, words: slice) -> tuple[Tensor, Tensor]:
        text, text_at, image_at, *places = run.places
        cut = run.pieces > 1 and text > 0
        dk, dv = (torch.empty((batch, k.shape[1], heads, dim), dtype=k.dtype, device=k.device) for _ in range(2))
        part = torch.empty((run.pieces, batch * heads, text, 2, dim) if cut else (0,), dtype=torch.float32, device=q.device)
        tiles = _tiles(q, grad, window, run.settings)
        launch(
            triton_kernels.key_backward_kernel, run.grid,
            (q, k, v, real, *run.tables, grad, lse, delta, dk, dv, part,
             tokens, text, text_at, image_at, *places, first, last, k.shape[1], heads, heads // k.shape[2], *run.rule,
             *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], real_b, *grad.stride()[:3]),
            run.settings | {"SAME": q.stride(1) == grad.stride(1)},
            tiles,
        )  # fmt: skip
        if cut:
            merged = part.sum(0).view(batch, heads, text, 2, dim).permute(3, 0, 2, 1, 4)
            dk[:, words], dv[:, words] = merged[0], merged[1]
        return dk, dv

    dk, dv = keys(k, v, _run("key", q, window, real_b > 0), 0, tokens, words)
    if pooled_k is None or pooled_v is None:
        return dq, dk, dv, None, None
    image = tokens - window.text
    alone = _run("key", q, window, False, text=pooled, met=image)
    return dq, dk, dv, *keys(pooled_k, pooled_v, alone, image_at, image_at + image, slice(0, pooled))
