"""The prologue (`linfusion.kernels.qk_norm_rope`) next to what diffusers does between projections and attention.

FLUX 1K and 4K (`t512`: a double-stream block, which joins text and image; without: a single-stream block, where they
are joined already) and Wan 480p (`across`: one norm over all heads). The norms' weights are frozen, as they are while
adapters are trained.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import RopeTables, qk_norm_rope, reference
from .linear import random_qkv
from .op import Call, Case, Op, Provider, View, shrunk
from .peers import compiled
from .table import Shape

EPS = 1e-6
TEXT = 512
Norm = Callable[[Tensor, Tensor], Tensor]


def _case(heads: int, tokens: int, *settings: tuple[str, object]) -> Case:
    return Case("prologue", Shape(1, heads, tokens, 128, settings), small=tokens < 8192)


class Prologue(Op):
    name = "prologue"
    cases = (
        _case(24, TEXT + 4096, ("t", TEXT)),
        _case(24, TEXT + 4096),
        _case(24, TEXT + 65536, ("t", TEXT)),
        _case(24, TEXT + 65536),
        _case(12, 32760, ("across", True)),
    )

    def outputs(self, shape: Shape) -> tuple[str, ...]:
        return ("out_q", "out_k", "out_v") if shape.get("t") else ("out_q", "out_k")

    def passes(self, shape: Shape, direction: str) -> int:
        """q and k in and out, v too with text to join; then both and their two gradients, v's being a view."""
        return 6 if direction == "backward" or shape.get("t") else 4

    def inputs(self, case: Case, device: torch.device) -> dict[str, Tensor]:
        shape, text = case.shape, case.shape.get("t", 0)
        image = Case("", shape._replace(tokens=shape.tokens - text), case.dtype)
        tensors = random_qkv(image, device)
        if text:
            words = random_qkv(Case("", shape._replace(tokens=text), case.dtype), device)
            tensors |= {f"text_{n}": x for n, x in words.items()}
        else:
            del tensors["v"]
        channels = shape.dim * (shape.heads if shape.get("across") else 1)
        for name in ("weight_q", "weight_k", *(("text_weight_q", "text_weight_k") if text else ())):
            tensors[name] = (1 + torch.randn(channels, device=device) / 4).to(case.dtype)
        angle = (torch.rand(shape.tokens, shape.dim // 2, device=device) * 6.28).repeat_interleave(2, dim=1)
        return tensors | {"cos": angle.cos(), "sin": angle.sin()}

    def upstream(self, case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        q, shape = inputs["q"], case.shape
        size = (shape.batch, shape.tokens, shape.heads, shape.dim)
        return {n: torch.randn(size, device=q.device, dtype=q.dtype) for n in self.outputs(shape)}

    def ours(self, case: Case) -> Provider:
        return Provider(_joined(qk_norm_rope, case))

    def oracle(self, case: Case) -> Call:
        return _joined(reference.qk_norm_rope, case)

    def formula(self, case: Case) -> Provider:
        return Provider(wan(_torch_norm) if case.shape.get("across") else flux(_torch_norm))

    def peers(self, case: Case) -> dict[str, Callable[[], list[Provider]]]:
        other = wan if case.shape.get("across") else flux
        return {
            "diffusers": lambda: [self.formula(case)],
            "diffusers-rmsnorm": lambda: [Provider(other(_diffusers_norm))],
            "torch.compile": lambda: compiled([self.formula(case)]),
        }

    def views(self, case: Case) -> list[View]:
        """The first and the last tokens of text and image, with all heads."""
        text = case.shape.get("t", 0)
        image = _ends(case.shape.tokens - text)
        words = _ends(text)
        joint = words + [text + i for i in image]

        def take(name: str, x: Tensor) -> Tensor:
            if "weight" in name:
                return x
            if name in ("cos", "sin"):
                return x[joint]
            return x[:, joint if name.startswith("out_") else words if name.startswith("text_") else image]

        return [View("first and last tokens", take)]

    def cut(self, case: Case, tokens: int) -> Case:
        text = case.shape.get("t", 0) and tokens // 8 + 1
        return shrunk(case, tokens + text, t=text)


def _ends(tokens: int, count: int = 64) -> list[int]:
    return sorted({*range(min(count, tokens)), *range(max(0, tokens - count), tokens)})


def _joined(op: Callable[..., tuple], case: Case) -> Call:
    """Our op, or its specification, with the inputs by name."""
    across = bool(case.shape.get("across"))

    def call(q: Tensor, k: Tensor, v: Tensor | None = None, **rest: Tensor) -> tuple[Tensor, ...]:
        text = tuple(rest[f"text_{n}"] for n in "qkv") if v is not None else None
        own = (rest["text_weight_q"], rest["text_weight_k"]) if v is not None else None
        out = op(
            q, k, v, eps=EPS, weights=(rest["weight_q"], rest["weight_k"]), across_heads=across,
            rope=RopeTables(rest["cos"], rest["sin"]), text=text, text_weights=own,
        )  # fmt: skip
        return out if v is not None else out[:2]

    return call


def _torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    """What FLUX's and Wan's layers hold in diffusers 0.42: `torch.nn.RMSNorm`."""
    return F.rms_norm(x, weight.shape, weight, EPS)


def _diffusers_norm(x: Tensor, weight: Tensor) -> Tensor:
    """diffusers' own class, which other hosts (SD3.5, Qwen-Image, HunyuanVideo) hold; a stand-in brings the weight."""
    from diffusers.models.normalization import RMSNorm

    holder: RMSNorm = SimpleNamespace(weight=weight, bias=None, eps=EPS)  # type: ignore[assignment]
    return RMSNorm.forward(holder, x)


def flux(norm: Norm) -> Call:
    """The order of `FluxAttnProcessor`: norms, joining, rotation in fp32 tables."""
    from diffusers.models.embeddings import apply_rotary_emb

    turn: Any = apply_rotary_emb  # typed as if it took one table and gave two tensors

    def call(q: Tensor, k: Tensor, v: Tensor | None = None, **rest: Tensor) -> tuple[Tensor, ...]:
        q, k = norm(q, rest["weight_q"]), norm(k, rest["weight_k"])
        if v is not None:
            q = torch.cat([norm(rest["text_q"], rest["text_weight_q"]), q], dim=1)
            k = torch.cat([norm(rest["text_k"], rest["text_weight_k"]), k], dim=1)
            v = torch.cat([rest["text_v"], v], dim=1)
        tables = (rest["cos"], rest["sin"])
        q, k = (turn(x, tables, sequence_dim=1) for x in (q, k))
        return (q, k) if v is None else (q, k, v)

    return call


def wan(norm: Norm) -> Call:
    """The order of `WanAttnProcessor`: norms over all heads, then every pair turned, written to one new tensor."""

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos[None, :, None, 0::2], sin[None, :, None, 1::2]
        out = torch.empty_like(x)
        out[..., 0::2] = even * cos - odd * sin
        out[..., 1::2] = even * sin + odd * cos
        return out.type_as(x)

    def call(q: Tensor, k: Tensor, **rest: Tensor) -> tuple[Tensor, ...]:
        heads, tables = q.shape[2], (rest["cos"], rest["sin"])
        q, k = norm(q.flatten(2), rest["weight_q"]), norm(k.flatten(2), rest["weight_k"])
        q, k = (x.unflatten(2, (heads, -1)) for x in (q, k))
        return turn(q, *tables), turn(k, *tables)

    return call
