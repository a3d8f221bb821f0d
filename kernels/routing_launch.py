"""Which key blocks each query block sees, as lists on the device: launches the kernels of `routing_triton`.

Nothing here waits for the device: lists have room for as many entries as there can be.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import HAS_TRITON
from .launch import launch

if HAS_TRITON:
    from . import routing_triton as triton_kernels

MOST_BLOCKS = 1 << 15
"""Key blocks that the selection can hold in registers."""

# three products in TF32 keep 21 bits, nearly all of fp32's 24, at several times the speed
PRECISION = "ieee" if torch.version.hip else "tf32x3"
MEANS = (16, 2)
"""Tokens that a program takes at once for a mean, and its warps."""

SELECT_ROWS = 1
"""Query blocks that a program selects for."""
SELECT_WARP = 2048
"""Scores that a warp can hold; several that share a row wait for each other at every step."""


class Lists(NamedTuple):
    """Lists of block numbers in rising order, in groups.

    Attributes:
        entries: `[groups, capacity]` int32, the lists of a group one behind the other.
        start: `[groups, lists + 1]` int32, where they begin in `entries`; one more where a last list names all entries.
    """

    entries: Tensor
    start: Tensor


def padded_dim(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def alignment(*tensors: Tensor) -> int:
    """8 where rows and heads begin at multiples of 8 channels, so that 8 are read at once; else 1."""
    numbers = [n for x in tensors for n in (*x.stride()[:-1], x.storage_offset(), x.shape[-1])]
    return 8 if all(n % 8 == 0 for n in numbers) else 1


def block_means(x: Tensor, block: int, pivot: bool) -> Tensor:
    """`[B * H, blocks, D]` in fp32 of `[B, S, H, D]`; `pivot`: less the first token."""
    batch, tokens, heads, dim = x.shape
    blocks = -(-tokens // block)
    means = torch.empty((batch * heads, blocks, dim), dtype=torch.float32, device=x.device)
    settings = {"D": dim, "BD": padded_dim(dim), "BS": min(MEANS[0], padded_dim(block)), "BLOCK": block}
    settings |= {"ALIGN": alignment(x), "PIVOT": pivot, "num_warps": MEANS[1]}
    launch(
        triton_kernels.means_kernel, (blocks, batch * heads, 1),
        (x, means, tokens, blocks, heads, *x.stride()[:3]), settings,
    )  # fmt: skip
    return means


def block_scores(q: Tensor, k: Tensor, block_q: int, block_k: int, means_k: Tensor | None = None) -> Tensor:
    """`[B * H, query blocks, key blocks]` in fp32: products of block means, of k less its mean over all tokens."""
    means_q = block_means(q, block_q, False)
    if means_k is None:
        means_k = block_means(k, block_k, True)
    (pairs, queries, dim), (groups, keys, _) = means_q.shape, means_k.shape
    centre = torch.empty((groups, dim), dtype=torch.float32, device=q.device)
    launch(
        triton_kernels.centre_kernel, (groups, -(-dim // 32), 1), (means_k, centre, k.shape[1], keys),
        {"D": dim, "BN": 128, "BC": 32, "BLOCK": block_k, "num_warps": 4},
    )  # fmt: skip
    scores = torch.empty((pairs, queries, keys), dtype=torch.float32, device=q.device)
    side = 64 if min(queries, keys) > 32 else 16
    launch(
        triton_kernels.scores_kernel, (-(-queries // side), -(-keys // side), pairs),
        (means_q, means_k, centre, scores, queries, keys, pairs // groups),
        {"D": dim, "BM": side, "BN": side, "BC": 32, "PRECISION": PRECISION, "num_warps": 4},
    )  # fmt: skip
    return scores


def choose(scores: Tensor, chosen: int, dropped: int, second: int) -> tuple[Lists, Lists | None]:
    """The `chosen` highest of each row and a last list of all, and a second kind of list as `select_kernel` says."""
    pairs, queries, keys = scores.shape
    width = (0, chosen + dropped, keys - chosen - dropped)[second]
    index, start, other, other_start = (
        torch.empty((pairs, n), dtype=torch.int32, device=scores.device)
        for n in (queries * chosen + keys, queries + 2, queries * width, queries + 1)
    )
    padded = padded_dim(keys)
    rows = SELECT_ROWS
    # one row beyond the last, where the last list ends; and a program for the list of all
    launch(
        triton_kernels.select_kernel, (-(-(queries + 1) // rows) + 1, pairs, 1),
        (scores, index, start, other if second else index, other_start, queries, keys, chosen, dropped),
        {"ROWS": rows, "BN": padded, "SECOND": second, "num_warps": min(16, max(1, rows * padded // SELECT_WARP))},
    )  # fmt: skip
    return Lists(index, start), Lists(other, other_start) if second else None


def route(
    q: Tensor, k: Tensor, block_q: int, block_k: int, chosen: int, dropped: int = 0, second: int = 0,
    means_k: Tensor | None = None,
) -> tuple[Lists, Lists | None]:  # fmt: skip
    """The lists of `choose` for q, k `[B, S, H, D]`, in groups of `B * H`; k's block means may be there."""
    return choose(block_scores(q, k, block_q, block_k, means_k), chosen, dropped, second)


def to_map(lists: Lists, queries: int, keys: int) -> Tensor:
    """`[groups, queries, keys]` of bytes, from lists that are equally long (but for one of all)."""
    width = (lists.entries.shape[1] - (keys if lists.start.shape[1] == queries + 2 else 0)) // queries
    index = lists.entries[:, : queries * width].view(len(lists.entries), queries, width)
    return index.new_zeros((len(index), queries, keys), dtype=torch.uint8).scatter_(2, index.long(), 1)


def from_map(chosen: Tensor, axis: int, entries: int, all_entries: bool = False) -> Lists:
    """Lists along `axis` of a map of bytes `[groups, ., .]`, which holds at most `entries` in a group.

    `axis` 2 lists the chosen columns of each row, 1 the chosen rows of each column; `all_entries` appends one of all.
    """
    groups, lists, length = len(chosen), chosen.shape[3 - axis], chosen.shape[axis]
    start = torch.zeros((groups, lists + 1 + all_entries), dtype=torch.int32, device=chosen.device)
    torch.cumsum(chosen.sum(axis, dtype=torch.int32), 1, dtype=torch.int32, out=start[:, 1 : lists + 1])
    if all_entries:
        torch.add(start[:, lists], length, out=start[:, lists + 1])
    capacity = entries + length * all_entries
    index = torch.empty((groups, max(capacity, 1)), dtype=torch.int32, device=chosen.device)
    side = 32
    launch(
        triton_kernels.list_kernel, (-(-lists // side) + 1, groups, 1),
        (chosen, start, index, lists, length, index.shape[1], start.shape[1],
         chosen.stride(0), chosen.stride(3 - axis), chosen.stride(axis)),
        {"BL": side, "BE": 64, "num_warps": 4},
    )  # fmt: skip
    return Lists(index, start)


def by_keys(queries_of: Tensor, group: int, entries: int) -> Lists:
    """The lists of key blocks out of a map `[B * H, queries, keys]`: groups of `group` heads that share a key head.

    Entries are query blocks, numbered through the heads of a group.
    """
    pairs, queries, keys = queries_of.shape
    return from_map(queries_of.view(pairs // group, group * queries, keys), 1, group * entries, all_entries=True)
