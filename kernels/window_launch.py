"""Launches of the window kernels: tiles, boxes and warps by head dim, and how text is cut into pieces."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import window_plan
from .backend import HAS_TRITON, multiprocessors
from .launch import launch
from .window_torch import Window

TensorDescriptor: Any = None
if HAS_TRITON:
    from . import window_triton as triton_kernels

    with contextlib.suppress(ImportError):  # before 3.4
        from triton.tools import tensor_descriptor

        TensorDescriptor = tensor_descriptor.TensorDescriptor

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


# by kernel and largest head dim, for 16-bit inputs; those of 128 measured on an H100 (bench/NOTES.md), the others not
BLOCKS = {
    "forward": {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 4, 3), 256: Blocks(64, 32, 4, 1)},
    "query": {64: Blocks(64, 64, 4, 2), 128: Blocks(64, 64, 4, 2), 256: Blocks(32, 32, 4, 1)},
    "key": {64: Blocks(64, 64, 4, 2), 128: Blocks(64, 64, 4, 2), 256: Blocks(32, 16, 4, 1)},
}
# a piece of what text sees, in blocks: shorter ones cost more to merge than they save
SHORTEST_PIECE = 8
# sums of exponentials that leave room for none of their terms to overflow, and none to matter that underflows
MOST = {torch.bfloat16: 2.0**60, torch.float16: 2.0**15}
# of these dtypes, how forward goes about it, one after the other
MODES = ("fast", "repair")


def why_not(window: Window) -> str | None:
    """What stands in the way of the kernels, or None."""
    if not window.grid:  # known on the device alone
        return None if len(set(window.radius)) == 1 else "radii that differ on a grid that is not known yet"
    if max(window.grid) >= 1 << 13 or (len(window.grid) == 3 and window.grid[0] > 1 << 9):
        return f"the grid {window.grid} is larger than 8191 x 8191 or 512 frames"
    # plain numbers also where they are symbols while a graph is traced: there is a graph for each size
    if not window_plan.decidable(tuple(len(range(n)) for n in _shape(window)), window.radius, window.box):  # type: ignore[arg-type]
        return f"fp32 cannot tell what is within the radius {window.radius}"
    return None


def _shape(window: Window) -> Shape:
    return window.grid if len(window.grid) == 3 else (1, *window.grid)  # type: ignore[return-value]


class _Run(NamedTuple):
    """How one kernel runs on one shape: its grid, pieces of text, and what all three kernels have in common."""

    grid: Shape
    pieces: int
    tables: tuple[Tensor, Tensor]
    numbers: tuple[float, ...]
    settings: dict[str, Any]


def _run(kernel: str, q: Tensor, groups: int, window: Window, masked: bool, alone: int | None = None) -> _Run:
    """`alone`: so many tokens without a place (pooled ones) instead of text and image."""
    batch, tokens, heads, dim = q.shape
    video, shape = len(window.grid) == 3, _shape(window)
    block = next(blocks for most, blocks in BLOCKS[kernel].items() if dim <= most)
    if q.element_size() == 4:
        block = Blocks(64, 32 if dim <= 128 else 16, 4, 1)
    tile, box = TILES[block.own][video], TILES[block.met][video]
    decided = window_plan.rule(shape, window.radius, window.box)
    if decided is None:
        raise ValueError(f"fp32 cannot tell what is within the radius {window.radius} on the grid {window.grid}.")
    table = window_plan.plan(shape, *decided, window.box, tile, box, q.device)
    image_at, image = (window.text if window.text_first else 0), tokens - window.text
    text, text_at = (window.text, 0 if window.text_first else image) if alone is None else (alone, 0)
    everything = window.text_sees_text and alone is None
    first, last = (0, tokens) if everything else (image_at, image_at + image)
    lanes, images = batch * heads, math.prod(table.tiles) if alone is None else 0
    tiles = -(-text // block.own)
    # about as many programs of text as run at once, and none too short
    wanted = -(-2 * multiprocessors(q.device) // (tiles * lanes)) if text else 1
    wanted = max(1, min(wanted, (last - first) // (SHORTEST_PIECE * block.met)))
    piece = -(-(last - first) // (wanted * block.met)) * block.met
    pieces = -(-(last - first) // piece)
    settings = {
        "D": dim, "BD": max(16, 1 << (dim - 1).bit_length()), "TF": tile[0], "TY": tile[1], "TX": tile[2],
        "BF": box[0], "BY": box[1], "BX": box[2], "AXES": len(window.grid), "BOX": window.box, "EVEN": table.even,
        "RAGGED": text > 0 and (window.text % block.met != 0 or (last - first) % block.met != 0), "MASKED": masked,
        "STAGES": block.stages, "num_warps": block.warps,
    }  # fmt: skip
    numbers = (
        tokens, text, text_at, image_at, first, last, *shape, *table.tiles[1:], pieces, piece, tiles * pieces, images,
        heads, groups, *table.weights, table.bound, window.scale * LOG2E,
    )  # fmt: skip
    grid = ((tiles * pieces + images) * lanes, 1, 1)
    return _Run(grid, pieces if text else 1, (table.boxes, table.starts), numbers, settings)


def _tiles(x: Tensor, y: Tensor, window: Window, settings: dict[str, Any], stats: Tensor | None = None) -> tuple:
    """x and y `[B, S, H, D]` (and stats `[B * H, S, 2]`) for Hopper's copy engine, as runs of the sequence and as boxes
    of the grid; or tensors that stand in for them where it cannot read them. Sets `TMA`."""
    settings["TMA"] = _tma(x) and _tma(y) and (stats is None or window.grid[-1] % 2 == window.text % 2 == 0)
    if not settings["TMA"]:
        return (x, y, x, y) if stats is None else (x, y, x, y, stats, stats)
    frames = (settings["BF"],) if len(window.grid) == 3 else ()
    rows, columns, width = settings["BY"], settings["BX"], settings["BD"]
    block = settings["BF"] * rows * columns
    image = slice(window.text, None) if window.text_first else slice(0, x.shape[1] - window.text)

    def whole(x: Tensor, shape: list[int]) -> Any:
        return TensorDescriptor(x, x.shape, x.stride(), shape)

    flat = x.flatten(2), y.flatten(2)
    runs = [whole(x, [1, block, width]) for x in flat]
    boxes = [whole(x[:, image].unflatten(1, window.grid), [1, *frames, rows, columns, width]) for x in flat]
    if stats is None:
        return *runs, *boxes
    # pairs lie along the last axis, which must be at least 16 bytes wide
    grid = (*window.grid[:-1], 2 * window.grid[-1])
    pairs = whole(stats[:, image].flatten(1).unflatten(1, grid), [1, *frames, rows, 2 * columns])
    return *runs, *boxes, whole(stats.flatten(1), [1, 2 * block]), pairs


def _tma(x: Tensor) -> bool:
    """Whether Hopper's copy engine can read the heads of x: side by side, everything aligned to 16 bytes."""
    if TensorDescriptor is None or x.element_size() != 2 or x.stride(2) != x.shape[3] or not _engine(x.device):
        return False
    return x.data_ptr() % 16 == 0 and all(n % 8 == 0 for n in x.stride()[:3])


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
    (real[:, : window.text] if window.text_first else real[:, -window.text :]).copy_(text_mask)
    return real, q.shape[1]


