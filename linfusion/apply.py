"""Change the attention of a pipeline, and change it back: plan, check, then install; undo on any failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .adapter import Adapter, Factors, read_adapter, swap_host
from .call import Clock, Layout, Site, Stream
from .families import Family, family_of
from .families.base import Processor, backend_name, check_fused, is_default, is_default_backend
from .mechanisms import Mechanism, MechanismConfig
from .offload import without_sequential_offload

Choice = MechanismConfig | Mapping[str, MechanismConfig]
Layers = Callable[[str], bool] | str | Sequence[str] | None
Host = TypeVar("Host")

COMPONENTS = ("unet", "transformer", "transformer_2")
RECORD = "_linfusion"
HOST = "_linfusion_host"
STREAM = "_linfusion_stream"


@dataclass
class Entry:
    """One replaced layer: what stands there now and what stood there before."""

    mechanism: Mechanism
    processor: Processor
    original: Any


@dataclass
class Record:
    """All that `restore` needs; kept on the model, by name, so that copies and pickles of the model keep it too."""

    entries: dict[str, Entry] = field(default_factory=dict)
    hosts: dict[str, HostState] = field(default_factory=dict)
    sites: dict[str, tuple[Site, Layout]] = field(default_factory=dict)  # of every layer that could have been chosen
    passed: dict[str, str] = field(default_factory=dict)  # chosen, but left as they are, and why
    clock: Clock = field(default_factory=Clock)
    read_time: Callable[..., Tensor] | None = None  # where some mechanism needs the clock
    streams: dict[str, Stream] = field(default_factory=dict)  # by the norms that some mechanism looks before
    originals: dict[str, Tensor] = field(default_factory=dict)  # host parameters that loaded weights replaced
    low_rank: dict[str, Factors] = field(default_factory=dict)  # what was added to them, where the weights say so


@dataclass
class HostState:
    """What the hook on a host module needs, kept on that module."""

    layout: Layout
    read: Callable[..., Layout]
    needs: frozenset[str]
    stock: frozenset[str]
    layers: list[tuple[str, Any]] = field(default_factory=list)  # the replaced ones below it


def apply(
    pipe_or_model: Host,
    mechanism: Choice,
    *,
    layers: Layers = None,
    weights: str | Path | None = None,
    fuse_prologue: bool = True,
) -> Host:
    """Replace the self-attention of a diffusers pipeline or model; `restore` takes it back.

    Args:
        pipe_or_model: a pipeline with a `unet` or `transformer`, or such a model itself.
        mechanism: a config such as `CLEAR(radius=16)`, or a dict of layer-name patterns to configs, the first
            matching pattern wins and layers without one stay as they are. Applying again replaces.
        layers: which layers, as a pattern, several, or a predicate on the name; default all self-attention. In a
            pipeline of several models (Wan 2.2) patterns fit a layer's name in its model and that with the model's
            before it, as `describe` prints it (`transformer_2.blocks.0.attn1`); a predicate gets the latter where it
            takes none of the former.
        weights: an adapter folder or Hub id written by `save`.
        fuse_prologue: where Triton can run, let one kernel do the host's norms of queries and keys, its rotation and
            the joining of text and image: faster, and as exact as the host, but not its bits. False keeps those.

    Returns:
        `pipe_or_model`, changed in place.

    Raises:
        ValueError: the model, a layer or the weights do not fit; nothing was changed.
        NotImplementedError: the host is in a state that cannot be honoured; nothing was changed.
    """
    adapter = None if weights is None else read_adapter(weights)
    return apply_adapter(pipe_or_model, mechanism, layers, adapter, fuse_prologue)


def apply_adapter(
    pipe_or_model: Host, mechanism: Choice, layers: Layers, adapter: Adapter | None, fuse_prologue: bool = True
) -> Host:
    """`apply` with weights that are already in memory."""
    models = denoisers(pipe_or_model)
    if adapter is not None and len(models) > 1:
        raise ValueError("Weights belong to one model; apply them to it: linfusion.apply(pipe.transformer, ...).")
    plans = _plans(named_denoisers(pipe_or_model), mechanism, layers, fuse_prologue)
    for model, record in plans:
        if adapter is not None and record is not None:
            adapter.check(model, {name: e.mechanism for name, e in record.entries.items()})
    added = any(_has_parameters(record) for _, record in plans) or bool(adapter and (adapter.host or adapter.low_rank))
    done: list[tuple[nn.Module, Record | None]] = []
    with without_sequential_offload(pipe_or_model, models, added or _has_originals(models)):
        try:
            for model, record in plans:
                done.append((model, _replace(model, record, adapter)))
        except BaseException:
            for model, previous in done:
                _put_back(model, previous)
            raise
    return pipe_or_model


def restore(pipe_or_model: Host) -> Host:
    """Undo `apply`, `load` or `attn_processors`: the very same processors, parameters and outputs as before.

    Returns:
        `pipe_or_model`; one that was never changed is left alone.
    """
    models = denoisers(pipe_or_model)
    with without_sequential_offload(pipe_or_model, models, _has_originals(models)):
        for model in models:
            _detach(model)
    return pipe_or_model


@contextmanager
def applied(pipe_or_model: Host, mechanism: Choice, **settings: Any) -> Iterator[Host]:
    """`apply`, with its settings, for the length of a with block. Leaving it restores the host's own attention."""
    apply(pipe_or_model, mechanism, **settings)
    try:
        yield pipe_or_model
    finally:
        restore(pipe_or_model)


