"""Launches of the window kernels: tiles, boxes and warps by head dim, and how text is cut into pieces."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import window_plan
from .backend import HAS_TRITON, multiprocessors
from .descriptors import TensorDescriptor, has_engine, readable
from .launch import Launch, Remembered
from .window_torch import Window

if HAS_TRITON:
    from . import window_triton as triton_kernels

LOG2E = 1.4426950408889634
Shape = tuple[int, int, int]
# tokens of a tile on a picture and on video, by their number
TILES: dict[int, tuple[Shape, Shape]] = {
    16: ((1, 4, 4), (1, 4, 4)), 32: ((1, 4, 8), (1, 4, 8)), 64: ((1, 8, 8), (1, 8, 8)), 128: ((1, 8, 16), (2, 8, 8)),
}  # fmt: skip


class Blocks(NamedTuple):
    """How a kernel goes about its work.

    Attributes:
        own, met: tokens that a program owns, and of a block that it meets.
        warps, stages: and depth of the software pipeline.
        held: whether what it owns stays in registers, not in shared memory; a choice for queries' gradients alone.
        registers: of a thread at most, so that more programs run at once; None for as many as there are.
    """

    own: int
    met: int
    warps: int
    stages: int
    held: bool = False
    registers: int | None = None


# by kernel and largest head dim, for 16-bit inputs; measured on an H100 (bench/NOTES.md)
BLOCKS = {
    "forward": {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 4, 3), 256: Blocks(128, 32, 8, 3)},
    "query": {
        64: Blocks(64, 64, 4, 3, registers=168),
        128: Blocks(64, 64, 4, 3, held=True),
        256: Blocks(128, 32, 8, 2),
    },
    "key": {64: Blocks(64, 64, 4, 3, registers=168), 128: Blocks(64, 64, 4, 2), 256: Blocks(64, 32, 8, 2)},
}
# GPUs before Hopper have less shared memory, 99 KiB at the least; compiled for them, not measured
EARLIER = {
    "forward": {128: Blocks(64, 64, 4, 2), 256: Blocks(64, 32, 4, 1)},
    "query": {128: Blocks(64, 64, 4, 2), 256: Blocks(32, 32, 4, 1)},
    "key": {128: Blocks(64, 64, 4, 2), 256: Blocks(32, 16, 4, 1)},
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


class _Common(NamedTuple):
    """What all three kernels need: their grid, pieces of text, tables, numbers and settings."""

    grid: Shape
    pieces: int
    tables: tuple[Tensor, Tensor]
    numbers: tuple[float, ...]
    settings: dict[str, Any]


class _Run(NamedTuple):
    """One kernel on one shape, all that does not depend on what the tensors hold.

    Attributes:
        launches: one after the other, with the same tensors.
        pieces: of text.
        programs: how many.
        tables: of boxes.
        views: how the copy engine reads tensors, see `_views`; None where it cannot.
    """

    launches: tuple[Launch, ...]
    pieces: int
    programs: int
    tables: tuple[Tensor, Tensor]
    views: _Views | None


def _common(kernel: str, q: Tensor, groups: int, window: Window, masked: bool, alone: int | None = None) -> _Common:
    """`alone`: so many tokens without a place (pooled ones) instead of text and image."""
    batch, tokens, heads, dim = q.shape
    video, shape = len(window.grid) == 3, _shape(window)
    chosen = (BLOCKS if has_engine(q.device) else EARLIER)[kernel]
    block = next(blocks for most, blocks in chosen.items() if dim <= most)
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
    # no piece longer than half of what each of the programs that run at once does, and none too short
    whole, met = -(-(last - first) // block.met), len(table.boxes) if images else 0
    everyone = lanes * (tiles * whole + images * -(-text // block.met) + met)
    wanted = -(-2 * 2 * multiprocessors(q.device) * whole // everyone) if text else 1
    wanted = max(1, min(wanted, (last - first) // (SHORTEST_PIECE * block.met)))
    piece = -(-(last - first) // (wanted * block.met)) * block.met
    pieces = -(-(last - first) // piece)
    settings = {
        "D": dim, "BD": max(16, 1 << (dim - 1).bit_length()), "TF": tile[0], "TY": tile[1], "TX": tile[2],
        "BF": box[0], "BY": box[1], "BX": box[2], "AXES": len(window.grid), "BOX": window.box, "EVEN": table.even,
        "RAGGED": text > 0 and (window.text % block.met != 0 or (last - first) % block.met != 0), "MASKED": masked,
        "STAGES": block.stages, "num_warps": block.warps,
    }  # fmt: skip
    if kernel == "query":
        settings["HELD"] = block.held
    if block.registers is not None:
        settings["maxnreg"] = block.registers
    numbers = (
        tokens, text, text_at, image_at, first, last, *shape, *table.tiles[1:], pieces, piece, tiles * pieces, images,
        heads, groups, *table.weights, table.bound, window.scale * LOG2E,
    )  # fmt: skip
    grid = ((tiles * pieces + images) * lanes, 1, 1)
    return _Common(grid, pieces if text else 1, (table.boxes, table.starts), numbers, settings)


# shape, strides and block of a descriptor
_View = tuple[list[int], list[int], list[int]]


class _Views(NamedTuple):
    """How the copy engine reads two tensors, then perhaps statistics, as runs of the sequence and as boxes of the grid,
    which begins behind `skip` tokens."""

    runs: tuple[_View, ...]
    boxes: tuple[_View, ...]
    skip: int


def _views(x: Tensor, y: Tensor, window: Window, settings: dict[str, Any], stats: bool = False) -> _Views | None:
    """For x and y `[B, S, H, D]`, and statistics `[B * H, S, 2]`. Sets `TMA`: whether the engine can read them."""
    settings["TMA"] = _tma(x) and _tma(y) and (not stats or window.grid[-1] % 2 == window.text % 2 == 0)
    if not settings["TMA"]:
        return None
    batch, tokens, heads, dim = x.shape
    frames = [settings["BF"]] if len(window.grid) == 3 else []
    block, channels = [*frames, settings["BY"], settings["BX"]], [settings["BD"]]
    steps = [math.prod(window.grid[axis + 1 :]) for axis in range(len(window.grid))]
    runs: list[_View] = []
    boxes: list[_View] = []
    for each in (x, y):
        across, along, _, _ = each.stride()
        runs.append(([batch, tokens, heads * dim], [across, along, 1], [1, math.prod(block), *channels]))
        strides = [across, *(along * step for step in steps), 1]
        boxes.append(([batch, *window.grid, heads * dim], strides, [1, *block, *channels]))
    if stats:
        # pairs lie along the last axis, which must be at least 16 bytes wide
        lanes, pairs = batch * heads, 2 * tokens
        runs.append(([lanes, pairs], [pairs, 1], [1, 2 * math.prod(block)]))
        strides = [pairs, *(2 * step for step in steps[:-1]), 1]
        boxes.append(([lanes, *window.grid[:-1], 2 * window.grid[-1]], strides, [1, *block[:-1], 2 * block[-1]]))
    return _Views(tuple(runs), tuple(boxes), window.text if window.text_first else 0)


def _tiles(views: _Views | None, x: Tensor, y: Tensor, *stats: Tensor) -> tuple[Any, ...]:
    """Descriptors for a kernel, or tensors that stand in for them."""
    if views is None:
        return (x, y, x, y, *stats, *stats)
    runs = [TensorDescriptor(t, *view) for t, view in zip((x, y, *stats), views.runs, strict=True)]
    images = [t[:, views.skip :] if views.skip else t for t in (x, y, *stats)]
    boxes = [TensorDescriptor(t, *view) for t, view in zip(images, views.boxes, strict=True)]
    return (*runs[:2], *boxes[:2], *runs[2:], *boxes[2:])


def _tma(x: Tensor) -> bool:
    """Whether Hopper's copy engine can read the heads of x: side by side, everything aligned to 16 bytes."""
    return x.stride(2) == x.shape[3] and readable(x)


