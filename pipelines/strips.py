"""Layers of a convolutional network over a picture too large for them, strip by strip, with the whole picture's norms.

A strip is some full-width rows and as many above and below as the layer looks at (its halo): inside the picture those
replace the layer's zero padding, at the picture's edges the padding stands as it always did. Group norms take their
mean and variance over the whole picture, so each is measured in a pass of its own before it is used. Nothing is
blended.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

STRIP_BYTES = 2**28  # of one strip's largest activation


class Measured(Exception):
    """Ends a strip's forward once the norm that it was run for has been reached."""


class Moments:
    """Mean and variance of groups of channels over strips that come one after another (Chan et al., 1979)."""

    def __init__(self, groups: int) -> None:
        self.groups, self.count = groups, 0
        self.mean: Tensor | float = 0.0
        self.spread: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """`[B, C, ...]`, a part that was not added before."""
        part = x.reshape(x.shape[0], self.groups, -1).float()
        variance, mean = torch.var_mean(part, dim=2, correction=0)
        n, variance, mean = part.shape[2], variance.double(), mean.double()
        total = self.count + n
        delta = mean - self.mean
        self.spread = self.spread + n * variance + delta**2 * (self.count * n / total)
        self.mean = self.mean + delta * (n / total)
        self.count = total

    def affine(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """The norm as a factor and an addend for each channel, `[B, C]` in fp32."""
        assert isinstance(self.mean, Tensor) and isinstance(self.spread, Tensor)
        rstd = (self.spread / self.count + norm.eps).rsqrt()
        wide = norm.num_channels // norm.num_groups
        rstd, mean = (t.repeat_interleave(wide, dim=1) for t in (rstd, self.mean))
        if norm.weight is not None:
            rstd = rstd * norm.weight.double()
        addend = -mean * rstd
        if norm.bias is not None:
            addend = addend + norm.bias.double()
        return rstd.float(), addend.float()


@dataclass
class Layer:
    """Something that runs on rows: `run` is a module or a composition of some.

    Attributes:
        norms: the group norms inside, in the order in which they are reached, all at the output's resolution.
        halo: rows of the input that the output looks at beyond its own, even where the resolution changes.
        channels: of the output.
        passed: leading channels of the input that are only passed through: the first norm does not see them.
        up, down: the output has `up / down` times the rows and columns.
    """

    run: Callable[[Tensor], Tensor]
    norms: list[nn.GroupNorm]
    halo: int
    channels: int
    passed: int = 0
    up: int = 1
    down: int = 1


@dataclass
class Norms:
    """What the patched norms do: use what is known, or measure the one in question and stop there."""

    known: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    wanted: nn.Module | None = None
    moments: Moments | None = None
    rows: slice = field(default_factory=lambda: slice(None))

    def forward(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        if norm is self.wanted:
            assert self.moments is not None
            self.moments.add(x[:, :, self.rows])
            raise Measured
        factor, addend = (t.view(*t.shape, *[1] * (x.ndim - 2)) for t in self.known[norm])
        return torch.addcmul(addend, x, factor, out=torch.empty_like(x))  # in fp32, without a copy of it


@contextmanager
def whole_picture_norms(model: nn.Module) -> Iterator[Norms]:
    """Every group norm of `model` does as `Norms` says within the block."""
    state = Norms()
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    before = [vars(norm).get("forward") for norm in norms]
    for norm in norms:
        norm.forward = functools.partial(state.forward, norm)  # type: ignore[method-assign]
    try:
        yield state
    finally:
        for norm, forward in zip(norms, before, strict=True):
            if forward is None:
                del norm.forward
            else:
                norm.forward = forward  # type: ignore[method-assign]


class Rows:
    """An activation `[B, C, H, W]` as strips of rows, each freed once no layer looks at it any more."""

    def __init__(self, *parts: Tensor) -> None:
        self.parts: list[Tensor | None] = []
        self.ends: list[int] = []
        for part in parts:
            self.append(part)

    def append(self, part: Tensor) -> None:
        self.parts.append(part)
        self.ends.append(self.height + part.shape[2])
        self.shape = part.shape[0], part.shape[1], self.ends[-1], part.shape[3]

    @property
    def height(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows `start:stop`, both given."""
        found, start = [], 0
        for part, end in zip(self.parts, self.ends, strict=True):
            if start < rows.stop and end > rows.start:
                assert part is not None, "rows that were freed"
                found.append(part[:, :, max(0, rows.start - start) : rows.stop - start])
            start = end
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def free(self, until: int) -> None:
        for i, end in enumerate(self.ends):
            if end <= until:
                self.parts[i] = None


@dataclass
class Strips:
    """Runs layers one after another; activations wait on `store`, strips are computed on `device`.

    There is room needed for the larger of a layer's input and output, not for both: rows of the one go as rows of the
    other come.
    """

    norms: Norms
    device: torch.device
    store: torch.device
    dtype: torch.dtype

    def layer(self, layer: Layer, x: Rows, ahead: nn.GroupNorm | None, passed: int = 0) -> Rows:
        """The output in place of the input; the norm ahead, of all but `passed` channels, is measured on the way."""
        out = Rows()
        self.stream(layer, x, lambda first, rows: out.append(rows.to(self.store, copy=True)), ahead, passed)
        return out

    def stream(
        self,
        layer: Layer,
        x: Rows,
        sink: Callable[[int, Tensor], Any],
        ahead: nn.GroupNorm | None = None,
        passed: int = 0,
    ) -> None:
        """The output handed to `sink(first row, [B, C, rows, W])` from top to bottom; `x` is used up."""
        for norm in layer.norms:
            if norm not in self.norms.known:
                self._measure(layer, norm, x)
        moments = None if ahead is None else Moments(ahead.num_groups)
        for first, rows, piece in self._pieces(layer, x, last=True):
            y = layer.run(piece)[:, :, rows]
            if moments is not None:
                moments.add(y[:, passed:])
            sink(first, y)
        for norm in layer.norms:
            del self.norms.known[norm]
        if ahead is not None and moments is not None:
            self.norms.known[ahead] = moments.affine(ahead)

    def _measure(self, layer: Layer, norm: nn.GroupNorm, x: Rows) -> None:
        state, moments = self.norms, Moments(norm.num_groups)
        state.wanted, state.moments = norm, moments
        try:
            for _, rows, piece in self._pieces(layer, x):
                state.rows = rows
                try:
                    layer.run(piece)
                except Measured:
                    continue
                raise AssertionError("a layer lists a norm that it does not reach")
        finally:
            state.wanted = None
        state.known[norm] = moments.affine(norm)

    def _pieces(self, layer: Layer, x: Rows, last: bool = False) -> Iterator[tuple[int, slice, Tensor]]:
        """First row of the output, where its rows stand in the layer's answer, and the rows of input to run on."""
        up, down, halo = layer.up, layer.down, layer.halo
        batch, channels, rows_in, columns = x.shape
        height = rows_in * up // down
        wide = batch * max(channels, layer.channels) * columns * max(1, up // down)
        count = max(2, STRIP_BYTES // (wide * torch.finfo(self.dtype).bits // 8) // 2 * 2)
        for first in range(0, height, count):
            end = min(first + count, height)
            low, high = first * down // up, end * down // up
            start = max(0, low - halo)
            piece = x[start : min(rows_in, high + halo)].to(self.device, self.dtype)
            offset = (low - start) * up // down
            yield first, slice(offset, offset + end - first), piece
            if last:
                x.free(high - halo)