@contextmanager
def kept(pipe_or_model: Host) -> Iterator[Host]:
    """Whatever is applied or restored within the with block, afterwards stands what stood before, weights and all."""
    models = denoisers(pipe_or_model)
    before = [(model, record_of(model)) for model in models]
    try:
        yield pipe_or_model
    finally:
        changed = [(model, record) for model, record in before if record_of(model) is not record]
        moved = any(record is not None and _has_parameters(record) for _, record in changed)
        with without_sequential_offload(pipe_or_model, models, moved or _has_originals(models)):
            for model, record in changed:
                _put_back(model, record)


def attn_processors(
    model: Any, mechanism: Choice, *, layers: Layers = None, fuse_prologue: bool = True
) -> dict[str, Any]:
    """Processors for diffusers' own call: `unet.set_attn_processor(attn_processors(unet, LinFusion()))`.

    The mechanisms' modules and hooks are attached here, since processors hold no parameters; `restore(model)` removes
    them, also after the host's own processors have been set again. `layers` and `fuse_prologue` as in `apply`.

    Returns:
        A processor for every attention layer, keyed as `model.attn_processors` is.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "set_attn_processor"):
        raise ValueError(f"{type(model).__name__} has no set_attn_processor; use linfusion.apply.")
    ((_, record),) = _plans({"": model}, mechanism, layers, fuse_prologue)
    assert record is not None  # something was chosen, and there is but this model
    with without_sequential_offload(model, [model], _has_parameters(record) or _has_originals([model])):
        _replace(model, record, None, set_processors=False)
    processors: Any = model.attn_processors
    return dict(processors) | {f"{name}.processor": entry.processor for name, entry in record.entries.items()}


def denoisers(pipe_or_model: Any) -> list[nn.Module]:
    """The models whose attention counts: the pipeline's unet or transformers, or the model itself."""
    return list(named_denoisers(pipe_or_model).values())


def named_denoisers(pipe_or_model: Any) -> dict[str, nn.Module]:
    """`denoisers` by the pipeline's names for them, which tell two of one class apart (Wan 2.2); "" for a model.

    Several ControlNets stand in one module, which has no attention of its own: the answer is each of them, once.
    """
    if isinstance(pipe_or_model, nn.Module):
        model = getattr(pipe_or_model, "_orig_mod", pipe_or_model)
        nets = getattr(model, "nets", None)
        if not isinstance(nets, nn.ModuleList):
            return {"": model}
        return {f"nets.{i}": net for i, net in enumerate(nets) if not any(net is other for other in nets[:i])}
    found = {name: getattr(pipe_or_model, name, None) for name in COMPONENTS}
    models = {name: getattr(m, "_orig_mod", m) for name, m in found.items() if isinstance(m, nn.Module)}
    if not models:
        raise ValueError(
            f"{type(pipe_or_model).__name__} has no {', '.join(COMPONENTS[:-1])}: pass a diffusers pipeline or model."
        )
    return models


