"""What depends on the host: one processor per kind of attention layer, and a `Family` record per model class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from ..call import ApartCall, AttnCall, Layout, Norms, Prologue, Rope, Site, sdpa
from ..mechanisms import Mechanism

HostLayer = Any  # a diffusers module; its attributes are the host's own, which nn.Module cannot type


class Processor:
    """Turns a host layer's arguments into an `AttnCall`, runs `attn.linfusion` on it, and hands the result back.

    Stateless and made without arguments: diffusers re-creates processors by class when IP-Adapters are loaded. Each
    subclass spells out its tensor arguments, since hosts drop whatever the signature of `__call__` does not name.

    Attributes:
        text_first: on which side of the image the host puts its text, if it has any in the sequence.
        norm_across_heads: whether the host's norms are over the channels of all heads.
    """

    text_first: ClassVar[bool] = True
    norm_across_heads: ClassVar[bool] = False
    # diffusers writes these two where a processor has them
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init_subclass__(cls) -> None:
        # hosts ask for it at every call, and working it out takes longer than attention
        if "__call__" in vars(cls):
            cls.__call__.__signature__ = inspect.signature(cls.__call__)  # type: ignore[attr-defined]

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
                "has no effect. Call model.reset_attention_backend(), or leave the layer out with layers= to keep it."
            )
        if self._parallel_config is not None:
            raise NotImplementedError(f"{name} under context parallelism would see only this rank's tokens.")
        if not mechanism.honours_backend and skips_scores(attn):
            raise NotImplementedError(
                f"{mechanism.site.name}: {name} has no scores of all tokens that skip_attention_scores could skip. Use "
                "skip_attention, or leave the layer out with layers=."
            )
        layout = mechanism.layout
        if "time" in mechanism.needs and mechanism.clock.time is None:
            raise ValueError(
                f"{mechanism.site.name}: {name} needs the timestep, which is read when the whole model is called."
            )
        if "stream" in mechanism.needs and mechanism.stream.hidden is None:
            raise ValueError(
                f"{mechanism.site.name}: {name} needs the hidden states before the layer's norm, which are read when "
                "its block is called; this layer was called on its own."
            )
        if (layout.grid is None and "grid" in mechanism.needs) or (layout.tokens == 0 and mechanism.site.joint):
            raise ValueError(
                f"{mechanism.site.name}: {name} needs the token grid and the number of text tokens, which are read "
                "when the whole model is called; this layer was called on its own."
            )
        return mechanism

    def moved(self, mechanism: Mechanism) -> int:
        """How many reference tokens this layer takes from behind the picture to before it: none in the host's order."""
        return 0 if mechanism.honours_mask else mechanism.layout.references

    def attend(
        self,
        mechanism: Mechanism,
        attn: HostLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        rope: Rope | None = None,
        mask: Tensor | None = None,
        text: int | None = None,
        text_mask: Tensor | None = None,
        scale: float | None = None,
        exact: Callable[..., Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention before the output projections: image and text `[B, S, C]`.

        Without `encoder_hidden_states`, text (if the layer has any) stands in `hidden_states` already; the whole
        sequence then comes back first, and None. `text` is how many tokens that are, where not the layout's number.
        Reference tokens stand before the picture's here, unless the mechanism keeps the host's order; `text_mask` does
        not count them.
        """
        site, apart = mechanism.site, encoder_hidden_states is not None
        references = mechanism.layout.references
        if text is None:
            text = mechanism.layout.text if site.joint else 0
        if text_mask is not None and references:
            text_mask = F.pad(text_mask, (0, references), value=True)
        merged = mechanism.merge(hidden_states) if mechanism.merges_tokens else None  # only in layers without text
        if merged is not None:
            hidden_states = merged.tokens
        x_q, x_k = self.inputs(mechanism, hidden_states, references if apart else text)
        q = to_heads(attn.to_q(x_q), site.head_dim)
        k = to_heads(attn.to_k(x_k), site.head_dim)
        v = to_heads(attn.to_v(hidden_states), site.head_dim)
        norms = self.norms(attn)
        if apart and norms is not None:
            norms = Norms(*norms[:2], attn.norm_added_q or nn.Identity(), attn.norm_added_k or nn.Identity())
        settings: dict[str, Any] = {
            "grid": mechanism.layout.grid, "text_first": self.text_first, "text_mask": text_mask, "norms": norms,
            "rope": rope, "scale": scale, "exact": exact or self.exact, "mask": mask,
            "prologue": self.prologue(mechanism, attn, q, apart) if rope is not None or norms is not None else None,
        }  # fmt: skip
        if apart:
            words = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_q, text_k, text_v = (to_heads(project(encoder_hidden_states), site.head_dim) for project in words)
            call: AttnCall = ApartCall((q, k, v), (text_q, text_k, text_v), references, **settings)
        else:
            call = AttnCall(q, k, v, text=text, **settings)
        if merged is not None and merged.agents is not None:
            call.agents = to_heads(attn.to_q(merged.agents), site.head_dim)
        out = run(mechanism, call, q)
        if merged is not None:
            out = merged.expand(out)
        if not apart:
            return out, None
        count = text_q.shape[1]
        if self.text_first:
            return out[:, count:], out[:, :count]
        return out[:, : q.shape[1]], out[:, q.shape[1] :]

    def attend_alone(
        self,
        attn: HostLayer,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        mask: Tensor | None,
        rope: Rope | None = None,
    ) -> Tensor:
        """A whole self-attention layer without text, its output projection included."""
        mechanism = self.mechanism(attn, mask)
        if encoder_hidden_states is not None:
            raise ValueError(f"{mechanism.site.name} was called as cross-attention, which linfusion does not replace.")
        out, _ = self.attend(mechanism, attn, hidden_states, rope=rope, mask=mask)
        linear, dropout = attn.to_out
        return dropout(linear(out))

    def exact(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """The host's own attention."""
        return sdpa(q, k, v, mask)

    def norms(self, attn: HostLayer) -> Norms | None:
        """The layer's norms of image queries and keys."""
        if attn.norm_q is None and attn.norm_k is None:
            return None
        return Norms(attn.norm_q or nn.Identity(), attn.norm_k or nn.Identity())

    def prologue(self, mechanism: Mechanism, attn: HostLayer, q: Tensor, apart: bool) -> Prologue | None:
        """The layer's norms as data for one kernel; None where only the host's own functions will do."""
        if not mechanism.fuse_prologue or torch.is_autocast_enabled(q.device.type):
            return None
        modules = [attn.norm_q, attn.norm_k]
        if apart:
            modules += [attn.norm_added_q, attn.norm_added_k]
        norms = [rms_norm(module, q) for module in modules]
        if any(norm is None for norm in norms) or len({(eps, w is None) for eps, w in norms}) > 1:  # type: ignore
            return None
        eps, weight = norms[0]  # type: ignore[misc]
        if weight is None:
            return Prologue(eps, across_heads=self.norm_across_heads)
        w = [norm[1] for norm in norms]  # type: ignore[index]
        return Prologue(eps, (w[0], w[1]), (w[2], w[3]) if apart else None, self.norm_across_heads)  # type: ignore

    def inputs(self, mechanism: Mechanism, x: Tensor, text: int) -> tuple[Tensor, Tensor]:
        """Inputs of the query and key projections; of `text` tokens in `x`, the mechanism's features see nothing."""
        if not mechanism.changes_input or text == 0:
            return mechanism.features(x)
        rest = x.shape[1] - text
        words, image = (x[:, :text], x[:, text:]) if self.text_first else (x[:, rest:], x[:, :rest])
        x_q, x_k = mechanism.features(image)
        return self.join(words, x_q), self.join(words, x_k)

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """The host's order."""
        return torch.cat((text, image) if self.text_first else (image, text), dim=1)


class DispatchProcessor(Processor):
    """Of hosts that let diffusers choose the attention backend."""

    def exact(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=self._attention_backend)


def skipped_as(ours: type[Processor], module: str, stock: str) -> None:
    """Let diffusers' layer skipping, which looks processors up by class, take ours for the stock one that it knows.

    What a skipped layer answers does not depend on its processor.
    """
    try:
        from diffusers.hooks._helpers import AttentionProcessorRegistry as Registry

        Registry.register(ours, Registry.get(getattr(import_module(f"diffusers.models.{module}"), stock)))
    except (ImportError, AttributeError, ValueError):  # another diffusers: no layer skipping, or not of this processor
        pass


def skips_scores(attn: HostLayer) -> bool:
    """Whether layer skipping is on that hands back v wherever scaled_dot_product_attention is called."""
    hooks = getattr(getattr(attn, "_diffusers_hook", None), "hooks", {})
    return any(getattr(hook, "skip_attention_scores", False) for hook in hooks.values())


def prepared_mask(attn: HostLayer, mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
    """A mask as `Attention`'s plain processors make it ready: `[B, H, 1 or S, S]`."""
    if mask is None:
        return None
    batch, tokens = hidden_states.shape[:2]
    mask = attn.prepare_attention_mask(mask, tokens, batch)
    return mask.view(batch, attn.heads, -1, mask.shape[-1])


def is_default(processor: type) -> bool:
    """Whether it may have been set to get the host's attention back, not by a setting such as attention slicing."""
    return not processor.__name__.startswith(("Sliced", "XFormers"))


def run(mechanism: Mechanism, call: AttnCall, q: Tensor) -> Tensor:
    """The mechanism's attention, `[B, S, C]`; what its queries were is kept for `describe`."""
    if not torch.compiler.is_compiling():
        mechanism.ran = q.dtype, q.device, q.numel()
    return mechanism(call).flatten(2).to(call.output_dtype())


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
        processors: instead of `processor`, for layers of certain classes, by class name.
        text: `(site, layout)`, how many tokens outside the grid that layer's sequence has.
        levels: `model -> {layer: halvings of the grid}` for hosts with several resolutions.
        time: `(model, args, kwargs) -> place on the noise schedule`, 1 for pure noise, as in `Clock`; None where the
            model's time argument does not tell.
        norm: layer's name -> name of the norm in front of it; its first argument is the block's hidden states.
        original: `(name, value)` of a parameter in the authors' own code -> the same in diffusers; also of a module's
            name, with an empty value. None where weights are published in diffusers' names.
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
    time: Callable[..., Tensor] | None = None
    norm: Callable[[str], str] = lambda name: f"{name.rpartition('.')[0]}.norm1"
    processors: Mapping[str, type[Processor]] = field(default_factory=dict)
    original: Callable[[str, Tensor], tuple[str, Tensor]] | None = None

    def processor_of(self, attn: nn.Module) -> Processor:
        """A new processor for one layer."""
        return next((self.processors[n] for n in class_names(attn) if n in self.processors), self.processor)()


def rms_norm(module: nn.Module | None, x: Tensor) -> tuple[float | None, Tensor | None] | None:
    """eps and weight of an RMS norm, both None where the host has no norm; None for anything else.

    A weight is only read here where calling the module would do nothing else: no hook may have to fetch it first.
    """
    if module is None or isinstance(module, nn.Identity):
        return None, None
    hooked = module._forward_pre_hooks or module._forward_hooks or hasattr(module, "_hf_hook")
    if type(module).__name__ != "RMSNorm" or hooked or hasattr(module, "_diffusers_hook"):
        return None
    eps, weight = getattr(module, "eps", None), getattr(module, "weight", None)
    if not isinstance(eps, float) or getattr(module, "bias", None) is not None:
        return None
    if weight is not None and (weight.device != x.device or weight.dtype != x.dtype or weight.ndim != 1):
        return None
    return eps, weight


# what `fuse_qkv_projections` makes, of what
FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}


def check_fused(name: str, attn: HostLayer) -> None:
    """NotImplementedError where a layer's fused projections are no longer what `to_q`, `to_k`, `to_v` are.

    Newer hosts keep those beside the fused matrix, and processors here call them; LoRAs and training reach one of both.
    """
    if not getattr(attn, "fused_projections", False):
        return
    for whole, parts in FUSED.items():
        fused = getattr(attn, whole, None)
        if fused is not None and not is_joined(fused, [getattr(attn, part) for part in parts]):
            raise NotImplementedError(
                f"{name}: the fused {whole} is not {', '.join(parts)} side by side (it, or they, have a LoRA or were "
                "trained), so one of them would be ignored. Call model.unfuse_qkv_projections() first."
            )


def is_joined(fused: nn.Module, parts: list[nn.Module]) -> bool:
    """Whether a plain layer does what plain `parts` do; offloaded values cannot be told apart and count as equal."""
    linears = [m for m in (fused, *parts) if type(m) is nn.Linear]
    if len(linears) <= len(parts) or len({m.bias is None for m in linears}) > 1:
        return False
    if any(m.weight.is_meta for m in linears):
        return True
    joined, *others = linears
    return torch.equal(joined.weight, torch.cat([m.weight for m in others])) and (
        joined.bias is None or torch.equal(joined.bias, torch.cat([m.bias for m in others]))
    )


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
    return x.view(*x.shape[:-1], x.shape[-1] // head_dim, head_dim)
