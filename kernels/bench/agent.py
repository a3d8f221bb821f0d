"""Agent attention with the convolution of v, as `Agent` runs it; `sd`: with the shortcut instead, as `AgentSD` does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from .. import agent_attention, bias_factors, depthwise_conv, pool_agents, reference
from . import peers
from .depthwise import WEIGHTS, Grid
from .linear import random_qkv
from .op import Call, Case, Op, Provider, View, head_views, shrunk, small_grid
from .table import Shape

SHORTCUT, SHARPER = 0.075, 0.3
TABLES = frozenset({"key_table", "query_table"})


def _case(heads: int, side: int, dim: int, agents: int, *words: str, batch: int = 1, small: bool = False) -> Case:
    settings = (("g", (side, side)), ("a", agents), ("c", 3), *((w, True) for w in words))
    return Case("agent", Shape(batch, heads, side * side, dim, settings), small=small)


def _merged(heads: int, tokens: int, dim: int, agents: int) -> Case:
    return Case("agent", Shape(2, heads, tokens, dim, (("a", agents), ("sd", True))), small=tokens < 8192)


class Agent(Op):
    name = "agent"
    cases = (
        _case(10, 64, 64, 64, batch=2, small=True),
        _case(10, 128, 64, 64, batch=2),
        _case(10, 128, 64, 128, batch=2),
        _case(10, 128, 64, 256, batch=2),
        _case(24, 64, 128, 64, small=True),
        _case(24, 128, 128, 64),
        _case(24, 128, 128, 256),
        _case(24, 256, 128, 256),
        _case(24, 128, 128, 49, "bias"),
        _case(10, 128, 64, 256, "bias", batch=2),
        _case(16, 64, 72, 49, "bias", batch=2, small=True),
        _merged(8, 2458, 40, 256),
        _merged(8, 9831, 40, 1024),
    )

    def passes(self, shape: Shape, direction: str) -> int:
        return 4 if direction == "forward" else 7

    def inputs(self, case: Case, device: torch.device) -> dict[str, Tensor]:
        shape, random = case.shape, partial(torch.randn, device=device, dtype=case.dtype)
        made = random_qkv(case, device)
        agents = shape.get("a")
        made["agents"] = random(shape.batch, agents, shape.heads, shape.dim).requires_grad_()
        if shape.get("c"):
            channels, size = shape.heads * shape.dim, shape.get("c")
            made["weight"] = (random(channels, size, size) / size).requires_grad_()
            made["bias"] = random(channels).requires_grad_()
        if shape.get("bias"):
            tables = random(2, shape.heads, agents, 7, 7)
            made["key_table"], made["token_weights"] = bias_factors(
                tables[0], grid=shape.get("g"), tokens=shape.tokens, dtype=case.dtype
            )
            made["query_table"] = bias_factors(tables[1], grid=shape.get("g"), tokens=shape.tokens)[0]
            for name in TABLES:
                made[name].requires_grad_()
        return made

    def ours(self, case: Case) -> Provider:
        conv = partial(depthwise_conv, grid=case.shape.get("g"), inplace=True) if case.shape.get("c") else None
        return Provider(partial(_call, agent_attention, conv, **_settings(case)))

    def oracle(self, case: Case) -> Call:
        conv = partial(reference.depthwise_conv, grid=case.shape.get("g")) if case.shape.get("c") else None
        return partial(_call, reference.agent_attention, conv, **_settings(case))

    def formula(self, case: Case) -> Provider:
        return self._eager(case)[0]

    def peers(self, case: Case) -> dict[str, Callable[[], list[Provider]]]:
        return {
            "torch": lambda: self._eager(case),
            "torch.compile": lambda: peers.compiled(self._eager(case)),
            "sdpa-cudnn": lambda: [peers.exact(SDPBackend.CUDNN_ATTENTION)],
        }

    def _eager(self, case: Case) -> list[Provider]:
        return peers.eager_agents(case.shape.get("g") if case.shape.get("c") else None, **_settings(case))

    def views(self, case: Case) -> list[View]:
        """Head by head; a table's gradient adds up the samples."""
        shared = WEIGHTS | (TABLES if case.shape.batch > 1 else frozenset())
        views = head_views(case.shape, shared)
        heads = dict.fromkeys((0, case.shape.heads - 1))
        return [v._replace(take=partial(_take, v.take, h)) for v, h in zip(views, heads, strict=True)]

    def cut(self, case: Case, tokens: int) -> Case:
        if case.shape.get("g") is None:
            return shrunk(case, tokens + 1)
        grid = small_grid(tokens)
        return shrunk(case, grid[0] * grid[1], g=grid)