def record_of(model: nn.Module) -> Record | None:
    """What was applied to a model, or None."""
    return model.__dict__.get(RECORD)


def _plans(
    models: Mapping[str, nn.Module], mechanism: Choice, layers: Layers, fuse_prologue: bool
) -> list[tuple[nn.Module, Record | None]]:
    """A checked plan for each model; None for one in which nothing was chosen. Touches nothing."""
    if not isinstance(fuse_prologue, bool):
        raise ValueError(f"fuse_prologue must be true or false, got {fuse_prologue!r}.")
    names = [(part, name) for part, model in models.items() for name, _ in family_of(model).layers(model)]
    if not names:
        raise ValueError(
            f"{' + '.join(type(m).__name__ for m in models.values())} has no self-attention that could be replaced, "
            "only other layers."
        )
    chosen = _choose(names, mechanism, layers)
    wanted = {part: {name: config for (p, name), config in chosen.items() if p == part} for part in models}
    return [(model, _plan(model, wanted[p], fuse_prologue) if wanted[p] else None) for p, model in models.items()]


def _plan(model: nn.Module, chosen: Mapping[str, MechanismConfig], fuse_prologue: bool) -> Record:
    """Build every mechanism and check all that can be known; touches nothing."""
    family = family_of(model)
    parallel = getattr(model, "_parallel_config", None)
    if getattr(parallel, "context_parallel_config", None) is not None:
        raise NotImplementedError(
            "Context parallelism is on: each rank would attend to its own tokens only. Apply without it."
        )
    hosts = dict(family.hosts(model))
    levels = None if family.levels is None else family.levels(model)
    previous = record_of(model)
    record = Record()
    for name, attn in family.layers(model):
        state = record.hosts.setdefault(
            _host_of(name, hosts), HostState(Layout(), family.layout, frozenset(), family.stock)
        )
        site = family.site(name, attn)
        if levels is not None:
            site = replace(site, level=levels[name])
        record.sites[name] = site, state.layout
        if name not in chosen:
            continue
        if (reason := chosen[name].passes(site)) is not None:
            record.passed[name] = reason
            continue
        original = attn.processor
        if previous is not None and name in previous.entries:
            original = previous.entries[name].original
        entry = record.entries[name] = _entry(family, site, model, attn, chosen[name], original)
        entry.mechanism.layout, entry.mechanism.clock = state.layout, record.clock
        entry.mechanism.fuse_prologue = fuse_prologue
        state.needs |= entry.mechanism.needs
        state.layers.append((name, attn))
        if "stream" in entry.mechanism.needs:
            record.streams[family.norm(name)] = entry.mechanism.stream
        if "time" in entry.mechanism.needs:
            if family.time is None:
                raise NotImplementedError(
                    f"{type(chosen[name]).__name__} changes with the noise level, which {family.model}'s time argument "
                    "does not tell as a share of the schedule."
                )
            record.read_time = family.time
    if not record.entries:
        name, reason = next(iter(record.passed.items()))
        raise NotImplementedError(f"{name}: {reason}")
    return record


def _entry(
    family: Family, site: Site, model: nn.Module, attn: nn.Module, config: MechanismConfig, original: Any
) -> Entry:
    if type(original).__name__ not in family.stock:
        fused = getattr(attn, "fused_projections", False)
        raise NotImplementedError(
            f"{site.name} has a {type(original).__name__}, which {type(config).__name__} cannot stand in for (fused "
            "projections, PAG, IP-Adapter or another plugin). Leave such layers out with layers=, or "
            + ("call model.unfuse_qkv_projections() first." if fused else "set the model's default processors first.")
        )
    check_fused(site.name, attn)
    family.check(site.name, attn)
    mechanism = config.build(site)
    backend = getattr(original, "_attention_backend", None)
    if not mechanism.honours_backend and not is_default_backend(backend):
        raise ValueError(
            f"{type(config).__name__} computes attention itself, so the attention backend {backend_name(backend)!r} "
            "would have no effect. Call model.reset_attention_backend() first."
        )
    processor = family.processor_of(attn)
    if backend is not None:
        processor._attention_backend = backend
    device, dtype = _placement(model, attn)
    if device.type != "meta":
        mechanism.to(device)
    return Entry(mechanism.to(dtype).train(attn.training), processor, original)


