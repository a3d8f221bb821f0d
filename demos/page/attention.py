"""Where a layer looks: the weights with which a token's output takes from every token, under any mechanism.

All mechanisms here are linear in v for given q and k: `out_i = sum_j A_ij v_j`. So A can be read off without knowing
the mechanism: its row i is the gradient of `out_i` with respect to v, and v made of unit vectors gives A itself. Where
channels are mixed or convolved as well (`SLA`, `LiT` and `Agent` after training), A is the mean over channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import linfusion as lf
from linfusion.apply import denoisers, record_of
from linfusion.call import AttnCall
from linfusion.describe import Description
from linfusion.mechanisms import Mechanism, MechanismConfig

MOST = 16
"""Layers that are looked at: each keeps its queries and keys, 0.2 GB for FLUX.1 at 1024 pixels."""

KEYS = 512
"""Tokens that a mean distance is taken over, unless there are fewer: every 64 cost a pass of the layer."""


@dataclass(frozen=True)
class Layer:
    """One layer's mechanism and the call that it got, free of the pipeline that they came from."""

    name: str
    mechanism: Mechanism
    call: AttnCall
    grid: tuple[int, ...]

    def run(self, v: Tensor) -> Tensor:
        """The image tokens' output `[N, H, D]` for other values; of a batch the last, which guidance goes towards."""
        call = AttnCall(**{name: getattr(self.call, name) for name in FIELDS}, v=v, prologue=None)
        return call.split(self.mechanism(call))[1][-1]

    def row(self, token: int) -> tuple[Tensor, Tensor]:
        """What image token `token` takes from the image `[H, N]`, and from all text together `[H]`."""
        v = torch.ones_like(self.call.v).requires_grad_()
        with torch.enable_grad():
            (weights,) = torch.autograd.grad(self.run(v)[token].sum(), v)
        shared = self.call.q.shape[2] // v.shape[2]  # query heads that share a head of v
        text, image = self.call.split(weights.float().mean(dim=-1) / shared)
        return image[-1].T, text[-1].sum(dim=0)

    @torch.no_grad()
    def distance(self, check: Callable[[], None] = lambda: None) -> Tensor:
        """Per head `[H]`, how far an image token looks within the image on average, in tokens of the grid.

        Of many tokens `KEYS` are looked at, drawn at random and always the same. `check` is called now and then, and
        may raise to end it.
        """
        dim = self.call.v.shape[-1]
        places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in self.grid)).to(self.call.v.device)
        start = self.call.text if self.call.text_first else 0
        keys = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:KEYS].to(places.device)
        far, total = torch.zeros(()), torch.zeros(())
        for some in keys.split(dim):
            check()
            v = torch.zeros_like(self.call.v)
            v[:, start + some, :, torch.arange(len(some), device=places.device)] = 1
            weights = self.run(v)[..., : len(some)].float()
            far = far + (weights * torch.cdist(places, places[some])[:, None]).sum(dim=(0, 2)).cpu()
            total = total + weights.sum(dim=(0, 2)).cpu()
        return far / total


FIELDS = [f.name for f in dataclasses.fields(AttnCall) if f.name[0] != "_" and f.name not in ("v", "prologue")]


@contextmanager
def _watched(model: nn.Module, names: list[str], found: dict[str, AttnCall]) -> Iterator[None]:
    """Note the calls of these layers."""
    record = record_of(model)
    assert record is not None

    def note(name: str) -> Any:
        return lambda module, args: found.__setitem__(name, args[0])

    hooks = [record.entries[name].mechanism.register_forward_pre_hook(note(name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def layers(pipe: Any, config: MechanismConfig, args: tuple, kwargs: dict[str, Any]) -> tuple[list[Layer], Description]:
    """The layers that `config` replaces, as they are called when the denoiser gets these arguments; and `describe`.

    Of more than `MOST` layers some, evenly spaced.

    Raises:
        NotImplementedError: the mechanism has no weights between tokens (it merges them first), or the grid is unknown.
    """
    (model,) = denoisers(pipe)
    found: dict[str, AttnCall] = {}
    with lf.applied(pipe, config, fuse_prologue=False):
        record = record_of(model)
        assert record is not None
        mechanisms = {name: entry.mechanism for name, entry in record.entries.items()}
        if any(m.merges_tokens for m in mechanisms.values()):
            raise NotImplementedError(f"{config} merges patches before it attends, so there is no map of them.")
        for host in record.hosts.values():  # whoever is applied, the map needs to know where tokens stand
            host.needs |= {"grid"}
        names = evenly(list(mechanisms), MOST)
        with _watched(model, names, found):
            model(*args, **kwargs)
        report = lf.describe(pipe)
    seen = []
    for name in names:
        call, mechanism = found[name], mechanisms[name]
        grid = call.grid
        if not isinstance(grid, tuple):
            raise NotImplementedError(f"{name}: the places of its tokens in the picture are not known.")
        v = call.v.new_empty(1).expand(call.v.shape)  # its values do not matter
        alone = AttnCall(**{field: getattr(call, field) for field in FIELDS}, v=v, prologue=None)
        seen.append(Layer(name, mechanism.eval().requires_grad_(False), alone, grid))
    return seen, report


def evenly(names: list[str], most: int) -> list[str]:
    """At most so many of `names`, the first and the last with them."""
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


class Step:
    """Notes with what arguments the denoiser is called at one step of a drawing: the last call, if there are several.

    `on_step` is for `generate`; the context manager holds the hook.
    """

    def __init__(self, pipe: Any, step: int) -> None:
        (self.model,) = denoisers(pipe)
        self.step, self.done = step, 0
        self.arguments: tuple[tuple, dict[str, Any]] | None = None

    def on_step(self, done: int) -> None:
        self.done = done

    def __enter__(self) -> Step:
        self.hook = self.model.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.hook.remove()

    def _note(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.done == self.step:
            self.arguments = args, kwargs
