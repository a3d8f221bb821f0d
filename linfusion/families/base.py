"""What depends on the host: one processor per kind of attention layer, and a `Family` record per model class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..call import Layout, Site
from ..mechanisms import Mechanism

HostLayer = Any  # a diffusers module; its attributes are the host's own, which nn.Module cannot type


class Processor:
    """Turns a host layer's arguments into an `AttnCall`, runs `attn.linfusion` on it, and hands the result back.

    Stateless and made without arguments: diffusers re-creates processors by class when IP-Adapters are loaded. Each
    subclass spells out its tensor arguments, since hosts drop whatever the signature of `__call__` does not name.
    """

    # diffusers writes these two where a processor has them
    _attention_backend: Any = None
    _parallel_config: Any = None

    def mechanism(self, attn: HostLayer, mask: Tensor | None) -> Mechanism:
        """The layer's mechanism, after the checks that can only be made when it is called."""
        mechanism: Mechanism | None = getattr(attn, "linfusion", None)
        if mechanism is None:
            raise RuntimeError(
                "This layer has a linfusion processor but no mechanism. Use linfusion.apply, or pass "
                "set_attn_processor a fresh linfusion.attn_processors(model, mechanism)."
            )
        name = type(mechanism.config).__name__
        if mask is not None and not mechanism.honours_mask:
            raise ValueError(f"{mechanism.site.name}: {name} cannot honour an attention mask {tuple(mask.shape)}.")
        if not mechanism.honours_backend and not is_default_backend(self._attention_backend):
            raise ValueError(
                f"{name} computes attention itself, so the attention backend {backend_name(self._attention_backend)!r} "
                "has no effect. Call model.reset_attention_backend(), or use Softmax() to keep the backend."
            )
        if self._parallel_config is not None:
            raise NotImplementedError(f"{name} under context parallelism would see only this rank's tokens.")
        layout = mechanism.layout
        if "time" in mechanism.needs and mechanism.clock.time is None:
            raise ValueError(
                f"{mechanism.site.name}: {name} needs the timestep, which is read when the whole model is called."
            )
        if (layout.grid is None and "grid" in mechanism.needs) or (layout.tokens == 0 and mechanism.site.joint):
            raise ValueError(
                f"{mechanism.site.name}: {name} needs the token grid and the number of text tokens, which are read "
                "when the whole model is called; this layer was called on its own."
            )
        return mechanism


def backend_name(backend: Any) -> str:
    """A diffusers backend (enum member, string or None) as its plain name."""
    return "native" if backend is None else str(getattr(backend, "value", backend))


def is_default_backend(backend: Any) -> bool:
    """Whether the host is left to choose (PyTorch's scaled_dot_product_attention)."""
    return backend_name(backend) == "native"


@dataclass(frozen=True)
class Family:
    """Everything about a model class that a mechanism must not know.

    Attributes:
        model: class name; matched by name along the MRO, so that no host module is imported for it.
        about: which pipelines use it and which of its layers are replaced, in a few words.
        processor: made without arguments, one per replaced layer.
        layers: the layers that count, as `(name, attention module)`: self-attention and joint attention only.
        hosts: the modules whose forward tells the layout, as `(name, module)`.
        layout: `(host, args, kwargs, needs) -> Layout`, called before each of their forwards.
        site: `(name, attention module) -> Site`.
        check: `(name, attention module)`, raises NotImplementedError for a layer that `processor` cannot reproduce.
        stock: class names of the processors whose maths `processor` reproduces; others are refused.
        joint: whether text stands in the same sequence, in some layers at least.
        text: `(site, layout)`, how many tokens outside the grid that layer's sequence has.
        levels: `model -> {layer: halvings of the grid}` for hosts with several resolutions.
        time: `(model, args, kwargs) -> place on the noise schedule`, 1 for pure noise; None where the model's time
            argument does not tell.
    """

    model: str
    processor: type[Processor]
    layers: Callable[[nn.Module], Iterator[tuple[str, nn.Module]]]
    hosts: Callable[[nn.Module], Iterator[tuple[str, nn.Module]]]
    layout: Callable[..., Layout]
    site: Callable[[str, nn.Module], Site]
    stock: frozenset[str]
    check: Callable[[str, nn.Module], None] = lambda name, attn: None
    joint: bool = False
    about: str = ""
    text: Callable[[Site, Layout], int] = lambda site, layout: layout.text if site.joint else 0
    levels: Callable[[nn.Module], dict[str, int]] | None = None
    time: Callable[..., float] | None = None


def class_names(module: nn.Module) -> list[str]:
    """Names along the MRO, nearest first."""
    return [c.__name__ for c in type(module).__mro__]


def argument(args: tuple, kwargs: dict[str, Any], position: int, name: str) -> Any:
    """An argument of a host's forward, however it was passed; None where it was not."""
    if name in kwargs:
        return kwargs[name]
    return args[position] if position < len(args) else None


def to_heads(x: Tensor, head_dim: int) -> Tensor:
    """`[B, S, H * D]` to `[B, S, H, D]`; the head count is left open, since tensor parallelism shards it."""
    return x.unflatten(-1, (-1, head_dim))