def _placement(model: nn.Module, attn: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the layer computes; quantised and 8-bit weights say nothing about the dtype, norms and biases do.

    Where a layer has neither, diffusers knows what it casts 8-bit weights to (`enable_layerwise_casting`).
    """
    parameters = list(attn.parameters())
    for p in parameters:
        if p.is_floating_point() and p.dtype.itemsize >= 2:
            return p.device, p.dtype
    dtype: Any = getattr(model, "dtype", None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        dtype = torch.float32
    return parameters[0].device if parameters else torch.device("cpu"), dtype


def _choose(names: list[tuple[str, str]], mechanism: Choice, layers: Layers) -> dict[tuple[str, str], MechanismConfig]:
    """Which layer `(model's name in the pipeline, name)` gets which config; ValueError for what has no effect."""
    rules = mechanism if isinstance(mechanism, Mapping) else {"*": mechanism}
    for config in rules.values():
        if not isinstance(config, MechanismConfig):
            raise ValueError(f"mechanism must be a config such as linfusion.CLEAR(radius=16), got {config!r}.")
    several = len({part for part, _ in names}) > 1
    shown = {n: ".".join(n) if several else n[1] for n in names}

    def matching(pattern: str, asked: str) -> list[tuple[str, str]]:
        found = [n for n in names if fnmatchcase(n[1], pattern) or fnmatchcase(shown[n], pattern)]
        if not found:
            raise ValueError(f"{asked} matches none of the {len(names)} layers ({_examples(shown)}).")
        return found

    if layers is None:
        wanted = names
    elif callable(layers):
        wanted = [n for n in names if layers(n[1])] or [n for n in names if layers(shown[n])]
    else:
        patterns = [layers] if isinstance(layers, str) else layers
        if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
            raise ValueError(f"layers must be a pattern, several, or a predicate on the name, got {layers!r}.")
        wanted = [n for p in patterns for n in matching(p, f"layers={p!r}")]
    left = set(wanted)
    chosen: dict[tuple[str, str], MechanismConfig] = {}
    for pattern, config in rules.items():
        matches = [n for n in matching(pattern, f"Pattern {pattern!r}") if n in left]
        taken = [n for n in matches if n in chosen]
        if left and pattern != "*" and len(taken) == len(matches):  # "*" is what others leave, if anything
            why = "earlier ones take all its layers, put it before them" if taken else "layers= leaves it no layer"
            raise ValueError(f"Pattern {pattern!r} would have no effect: {why}.")
        chosen |= {n: config for n in matches if n not in chosen}
    if not chosen:
        raise ValueError(f"No layer was chosen out of {len(names)} ({_examples(shown)}).")
    return chosen


def _examples(shown: Mapping[Any, str]) -> str:
    names = list(shown.values())
    return ", ".join(names[:2] + (["..."] if len(names) > 2 else []))


def _host_of(name: str, hosts: dict[str, nn.Module]) -> str:
    """The nearest module above a layer that tells its layout."""
    above = [h for h in hosts if h == "" or name.startswith(h + ".")]
    if not above:
        raise NotImplementedError(f"{name} does not stand below a module that linfusion knows to tell its grid.")
    return max(above, key=len)


def _replace(
    model: nn.Module, record: Record | None, adapter: Adapter | None, set_processors: bool = True
) -> Record | None:
    """Install a checked plan in place of what was applied before, which is returned; on failure that stands again."""
    previous = _detach(model)
    if record is None:
        return previous
    try:
        _attach(model, record, set_processors)
        if adapter is not None:
            for name, entry in record.entries.items():
                entry.mechanism.load_state_dict(adapter.of_layer(name))
            record.originals = swap_host(model, adapter.host_values(model))
            record.low_rank = adapter.low_rank
    except BaseException:
        _put_back(model, previous)
        raise
    return previous


def _put_back(model: nn.Module, previous: Record | None) -> None:
    """Take off what is on; what `_detach` took off before stands again."""
    _detach(model)
    if previous is not None:
        _attach(model, previous)
        previous.originals = swap_host(model, previous.originals)


def _attach(model: nn.Module, record: Record, set_processors: bool = True) -> None:
    setattr(model, RECORD, record)
    for name, entry in record.entries.items():
        attn: Any = model.get_submodule(name)
        attn.linfusion = entry.mechanism
        if set_processors:
            attn.set_processor(entry.processor)
    for name, state in record.hosts.items():
        host = model.get_submodule(name)
        setattr(host, HOST, state)
        host.register_forward_pre_hook(_read_layout, with_kwargs=True)
    for name, stream in record.streams.items():
        norm = model.get_submodule(name)
        setattr(norm, STREAM, stream)
        norm.register_forward_pre_hook(_read_stream, with_kwargs=True)
    if record.read_time is not None:
        model.register_forward_pre_hook(_read_time, with_kwargs=True)


def _detach(model: nn.Module) -> Record | None:
    """Take off what was applied, as far as it got; host parameters that weights replaced come back.

    The returned record holds the replaced values in their place, so that it can be attached again.
    """
    record = record_of(model)
    if record is None:
        return None
    record.originals = swap_host(model, record.originals)  # first: it refuses before it changes anything
    for name, entry in record.entries.items():
        attn: Any = model.get_submodule(name)
        if "linfusion" in attn._modules:
            del attn.linfusion
        # what another feature has set since (an IP-Adapter of FLUX) is not ours to take off
        mine = isinstance(attn.processor, Processor) or type(attn.processor) is type(entry.original)
        if mine and attn.processor is not entry.original:
            attn.set_processor(entry.original)
        # while projections are fused, diffusers keeps what it will set again
        kept = getattr(model, "original_attn_processors", None)
        if kept is not None and kept.get(f"{name}.processor") is entry.processor:
            kept[f"{name}.processor"] = entry.original
    _unhook(model, _read_time)
    for name in record.hosts:
        host = model.get_submodule(name)
        _unhook(host, _read_layout)
        host.__dict__.pop(HOST, None)
    for name in record.streams:
        norm = model.get_submodule(name)
        _unhook(norm, _read_stream)
        norm.__dict__.pop(STREAM, None)
    delattr(model, RECORD)
    return record


def _unhook(module: nn.Module, function: Callable[..., None]) -> None:
    """By function, not by handle: handles do not survive copies and pickles of the model."""
    for key in [k for k, fn in module._forward_pre_hooks.items() if fn is function]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def _read_time(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Runs before a model's forward where a mechanism needs the clock; it waits for the device."""
    record = record_of(model)
    if record is not None and record.read_time is not None:
        record.clock.time = record.read_time(model, args, kwargs)


def _read_stream(norm: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Runs before the norm in front of a layer whose mechanism looks at what comes before it."""
    stream: Stream = getattr(norm, STREAM)
    stream.hidden = args[0].detach()


def _read_layout(host: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Runs before a host's forward. A module-level function with its state on the module, so that copies are safe."""
    state: HostState = getattr(host, HOST)
    if not torch.compiler.is_compiling():
        for name, attn in state.layers:
            over = type(attn.processor)
            if not issubclass(over, Processor) and not (over.__name__ in state.stock and is_default(over)):
                cure = "Apply again" if over.__name__ in state.stock else "Apply to layers without it"
                raise RuntimeError(
                    f"A {over.__name__} was set over {type(attn.linfusion.config).__name__} on {name}, which would "
                    f"silently have no effect. {cure}, or linfusion.restore."
                )
    layout = state.read(host, args, kwargs, state.needs)
    shared = state.layout
    shared.grid, shared.tokens = layout.grid, layout.tokens
    shared.text, shared.text_first, shared.text_mask = layout.text, layout.text_first, layout.text_mask
    shared.references = layout.references


def _has_parameters(record: Record | None) -> bool:
    return record is not None and any(True for e in record.entries.values() for _ in e.mechanism.parameters())


def _has_originals(models: Sequence[nn.Module]) -> bool:
    """Whether host parameters have to go back when what is on comes off."""
    return any(record.originals for m in models if (record := record_of(m)) is not None)
