"""Sparse-linear attention (`linfusion.kernels.sparse_linear_attention`): routing, both parts and the projection."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from .. import reference, sparse_linear_attention
from ..backend import without_triton
from . import peers
from .linear import random_qkv
from .op import Call, Case, Op, Provider, View, shrunk
from .table import Shape

SHARED = frozenset({"k", "v", "weight", "bias"})
ROUTED = ("torch",)  # gathers what it attends to: tens of milliseconds, shown at one shape


def _case(
    heads: int, tokens: int, topk: float, backward: bool = False, block_q: int = 128, skip: tuple[str, ...] = ROUTED
) -> Case:
    settings = (("k", topk),) if block_q == 128 else (("k", topk), ("q", block_q))
    directions = ("forward", "backward") if backward else ("forward",)
    return Case("sla", Shape(1, heads, tokens, 128, settings), directions=directions, skip=skip)


class SLA(Op):
    name = "sla"
    cases = (
        _case(12, 32760, 0.05, backward=True, skip=()),
        _case(12, 32760, 0.05, backward=True, block_q=64),
        _case(12, 32760, 0.1),
        _case(12, 32760, 0.2),
        _case(12, 75600, 0.05, backward=True),
        _case(12, 75600, 0.1),
        _case(24, 16896, 0.05, backward=True),
    )

    def passes(self, shape: Shape, direction: str) -> int:
        return 4 if direction == "forward" else 7

    def inputs(self, case: Case, device: torch.device) -> dict[str, Tensor]:
        dim = case.shape.dim
        weight, bias = torch.randn(dim, dim, device=device) / dim**0.5, torch.randn(dim, device=device)
        return random_qkv(case, device) | {"weight": weight.requires_grad_(), "bias": bias.requires_grad_()}

    def ours(self, case: Case) -> Provider:
        return Provider(partial(_call, sparse_linear_attention, case))

    def oracle(self, case: Case) -> Call:
        return partial(_call, reference.sparse_linear_attention, case)

    def formula(self, case: Case) -> Provider:
        """This package's PyTorch path: chosen blocks gathered, features in fp32."""

        def call(**inputs: Tensor) -> Tensor:
            with without_triton():
                return _call(sparse_linear_attention, case, **inputs)

        return Provider(call)

    def peers(self, case: Case) -> dict[str, Callable[[], list[Provider]]]:
        dim, topk = case.shape.dim, case.shape.get("k")
        return {
            "torch": lambda: [self.formula(case)],
            "official-sla": lambda: [peers.official_sla(dim, topk, block) for block in (64, 128)],
            "sdpa-cudnn": lambda: [peers.exact(SDPBackend.CUDNN_ATTENTION)],
            "sdpa-flash": lambda: [peers.exact(SDPBackend.FLASH_ATTENTION)],
        }

    def views(self, case: Case) -> list[View]:
        return [_rows(case, 0, 0), _rows(case, -1, case.shape.heads - 1)]

    def cut(self, case: Case, tokens: int) -> Case:
        return shrunk(case, tokens + 1, k=0.3)


def _call(op: Callable[..., Any], case: Case, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return op(q, k, v, topk=case.shape.get("k"), block_q=_block(case), proj_weight=weight, proj_bias=bias)


def _block(case: Case) -> int:
    return case.shape.get("q", 128)


def _rows(case: Case, block: int, head: int) -> View:
    """One query block of a head, which depends on all of the head's keys: whole, float64 has no room for scores."""
    size = _block(case)
    first = (case.shape.tokens - 1) // size * size if block == -1 else block * size

    def take(name: str, x: Tensor) -> Tensor:
        if name in ("weight", "bias"):
            return x
        return x[:, first : first + size, head : head + 1] if name in ("q", "out") else x[:, :, head : head + 1]

    return View(f"block {block} of head {head}", take, SHARED)
