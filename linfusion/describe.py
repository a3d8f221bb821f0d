"""What was replaced, with which grid, and what was not, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from .apply import named_denoisers, record_of
from .families import family_of
from .families.base import Family, Processor, class_names
from .kernels.backend import explain
from .kernels.crossovers import crossover
from .mechanisms.base import Mechanism


@dataclass(frozen=True)
class LayerReport:
    """One attention layer. `grid` is that of the latest forward, None before the first.

    `backend` says in what the attention of the latest eager forward ran, and up to how many tokens exact attention was
    measured to be faster on this GPU, where the layer has no more; None before it, and where there is no choice.
    """

    layer: str
    mechanism: str | None
    grid: tuple[int, ...] | None
    text: int | None
    parameters: int
    reason: str
    backend: str | None = None


@dataclass(frozen=True)
class Description:
    """`describe`'s answer: prints as a table, `to_dict` for programs."""

    model: str
    layers: tuple[LayerReport, ...]
    attention_work_left: float | None

    @property
    def replaced(self) -> int:
        """How many layers run a mechanism, `Softmax` included."""
        return sum(r.mechanism is not None for r in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self) | {"replaced": self.replaced}

    def __rich__(self) -> Table:
        left = self.attention_work_left
        work = "" if left is None else f", {left:.1%} of the self-attention work left"
        table = Table(title=f"{self.model}: {self.replaced} of {len(self.layers)} attention layers replaced{work}")
        for column in ("layer", "mechanism", "grid", "text", "parameters", "note", "backend"):
            table.add_column(column, overflow="fold")
        for r in self.layers:
            grid = " x ".join(map(str, r.grid)) if r.grid else "-"
            text = "-" if r.text is None else str(r.text)
            table.add_row(r.layer, r.mechanism or "-", grid, text, str(r.parameters), r.reason, r.backend or "-")
        return table

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def describe(pipe_or_model: Any) -> Description:
    """Which attention layers were replaced, with which grid, and which were not and why.

    Works before and after `apply`; grids are known after the first forward. `attention_work_left` is the share of
    the exact self-attention's arithmetic (two products per query-key pair and channel, or what a linear mechanism
    does instead) that is still done, over all self-attention layers, at the sizes of the latest forward.

    Raises:
        ValueError: an unsupported model.
    """
    reports: list[LayerReport] = []
    done = total = 0.0
    models = named_denoisers(pipe_or_model)
    for component, model in models.items():
        family = family_of(model)
        record = record_of(model)
        targets = dict(family.layers(model))
        prefix = "" if len(models) == 1 else f"{component}."
        for name, attn in attention_layers(model):
            entry = None if record is None else record.entries.get(name)
            exact = weight = 0.0
            if record is not None and name in record.sites:
                site, layout = record.sites[name]
                text = family.text(site, layout)
                weight = site.heads * site.head_dim
                exact = weight * float(layout.tokens + text) ** 2
            total += exact
            if entry is None or not isinstance(attn.processor, Processor):
                done += exact
                passed = None if record is None else record.passed.get(name)
                reason = passed or _reason(family, name, attn, targets, entry)
                reports.append(LayerReport(prefix + name, None, None, None, 0, reason))
                continue
            grid = None if layout.grid is None else tuple(int(n) for n in layout.grid)
            parameters = sum(p.numel() for p in entry.mechanism.parameters())
            note = "replaced" if "grid" in entry.mechanism.needs or grid else "replaced; needs no grid"
            shown = text if site.joint and layout.tokens else None
            backend = _backend(entry.mechanism, layout.tokens)
            reports.append(
                LayerReport(prefix + name, str(entry.mechanism.config), grid, shown, parameters, note, backend)
            )
            if layout.tokens:
                done += weight * entry.mechanism.pairs(grid or (layout.tokens,), text)
    name = " + ".join(dict.fromkeys(type(m).__name__ for m in models.values()))
    return Description(name, tuple(reports), done / total if total else None)


def _backend(mechanism: Mechanism, tokens: int) -> str | None:
    if mechanism.kernel is None or mechanism.ran is None:
        return None
    dtype, device, elements = mechanism.ran
    why_not = explain(mechanism.kernel, mechanism.site.head_dim, dtype, device, elements)
    chosen = "Triton" if why_not is None else f"PyTorch: {why_not}"
    found = crossover(mechanism.kernel, mechanism.site.head_dim, dtype, device)
    if found is None or tokens > (found.exact_until or 0):
        return chosen
    return f"{chosen}; exact attention is faster up to {found.exact_until} tokens"


def attention_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every attention layer of a host, replaced or not, as `(name, module)`."""
    for name, module in model.named_modules():
        if hasattr(module, "processor") and hasattr(module, "set_processor"):
            yield name, module


def _reason(family: Family, name: str, attn: nn.Module, targets: dict[str, nn.Module], entry: Any) -> str:
    processor = type(attn.processor).__name__
    if entry is not None:
        return f"a {processor} was set over it; linfusion.apply again, or linfusion.restore"
    if name in targets:
        return "not chosen" if processor in family.stock else f"has a {processor}"
    if getattr(attn, "is_cross_attention", False):
        return "cross-attention"
    parts = name.split(".")
    if any("temporal" in p or "motion" in p for p in parts):
        return "temporal attention"
    if any("context" in p for p in parts):
        return "text-only attention"
    if parts[-1] == "attn2":  # some hosts do not say that theirs is
        return "cross-attention"
    if any("siglip" in p for p in parts):
        return "attention among features of reference pictures"
    return f"not a self-attention layer of the {family.model} family ({class_names(attn)[0]})"
