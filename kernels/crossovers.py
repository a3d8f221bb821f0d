"""Which implementation is faster at which size: measured once for a GPU, by `linfusion bench --here`.

An op chooses between implementations of the same maths only. Where exact attention would be faster than a mechanism is
known too, and said by `describe`, but never acted on: it would be another picture.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

SHIPPED = Path(__file__).with_name("crossovers.json")


class Crossover(NamedTuple):
    """Of one op on one GPU, for one dtype and head dim (0 where channels are not grouped), forward.

    Attributes:
        triton_from: elements of the op's first tensor from which on Triton is faster than PyTorch; None for never.
        exact_until: tokens up to which softmax attention by PyTorch is faster than either; 0 for never, None where the
            op is no attention.
    """

    op: str
    dtype: str
    dim: int
    triton_from: int | None
    exact_until: int | None = None


def own_file() -> Path:
    """Where this user's measurements are: `crossovers.json` in `LINFUSION_CACHE`, else in the user's cache folder."""
    folder = os.environ.get("LINFUSION_CACHE")
    if folder is None:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "linfusion")
    return Path(folder) / "crossovers.json"


def read(path: Path) -> dict[str, Any]:
    """By the GPU's name: when and with what it was measured, and its crossovers; empty without such a file.

    Raises:
        ValueError: a file of another form.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            gpu: entry | {"crossovers": [Crossover(**c) for c in entry["crossovers"]]} for gpu, entry in found.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no crossovers ({error!r}); delete it, or run linfusion bench --here.") from None


def write(path: Path, gpu: str, about: dict[str, str], measured: Iterable[Crossover]) -> None:
    """Put one GPU's crossovers into a file, in place of those it had; others stay."""
    every = {name: e | {"crossovers": [c._asdict() for c in e["crossovers"]]} for name, e in read(path).items()}
    every[gpu] = about | {"crossovers": [c._asdict() for c in measured]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")
    forget()


@functools.cache
def _of_gpu(gpu: str) -> dict[str, list[Crossover]]:
    """By op; the user's own measurements before those that the package brings."""
    found: list[Crossover] = []
    for path in (own_file(), SHIPPED):
        found = found or read(path).get(gpu, {}).get("crossovers", [])
    return {op: [c for c in found if c.op == op] for op in {c.op for c in found}}


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def forget() -> None:
    """Read the files again."""
    _of_gpu.cache_clear()
    crossover.cache_clear()


@functools.cache
def crossover(op: str, dim: int | None, dtype: torch.dtype, device: torch.device) -> Crossover | None:
    """The nearest measured: the next larger head dim, else the largest, fp16 as bf16; None on an unknown GPU."""
    if device.type != "cuda":
        return None
    kind = "float32" if dtype is torch.float32 else "bfloat16"
    known = sorted((c for c in _of_gpu(_name(device)).get(op, ()) if c.dtype == kind), key=lambda c: c.dim)
    return next((c for c in known if c.dim >= (dim or 0)), known[-1] if known else None)
