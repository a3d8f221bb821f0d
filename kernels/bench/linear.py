"""Linear attention (`linfusion.kernels.linear_attention`): LinFusion's features, elu + 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .. import linear_attention, reference
from . import peers
from .op import Call, Case, Op, Provider, View, head_views, shrunk
from .table import Shape

EPS = 1e-4


def _case(batch: int, heads: int, tokens: int, dim: int, small: bool = False, skip: tuple[str, ...] = ()) -> Case:
    return Case("linear", Shape(batch, heads, tokens, dim), small=small, skip=skip)


UNTABLED = ("fbi-la",)  # tunes itself for a quarter of a minute at every new length


class Linear(Op):
    name = "linear"
    cases = (
        _case(2, 10, 16384, 64, small=True),
        _case(2, 20, 4096, 64, small=True),
        _case(1, 24, 16384, 128),
        _case(1, 24, 65536, 128),
        _case(2, 10, 262144, 64),
        _case(2, 8, 16384, 40, small=True),
        _case(2, 20, 1024, 64, small=True, skip=UNTABLED),
        _case(2, 20, 2048, 64, small=True, skip=UNTABLED),
        _case(2, 8, 4096, 40, small=True),
        _case(2, 16, 4096, 72, small=True),
        _case(2, 16, 16384, 72),
        _case(1, 10, 1048576, 64, skip=UNTABLED),
        # more elements than 32 bits count
        replace(_case(1, 20, 1048576, 128, skip=("torch", "torch.compile", *UNTABLED)), directions=("forward",)),
    )

    def passes(self, shape: Shape, direction: str) -> int:
        return 4 if direction == "forward" else 7  # q, k, v, out; then q, k, v and all four gradients

    def inputs(self, case: Case, device: torch.device) -> dict[str, Tensor]:
        return random_qkv(case, device)

    def ours(self, case: Case) -> Provider:
        return Provider(partial(linear_attention, eps=EPS))

    def oracle(self, case: Case) -> Call:
        return partial(reference.linear_attention, eps=EPS)

    def formula(self, case: Case) -> Provider:
        return peers.eager_linear("elu1", EPS)

    def peers(self, case: Case) -> dict[str, Callable[[], list[Provider]]]:
        return {
            "torch": lambda: [self.formula(case)],
            "torch.compile": lambda: peers.compiled([self.formula(case)]),
            "fbi-la": lambda: [peers.fbi_la("elu1", EPS)],
        }

    def views(self, case: Case) -> list[View]:
        return head_views(case.shape)

    def cut(self, case: Case, tokens: int) -> Case:
        return shrunk(case, tokens + 1)


def random_qkv(case: Case, device: torch.device) -> dict[str, Tensor]:
    """q, k and v `[B, S, H, D]` that require gradients."""
    batch, heads, tokens, dim = case.shape[:4]
    size = (batch, tokens, heads, dim)
    return {n: torch.randn(size, device=device, dtype=case.dtype).requires_grad_() for n in "qkv"}
