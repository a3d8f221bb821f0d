"""Launching Triton kernels with less of the host's time: at everyday sizes a launch takes longer than the kernel.

Triton works out at every call how its arguments specialise a kernel (25 microseconds with twenty of them, measured).
Here the compiled kernel is kept under a key that tells apart at least all that Triton tells apart, and called directly.
"""

from typing import Any

from torch import Tensor

from .backend import HAS_TRITON

if HAS_TRITON:
    import triton

    # how compiled kernels are called has changed before; older releases are launched the documented way
    _DIRECT = not triton.knobs.runtime.interpret if hasattr(triton, "knobs") else False

_compiled: dict[Any, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    settings: dict[str, Any],
    descriptors: tuple[Any, ...] = (),
) -> None:
    """Run `kernel` on the current stream.

    Args:
        arguments: those that are not compile-time constants, in the kernel's order, which come first there: tensors,
            then numbers.
        settings: the constants, always in the same order, and the number of warps.
        descriptors: tensors as the copy engine wants them, which stand between tensors and numbers.
    """
    if not _DIRECT:
        tensors = sum(isinstance(x, Tensor) for x in arguments)
        kernel[grid](*arguments[:tensors], *descriptors, *arguments[tensors:], **settings)
        return
    # tensors count by type and alignment; numbers by value, which is quicker than to ask what Triton asks of each
    kinds = [(x.dtype, x.data_ptr() % 16) for x in arguments if isinstance(x, Tensor)]
    key = (id(kernel), arguments[0].device.index, *settings.values(), *kinds, *arguments[len(kinds) :])
    key += tuple([(x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else tuple(x.block_shape) for x in descriptors])
    if descriptors:
        arguments = (*arguments[: len(kinds)], *descriptors, *arguments[len(kinds) :])
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*arguments, **settings)
        return
    compiled[grid](*arguments, *map(settings.__getitem__, kernel.arg_names[len(arguments) :]))
