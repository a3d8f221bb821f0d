"""Memory as a budget: what a denoiser can do without, cheapest first, with the same results within rounding.

A stage's peak is foreseen from the stage before, since activations grow with the pixels, and the allocator is held to
the budget, so that a wrong guess ends in one more saving and not in more memory than was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..apply import denoisers

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
FEED_FORWARD_CHUNKS = 16  # as LinFusion's 16K example on 24 GB
SAVINGS = (
    "guidance in two passes",
    "feed-forward in chunks",
    "skips on the CPU",
    "models on the CPU while not at work",
)
LEFT = (1.0, 0.5, 0.35, 0.25, 0.25)
"""A guess of what is left of a guided UNet's activations with none, one, ... of them: only where to begin."""


def parse_memory(text: str | int | float) -> int:
    """Bytes of "24GiB", "24 GB" or a number.

    Raises:
        ValueError: anything else, or nothing.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kmg]i?)?b?\s*", str(text).lower())
    try:
        size = int(float(found[1]) * UNITS[found[2] or ""]) if found else 0
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"memory must be a size such as 24GiB, got {text!r}.")
    return size


@dataclass
class Budget:
    """How many savings a stage begins with.

    Attributes:
        limit: bytes, or None for what the device has.
        peak, weights, pixels: of the last stage, once it is measured: bytes in all, bytes of weights.
        savings: how many of `SAVINGS` it was run with.
    """

    limit: int | None = None
    peak: int = 0
    weights: int = 0
    pixels: int = 0
    savings: int = 0

    def begin(self, pixels: int) -> int:
        """The fewest savings that should fit, at least as many as the last stage needed."""
        if self.limit is None or not self.pixels:
            return self.savings
        whole = (self.peak - self.weights) / LEFT[self.savings] * pixels / self.pixels
        for count in range(self.savings, len(SAVINGS)):
            if self.weights + whole * LEFT[count] <= self.limit:
                return count
        return len(SAVINGS)


def frugal(pipe: Any, budget: Budget, pixels: int, run: Callable[[], Any], kept: str = "") -> tuple[Any, list[str]]:
    """Run a stage with as few savings as fit; where it runs out of memory, once more with the next.

    Args:
        run: the stage; called again after it ran out of memory.
        kept: a sentence on what is not lost, for the error.

    Returns:
        What `run` gave, and what was saved on, in words.

    Raises:
        MemoryError: all savings are not enough.
    """
    device = _device(pipe)
    if device.type != "cuda":
        count = len(SAVINGS) - 1 if budget.limit is not None else 0
        with savings(pipe, count) as said:
            remark = [f"{device.type}: memory is not measured there; {', '.join(said)}."] if said else []
            return run(), remark
    remarks: list[str] = []
    count = budget.begin(pixels)
    with _held_to(device, budget.limit):
        while True:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            weights = torch.cuda.memory_allocated(device)
            try:
                with savings(pipe, count) as said:
                    result = run()
            except torch.OutOfMemoryError as error:
                reason = str(error).split(". ")[0]
            else:
                if said:
                    remarks.append(f"To fit into memory: {', '.join(said)}.")
                budget.peak, budget.weights = torch.cuda.max_memory_allocated(device), weights
                budget.pixels, budget.savings = pixels, count
                return result, remarks
            if count == len(SAVINGS):
                raise MemoryError(f"All savings are not enough: {reason}. Give more memory or a smaller size. {kept}")
            remarks.append(f"Ran out of memory with {count} savings ({reason}); {SAVINGS[count]} is the next.")
            count += 1


@contextmanager
def savings(pipe: Any, count: int) -> Iterator[list[str]]:
    """The first `count` of `SAVINGS` within the block, as far as the pipeline has what they act on; gives which."""
    said: list[str] = []
    with ExitStack() as stack:
        for name, make in list(zip(SAVINGS, (_two_passes, _chunks, _skips, _offload), strict=True))[:count]:
            if stack.enter_context(make(pipe)):
                said.append(name)
        yield said


@contextmanager
def room(pipe: Any, need: int) -> Iterator[None]:
    """Where `need` bytes are not free on the GPU, everything but the VAE waits on the CPU within the block."""
    device, moved = _device(pipe), []
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if need > torch.cuda.mem_get_info(device)[0]:
            parts = [c for c in pipe.components.values() if isinstance(c, nn.Module) and c is not pipe.vae]
            moved = [c for c in parts if not hasattr(c, "_hf_hook") and any(p.device == device for p in c.parameters())]
    for part in moved:
        part.to("cpu")
    try:
        yield
    finally:
        for part in moved:
            part.to(device)


@contextmanager
def _two_passes(pipe: Any) -> Iterator[bool]:
    """Each sample of a batch through the denoiser by itself; hooks see each of them."""
    models = denoisers(pipe)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(_forward(model, _one_by_one))
        yield True


def _one_by_one(model: Any, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    first = args[0] if args else next(iter(kwargs.values()))
    batch = len(first)
    if batch == 1:
        return forward(*args, **kwargs)
    wrapper = vars(model)["forward"]
    model.forward = forward
    try:
        parts = [model(*_sample(args, i, batch), **_sample(kwargs, i, batch)) for i in range(batch)]
    finally:
        model.forward = wrapper
    return _together(parts)


def _sample(value: Any, i: int, batch: int) -> Any:
    """Arguments of sample `i`: rows of tensors and entries of lists that have as many as there are samples."""
    if isinstance(value, Tensor):
        return value[i : i + 1] if value.ndim and len(value) == batch else value
    if isinstance(value, dict):
        return {name: _sample(v, i, batch) for name, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_sample(v, i, batch) for v in value)
    if isinstance(value, list) and len(value) == batch:
        return value[i : i + 1]
    return value


def _together(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, list):
        return [x for part in parts for x in part]
    if isinstance(first, tuple):
        return tuple(_together(p) for p in zip(*parts, strict=True))
    if isinstance(first, dict):  # diffusers' outputs are
        return type(first)(**{name: _together([p[name] for p in parts]) for name in first})
    return first


@contextmanager
def _chunks(pipe: Any) -> Iterator[bool]:
    """Feed-forward layers over some tokens at a time; they treat each token by itself."""
    layers = [m for model in denoisers(pipe) for m in model.modules() if type(m).__name__ == "FeedForward"]
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_forward(layer, _in_chunks))
        yield bool(layers)


def _in_chunks(layer: Any, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    hidden, *rest = args
    length = -(-hidden.shape[1] // FEED_FORWARD_CHUNKS)
    return torch.cat([forward(part, *rest, **kwargs) for part in hidden.split(length, dim=1)], dim=1)


@contextmanager
def _skips(pipe: Any) -> Iterator[bool]:
    """A UNet's residuals wait on the CPU until the block that takes them."""
    unet: Any = getattr(pipe, "unet", None)
    if unet is None or _device(pipe).type == "cpu":
        yield False
        return
    device = _device(pipe)

    def away(block: nn.Module, args: tuple, output: tuple) -> tuple:
        return output[0], tuple(x.cpu() for x in output[1])

    def back(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        kwargs["res_hidden_states_tuple"] = tuple(x.to(device) for x in kwargs["res_hidden_states_tuple"])
        return args, kwargs

    hooks = [block.register_forward_hook(away) for block in unet.down_blocks]
    hooks += [block.register_forward_pre_hook(back, with_kwargs=True) for block in unet.up_blocks]
    try:
        yield True
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _offload(pipe: Any) -> Iterator[bool]:
    """diffusers' model offload, taken off again; not where the pipeline is offloaded already."""
    device = _device(pipe)
    hooked = any(hasattr(c, "_hf_hook") for c in pipe.components.values() if isinstance(c, nn.Module))
    if device.type == "cpu" or hooked:
        yield False
        return
    pipe.enable_model_cpu_offload(device=device)
    try:
        yield True
    finally:
        pipe.remove_all_hooks()
        pipe.to(device)


@contextmanager
def _forward(module: Any, instead: Callable[..., Any]) -> Iterator[None]:
    """`module.forward` becomes `instead(module, forward, args, kwargs)` within the block."""
    before, forward = vars(module).get("forward"), module.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return instead(module, forward, args, kwargs)

    module.forward = wrapped
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def _held_to(device: torch.device, limit: int | None) -> Iterator[None]:
    """The allocator refuses what goes above `limit` bytes."""
    if limit is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _device(pipe: Any) -> torch.device:
    """Where the pipeline computes, offloaded or not."""
    device = torch.device(getattr(pipe, "_execution_device", None) or pipe.device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())  # the allocator's functions ask for the number
    return device