def _words(x: Tensor, window: Window) -> Tensor:
    """The text of `[B, S, ...]`."""
    return x[:, : window.text] if window.text_first else x[:, x.shape[1] - window.text :]


def _part(run: _Run, q: Tensor, *shape: int) -> Tensor:
    """Where pieces of text leave what they have, `[pieces, B, H, *shape]` in fp32; empty where there is one."""
    size = (run.pieces, q.shape[0], q.shape[2], *shape) if run.pieces > 1 else (0,)
    return torch.empty(size, dtype=torch.float32, device=q.device)


def forward(
    q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor | None, pooled_v: Tensor | None, text_mask: Tensor | None,
    window: Window, keep_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output `[B, S, H, D]`, and log-sum-exps `[B, H, S]` in fp32, empty unless kept."""
    batch, tokens, heads, dim = q.shape
    real, real_b = _real(text_mask, q, window)
    run = _run("forward", q, heads // k.shape[2], window, real_b > 0)
    out = torch.empty((batch, tokens, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens) if keep_lse else (0,), dtype=torch.float32, device=q.device)
    part = _part(run, q, window.text, dim + 1)
    more, pooled = ((k, v), 0) if pooled_k is None or pooled_v is None else ((pooled_k, pooled_v), pooled_k.shape[1])
    modes = MODES if q.dtype in MOST else ("safe",)
    repair = torch.empty(run.grid[:1] if "fast" in modes else (0,), dtype=torch.int32, device=q.device)
    tiles = _tiles(k, v, window, run.settings)
    for mode in modes:
        launch(
            triton_kernels.forward_kernel, run.grid,
            (q, k, v, *more, real, *run.tables, repair, out, lse, part, *run.numbers, pooled,
             *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *more[0].stride()[:3], *more[1].stride()[:3], real_b),
            run.settings | {
                "POOLED": pooled > 0, "SAME": k.stride(1) == v.stride(1), "KEEP_LSE": keep_lse, "MODE": mode,
                "MOST": MOST.get(q.dtype, 1.0),
            },
            tiles,
        )  # fmt: skip
    if run.pieces > 1:
        top = part[..., dim].logsumexp(0)
        merged = (part[..., :dim] * (part[..., dim] - top).exp()[..., None]).sum(0)
        _words(out, window).copy_(merged.transpose(1, 2))
        if keep_lse:
            _words(lse.transpose(1, 2), window).copy_(top.transpose(1, 2))
    return out, lse


def backward(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    pooled_k: Tensor | None, pooled_v: Tensor | None, text_mask: Tensor | None, window: Window,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v and, if any, the pooled keys and values; all but the first of each query head."""
    batch, tokens, heads, dim = q.shape
    groups = heads // k.shape[2]
    real, real_b = _real(text_mask, q, window)
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    more, pooled = ((k, v), 0) if pooled_k is None or pooled_v is None else ((pooled_k, pooled_v), pooled_k.shape[1])
    run = _run("query", q, groups, window, real_b > 0)
    dq = torch.empty((batch, tokens, heads, dim), dtype=q.dtype, device=q.device)
    stats = torch.empty((batch * heads, tokens, 2), dtype=torch.float32, device=q.device)
    part = _part(run, q, window.text, dim)
    tiles = _tiles(k, v, window, run.settings)
    launch(
        triton_kernels.query_backward_kernel, run.grid,
        (q, k, v, *more, real, *run.tables, out, grad, lse, lse if grad_lse is None else grad_lse, stats, dq, part,
         *run.numbers, pooled,
         *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *more[0].stride()[:3], *more[1].stride()[:3], real_b,
         *grad.stride()[:3], *((0, 0, 0) if grad_lse is None else grad_lse.stride())),
        run.settings | {
            "POOLED": pooled > 0, "SAME": k.stride(1) == v.stride(1), "LSE_HAS_GRAD": grad_lse is not None,
        },
        tiles,
    )  # fmt: skip
    if run.pieces > 1:
        _words(dq, window).copy_(part.sum(0).transpose(1, 2))

    def keys(k: Tensor, v: Tensor, run: _Run, text: int) -> tuple[Tensor, Tensor, Tensor]:
        """dk, dv, and of text in pieces their sums `[B, text, 2, H, D]`."""
        dk, dv = (torch.empty((batch, k.shape[1], heads, dim), dtype=k.dtype, device=k.device) for _ in range(2))
        part = _part(run, q, text, 2, dim)
        tiles = _tiles(q, grad, window, run.settings, stats)
        launch(
            triton_kernels.key_backward_kernel, run.grid,
            (q, k, v, real, *run.tables, grad, stats, dk, dv, part, *run.numbers, k.shape[1],
             *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], real_b, *grad.stride()[:3]),
            run.settings | {"SAME": q.stride(1) == grad.stride(1)},
            tiles,
        )  # fmt: skip
        return dk, dv, part.sum(0).permute(0, 2, 3, 1, 4) if run.pieces > 1 else part

    run = _run("key", q, groups, window, real_b > 0)
    dk, dv, summed = keys(k, v, run, window.text)
    if run.pieces > 1:
        _words(dk, window).copy_(summed[:, :, 0])
        _words(dv, window).copy_(summed[:, :, 1])
    if pooled_k is None or pooled_v is None:
        return dq, dk, dv
    run = _run("key", q, groups, window, False, alone=pooled)
    dpk, dpv, summed = keys(pooled_k, pooled_v, run, pooled)
    return (dq, dk, dv, dpk, dpv) if run.pieces == 1 else (dq, dk, dv, summed[:, :, 0], summed[:, :, 1])