def _take(take: Callable[[str, Tensor], Tensor], head: int, name: str, x: Tensor) -> Tensor:
    return x[head : head + 1] if name in TABLES else take(name, x)


def _settings(case: Case) -> dict[str, Any]:
    if not case.shape.get("sd"):
        return {}
    return {"agent_scale": case.shape.dim ** (-0.5 * SHARPER), "shortcut": SHORTCUT}


def _call(
    attend: Callable[..., Tensor], conv: Callable[..., Tensor] | None, *, q: Tensor, k: Tensor, v: Tensor,
    agents: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, token_weights: Tensor | None = None,
    key_table: Tensor | None = None, query_table: Tensor | None = None, **settings: Any,
) -> Tensor:  # fmt: skip
    biases = {}
    if token_weights is not None:
        biases = {"key_bias": (key_table, token_weights), "query_bias": (query_table, token_weights)}
    out = attend(q, k, v, agents, **biases, **settings)
    return out if conv is None else conv(v, weight=weight, bias=bias, add=out)


class Pool(Grid):
    """Agents out of the queries' grid."""

    name = "agent-pool"
    cases = tuple(
        Case("agent-pool", Shape(batch, heads, 128 * 128, dim, (("g", (128, 128)), ("a", agents))))
        for batch, heads, dim, agents in ((2, 10, 64, 64), (1, 24, 128, 49), (1, 24, 128, 256))
    )

    def passes(self, shape: Shape, direction: str) -> int:
        return 1

    def inputs(self, case: Case, device: torch.device) -> dict[str, Tensor]:
        return {"v": random_qkv(case, device)["v"]}

    def upstream(self, case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"out": torch.randn_like(inputs["v"][:, : case.shape.get("a")], requires_grad=False)}

    def ours(self, case: Case) -> Provider:
        return Provider(self._call(case, pool_agents))

    def oracle(self, case: Case) -> Call:
        return self._call(case, reference.pool_agents)

    def formula(self, case: Case) -> Provider:
        grid, cells = case.shape.get("g"), self._cells(case)

        def call(v: Tensor) -> Tensor:
            image = v.flatten(2).transpose(1, 2).unflatten(2, grid)
            return torch.nn.functional.adaptive_avg_pool2d(image, cells).flatten(2).mT.unflatten(2, v.shape[2:])

        return Provider(call)

    def peers(self, case: Case) -> dict[str, Callable[[], list[Provider]]]:
        eager = [self.formula(case)]
        return {"torch": lambda: eager, "torch.compile": lambda: peers.compiled(eager)}

    def cut(self, case: Case, tokens: int) -> Case:
        grid = small_grid(tokens)
        return shrunk(case, grid[0] * grid[1], g=grid, a=min(case.shape.get("a"), grid[0] * grid[1] // 4))

    def _cells(self, case: Case) -> Any:
        return reference.agent_grid(case.shape.get("a"), case.shape.get("g"))

    def _call(self, case: Case, pool: Callable[..., Tensor]) -> Call:
        return partial(_pooled, pool, grid=case.shape.get("g"), agents=self._cells(case))


def _pooled(pool: Callable[..., Tensor], *, v: Tensor, grid: tuple[int, int], agents: tuple[int, ...]) -> Tensor:
    return pool(v, grid=grid, agents=agents)
