"""Launching Triton kernels with less of the host's time: at everyday sizes a launch takes longer than the kernel.

Triton works out at every call how its arguments specialise a kernel (25 microseconds with twenty of them, measured).
Here all that follows from the arguments' layout is worked out once, and a further call brings the tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from . import backend

if backend.HAS_TRITON:
    import triton

    # how compiled kernels are called has changed before; older releases are launched the documented way
    _DIRECT = not triton.knobs.runtime.interpret if hasattr(triton, "knobs") else False

# signatures that an op remembers at most
MOST = 4096
Made = TypeVar("Made")


class Remembered(Generic[Made]):
    """`make`, called once for arguments that are alike: tensors by their layout, all others by value.

    A layout is all that a plan or a compiled kernel depends on: Triton compiles anew where a pointer is not aligned to
    16 bytes or a number not a multiple of 16. What is made must not hold the tensors, nor follow from their contents;
    None is not remembered.
    """

    everything: ClassVar[list[Remembered[Any]]] = []

    def __init__(self, make: Callable[..., Made]) -> None:
        self.make = make
        self.known: dict[tuple[Any, ...], Made] = {}
        self.everything.append(self)

    def __call__(self, *arguments: Any) -> Made:
        # no pointer where there is no kernel: tensors of torch.func and fake ones have none
        kinds = [
            (x.shape, x.stride(), x.dtype, x.device, x.is_cuda and x.data_ptr() % 16) if isinstance(x, Tensor) else x
            for x in arguments
        ]
        key = (backend._enabled, backend._interpreted, *kinds)
        made = self.known.get(key)
        if made is None:
            made = self.make(*arguments)
            if made is not None:
                if len(self.known) >= MOST:
                    self.known.clear()
                self.known[key] = made
        return made


def forget() -> None:
    """Make everything anew: after block sizes, or other constants that plans are made from, were changed."""
    for remembered in Remembered.everything:
        remembered.known.clear()


class Launch:
    """A kernel, its grid, and all of its arguments but the tensors, which come first and are always of one layout.

    Args:
        numbers: the arguments after the tensors that are not compile-time constants.
        settings: the constants, and the number of warps.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int, int], numbers: tuple[Any, ...], settings: dict[str, Any]
    ) -> None:
        self.kernel, self.grid, self.numbers, self.settings = kernel, grid, numbers, settings
        self.compiled: tuple[Callable[..., None], tuple[Any, ...]] | None = None

    def __call__(self, *tensors: Tensor) -> None:
        """Run it on the current stream of the tensors' device."""
        device = tensors[0].device.index
        if device is not None and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(*tensors)
        elif self.compiled is not None:
            run, rest = self.compiled
            run(*tensors, *rest)
        else:
            compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.settings)
            if _DIRECT:
                constants = self.kernel.arg_names[len(tensors) + len(self.numbers) :]
                self.compiled = compiled[self.grid], (*self.numbers, *map(self.settings.__getitem__, constants))


@Remembered
def _launch(kernel: Any, grid: tuple[int, int, int], settings: tuple[Any, ...], *arguments: Any) -> Launch:
    return Launch(kernel, grid, tuple(x for x in arguments if not isinstance(x, Tensor)), dict(settings))


def launch(kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
    """A `Launch` by all of its arguments, tensors first, for ops that do not remember it themselves."""
    run = _launch(kernel, grid, tuple(settings.items()), *arguments)
    run(*[x for x in arguments if isinstance(x, Tensor)])
