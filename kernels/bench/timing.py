"""Milliseconds and memory of a call on the GPU, by one method for everybody."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

QUANTILES = (0.5, 0.2, 0.8)
WARMUP, REP = 25, 100  # milliseconds
SLOW = 300  # milliseconds, from which on three calls must do

Times = tuple[float, float, float]
"""Quantiles in milliseconds, as in QUANTILES."""


def each(fn: Callable[[], object]) -> Times:
    """Each call between two events, its inputs swept out of the cache before."""
    from triton.testing import do_bench

    fn()
    if _once(fn) > SLOW:
        return quantiles([_once(fn) for _ in range(3)])
    p50, p20, p80 = do_bench(fn, warmup=WARMUP, rep=REP, quantiles=list(QUANTILES))
    return p50, p20, p80


def _once(fn: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    fn()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def graph(ready: Callable[[], Callable[[], object]], calls: int = 20, replays: int = 10) -> Times:
    """A CUDA graph of many calls, replayed: no launches from the host, caches as warm as they get.

    `ready` makes the call, on the stream that is captured: a backward pass runs on the stream of its forward pass.
    """
    stream, recorded, taken = torch.cuda.Stream(), torch.cuda.CUDAGraph(), []
    with torch.cuda.stream(stream):
        fn = ready()
        for _ in range(3):
            fn()
        torch.cuda.synchronize()
        with torch.cuda.graph(recorded, stream=stream):
            for _ in range(calls):
                fn()
        for _ in range(replays + 2):
            taken.append(_once(recorded.replay) / calls)
    return quantiles(taken[2:])


def loop(fn: Callable[[], object], calls: int = 20, rounds: int = 10) -> Times:
    """Call after call by the host's clock: where the host is slower than the GPU, this shows it."""
    taken = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - start) * 1000 / calls)
    return quantiles(taken[2:])


def quantiles(taken: list[float]) -> Times:
    """Of a few measurements: the median, and the values a fifth of the way from either end."""
    ordered, fifth = sorted(taken), len(taken) // 5
    return statistics.median(ordered), ordered[fifth], ordered[-1 - fifth]


MIB = 2**20


def peak_mib(call: Callable[[], object], held: Iterable[Tensor]) -> float:
    """MiB that a call holds at its worst, with `held`, its inputs, which were there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return (peak + storage_bytes(held)) / MIB


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Memory of the tensors, that which several share counted once."""
    storages = {s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors)}
    return sum(storages.values())