def _real(text_mask: Tensor | None, q: Tensor, window: Window) -> tuple[Tensor, bool]:
    """Which tokens of the sequence are real, `[B, S]` in int8, or `q` in its place where all are; and whether not."""
    if text_mask is None or window.text == 0:
        return q, False
    real = torch.ones(q.shape[:2], dtype=torch.int8, device=q.device)
    (real[:, : window.text] if window.text_first else real[:, -window.text :]).copy_(text_mask)
    return real, True


def _words(x: Tensor, window: Window) -> Tensor:
    """The text of `[B, S, ...]`."""
    return x[:, : window.text] if window.text_first else x[:, x.shape[1] - window.text :]


def _part(pieces: int, q: Tensor, *shape: int) -> Tensor:
    """Where pieces of text leave what they have, `[pieces, B, H, *shape]` in fp32; empty where there is one."""
    size = (pieces, q.shape[0], q.shape[2], *shape) if pieces > 1 else (0,)
    return torch.empty(size, dtype=torch.float32, device=q.device)


@Remembered
def _forward_run(
    q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor | None, pooled_v: Tensor | None, masked: bool, window: Window,
    keep_lse: bool,
) -> _Run:  # fmt: skip
    common = _common("forward", q, q.shape[2] // k.shape[2], window, masked)
    more, pooled = _pooled(k, v, pooled_k, pooled_v)
    settings = common.settings | {
        "POOLED": pooled > 0, "SAME": k.stride(1) == v.stride(1), "KEEP_LSE": keep_lse, "MOST": MOST.get(q.dtype, 1.0),
    }  # fmt: skip
    views = _views(k, v, window, settings)
    numbers = (*common.numbers, pooled, *_strides(q, k, v, *more), q.shape[1] if masked else 0)
    launches = tuple(
        Launch(triton_kernels.forward_kernel, common.grid, numbers, settings | {"MODE": mode})
        for mode in (MODES if q.dtype in MOST else ("safe",))
    )
    return _Run(launches, common.pieces, common.grid[0], common.tables, views)


@Remembered
def _query_run(
    q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor | None, pooled_v: Tensor | None, masked: bool, window: Window,
    grad: Tensor, grad_lse: Tensor | None,
) -> _Run:  # fmt: skip
    common = _common("query", q, q.shape[2] // k.shape[2], window, masked)
    more, pooled = _pooled(k, v, pooled_k, pooled_v)
    settings = common.settings | {
        "POOLED": pooled > 0, "SAME": k.stride(1) == v.stride(1), "LSE_HAS_GRAD": grad_lse is not None,
    }  # fmt: skip
    views = _views(k, v, window, settings)
    numbers = (
        *common.numbers, pooled, *_strides(q, k, v, *more), q.shape[1] if masked else 0, *_strides(grad),
        *((0, 0, 0) if grad_lse is None else grad_lse.stride()),
    )  # fmt: skip
    launch = Launch(triton_kernels.query_backward_kernel, common.grid, numbers, settings)
    return _Run((launch,), common.pieces, common.grid[0], common.tables, views)


@Remembered
def _key_run(
    q: Tensor, k: Tensor, v: Tensor, masked: bool, window: Window, grad: Tensor, alone: int | None = None
) -> _Run:
    common = _common("key", q, q.shape[2] // k.shape[2], window, masked, alone)
    settings = common.settings | {"SAME": q.stride(1) == grad.stride(1)}
    views = _views(q, grad, window, settings, stats=True)
    numbers = (*common.numbers, k.shape[1], *_strides(q, k, v), q.shape[1] if masked else 0, *_strides(grad))
    launch = Launch(triton_kernels.key_backward_kernel, common.grid, numbers, settings)
    return _Run((launch,), common.pieces, common.grid[0], common.tables, views)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(step for x in tensors for step in x.stride()[:3])


def _pooled(
    k: Tensor, v: Tensor, pooled_k: Tensor | None, pooled_v: Tensor | None
) -> tuple[tuple[Tensor, Tensor], int]:
    """Pooled keys and values and their number, or what stands in for them."""
    return ((k, v), 0) if pooled_k is None or pooled_v is None else ((pooled_k, pooled_v), pooled_k.shape[1])


def forward(
    q: Tensor, k: Tensor, v: Tensor, pooled_k: Tensor | None, pooled_v: Tensor | None, text_mask: Tensor | None,
    window: Window, keep_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output `[B, S, H, D]`, and log-sum-exps `[B, H, S]` in fp32, empty unless kept."""
    batch, tokens, heads, dim = q.shape
    real, masked = _real(text_mask, q, window)
    run = _forward_run(q, k, v, pooled_k, pooled_v, masked, window, keep_lse)
    out = torch.empty((batch, tokens, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens) if keep_lse else (0,), dtype=torch.float32, device=q.device)
    part = _part(run.pieces, q, window.text, dim + 1)
    repair = torch.empty((run.programs,) if q.dtype in MOST else (0,), dtype=torch.int32, device=q.device)
    more, _ = _pooled(k, v, pooled_k, pooled_v)
    tiles = _tiles(run.views, k, v)
    for launch in run.launches:
        launch(q, k, v, *more, real, *run.tables, repair, out, lse, part, *tiles)
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
    real, masked = _real(text_mask, q, window)
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    run = _query_run(q, k, v, pooled_k, pooled_v, masked, window, grad, grad_lse)
    dq = torch.empty((batch, tokens, heads, dim), dtype=q.dtype, device=q.device)
    stats = torch.empty((batch * heads, tokens, 2), dtype=torch.float32, device=q.device)
    part = _part(run.pieces, q, window.text, dim)
    more, _ = _pooled(k, v, pooled_k, pooled_v)
    run.launches[0](
        q, k, v, *more, real, *run.tables, out, grad, lse, lse if grad_lse is None else grad_lse, stats, dq, part,
        *_tiles(run.views, k, v),
    )  # fmt: skip
    if run.pieces > 1:
        _words(dq, window).copy_(part.sum(0).transpose(1, 2))

    def keys(k: Tensor, v: Tensor, run: _Run, text: int) -> tuple[Tensor, Tensor, Tensor]:
        """dk, dv, and of text in pieces their sums `[B, text, 2, H, D]`."""
        dk, dv = (torch.empty((batch, k.shape[1], heads, dim), dtype=k.dtype, device=k.device) for _ in range(2))
        part = _part(run.pieces, q, text, 2, dim)
        tiles = _tiles(run.views, q, grad, stats)
        run.launches[0](q, k, v, real, *run.tables, grad, stats, dk, dv, part, *tiles)
        return dk, dv, part.sum(0).permute(0, 2, 3, 1, 4) if run.pieces > 1 else part

    run = _key_run(q, k, v, masked, window, grad)
    dk, dv, summed = keys(k, v, run, window.text)
    if run.pieces > 1:
        _words(dk, window).copy_(summed[:, :, 0])
        _words(dv, window).copy_(summed[:, :, 1])
    if pooled_k is None or pooled_v is None:
        return dq, dk, dv
    pooled = pooled_k.shape[1]
    run = _key_run(q, pooled_k, pooled_v, False, window, grad, pooled)
    dpk, dpv, summed = keys(pooled_k, pooled_v, run, pooled)
    return (dq, dk, dv, dpk, dpv) if run.pieces == 1 else (dq, dk, dv, summed[:, :, 0], summed[:, :, 1])
