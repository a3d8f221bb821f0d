"""Tolerances that calibrate themselves, and poisoned memory."""

import pytest
import torch

from linfusion.kernels.launch import Launch, forget


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """An element that an op forgets to write shows up as NaN."""
    real_empty, real_empty_like, real_new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(x):
        return x.fill_(float("nan")) if x.is_floating_point() and x.device.type in ("cpu", "cuda") else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(real_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(real_empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(real_new_empty(*a, **k)))


@pytest.fixture(autouse=True)
def forgetful():
    """Tests change block sizes, which launches remember."""
    forget()
    yield
    forget()


@pytest.fixture
def launched(monkeypatch):
    """Which kernels ran, by name."""
    names, run = [], Launch.__call__

    def listed(self, *tensors):
        names.append(self.kernel.fn.__name__)
        run(self, *tensors)

    monkeypatch.setattr(Launch, "__call__", listed)
    return names


@pytest.fixture
def assert_accurate():
    """flash-attention's rule: at most twice the error of the same formula in the same dtype, plus one rounding step."""

    def check(name, got, same_dtype, exact):
        step = torch.finfo(got.dtype).eps * exact.abs().max().item()
        allowed = 2 * (same_dtype.double() - exact).abs().max().item() + step
        error = (got.double() - exact).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"

    return check
