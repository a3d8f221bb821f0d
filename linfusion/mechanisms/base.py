"""What every mechanism is: a frozen config, and a module that turns an `AttnCall` into `[B, S, H, D]`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..call import AttnCall, Clock, Layout, Merged, Site, Stream


@dataclasses.dataclass(frozen=True)
class MechanismConfig:
    """Settings of a mechanism: the public API, the `config.json` and the repr at once.

    `name` is the mechanism's name on the command line and on disk; `published` its parameters by the names that its
    authors' weights give them, below the attention layer.
    """

    name: ClassVar[str]
    published: ClassVar[dict[str, str]] = {}

    def passes(self, site: Site) -> str | None:
        """Why this mechanism leaves the layer as it is, a sentence; None where it takes it.

        A model in which it leaves all layers is refused with that reason.
        """
        return None

    def build(self, site: Site) -> Mechanism:
        """The module for one layer, with its parameters freshly initialised.

        Raises:
            ValueError, NotImplementedError: the layer cannot take this mechanism, with the reason.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready settings, with the name."""
        settings = dataclasses.asdict(self)
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}

    def __str__(self) -> str:
        """As one would write it: settings at their defaults are left out."""
        given = [
            (f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given)})"


class Mechanism(nn.Module):
    """A layer's attention. Lives at `attention_layer.linfusion`, so that the host's own hooks reach its parameters.

    Attributes:
        kernel: the op of `kernels` that computes its attention, where that has more than one implementation.
        needs: what the family must supply: any of "grid", "time", "stream", or "references", for those that need no
            grid but which tokens are outside of it. Nothing where the host's own order of tokens is as good as any.
        honours_mask: whether a mask of the whole sequence can be used.
        honours_backend: whether the host's attention backend does the work.
        changes_input: whether `features` does anything.
        merges_tokens: whether `merge` stands between the hidden states and the projections.
        layout: what the host's latest forward said about its sequence.
        clock: and about its place on the noise schedule.
        fuse_prologue: whether one kernel may do the host's norms and rotation where it can run.
        stream: what the layer's input was before its norm.
        ran: dtype and device of the latest eager forward's queries, and how many elements they had; None before it.
    """

    kernel: ClassVar[str | None] = None
    needs: ClassVar[frozenset[str]] = frozenset()
    honours_mask: ClassVar[bool] = False
    honours_backend: ClassVar[bool] = False
    changes_input: ClassVar[bool] = False
    merges_tokens: ClassVar[bool] = False
    layout: Layout
    clock: Clock
    fuse_prologue: bool = True
    stream: Stream
    ran: tuple[torch.dtype, torch.device, int] | None = None

    def __init__(self, config: MechanismConfig, site: Site) -> None:
        super().__init__()
        self.config = config
        self.site = site
        self.layout = Layout()
        self.clock = Clock()
        self.stream = Stream()

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the host's query and key projections, from the image's hidden states `[B, N, C]`."""
        return x, x

    def merge(self, x: Tensor) -> Merged:
        """Fewer tokens in place of the image's hidden states `[B, N, C]`; only where `merges_tokens`."""
        raise NotImplementedError

    def forward(self, call: AttnCall) -> Tensor:
        """Attention output `[B, S, H, D]`."""
        raise NotImplementedError

    def pairs(self, grid: tuple[int, ...], text: int) -> float:
        """Work of one head in units of one query-key pair of softmax attention (two dot products of length D)."""
        raise NotImplementedError
