"""Memory budgets: savings change nothing but rounding, are taken in order, and the stage that fails is run again."""

from contextlib import contextmanager

import pytest
import torch
from diffusers import StableDiffusionPipeline

import linfusion as lf
from linfusion.pipelines import memory as module
from linfusion.pipelines.cascade import cascade
from linfusion.pipelines.memory import SAVINGS, Budget, frugal, parse_memory, savings

from ..models import HOSTS, cast, forward, gap


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), ("24 gb", 24 * 10**9), ("1.5Mi", 3 * 2**19), (512, 512), ("8k", 8000)]
)
def test_sizes(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "1..2", 0, "0.1"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="such as 24GiB"):
        parse_memory(text)


class Around:
    """A pipeline's surface."""

    def __init__(self, name, model):
        setattr(self, "unet" if name.startswith("unet") else "transformer", model)
        self.components, self.device = {"model": model}, torch.device("cpu")


@pytest.mark.parametrize("name", ["unet-sdxl", "pixart", "sd3", "flux", "qwen-padded", "z-image"])
@pytest.mark.parametrize("mechanism", [None, lf.CLEAR(3)])
def test_savings_are_exact(name, mechanism, monkeypatch):
    """Guidance in two passes and feed-forward in chunks, with masks and lists of samples, under a mechanism too.

    In float64, since the hosts here amplify rounding.
    """
    tiny = HOSTS[name]
    model, inputs = tiny.build().double(), cast(tiny.inputs(6, 4), torch.float64)
    if mechanism is not None:
        lf.apply(model, mechanism)
    whole = forward(model, inputs)
    rows: list = []
    hook = next(m for m in model.modules() if hasattr(m, "to_q")).register_forward_pre_hook(
        lambda m, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    lengths: list = []
    chunks = module._in_chunks
    monkeypatch.setattr(module, "_in_chunks", lambda *a: lengths.append(a[2][0].shape[1]) or chunks(*a))
    with savings(Around(name, model), 2) as said:
        out = forward(model, inputs)
    hook.remove()
    assert gap(out, whole) < 1e-10 and set(rows) == {1} and len(rows) == 2
    assert (SAVINGS[1] in said) == bool(lengths)
    assert all("forward" not in vars(m) for m in model.modules())
    assert torch.equal(forward(model, inputs), whole)


def test_foresight():
    """From the last stage's peak; never fewer savings than that needed."""
    assert Budget().begin(100) == 0 and Budget(savings=2).begin(100) == 2 and Budget(limit=10).begin(100) == 0
    last = Budget(limit=100, peak=30, weights=10, pixels=1)
    assert [last.begin(n) for n in (1, 4, 5, 9, 12, 1000)] == [0, 0, 1, 1, 2, len(SAVINGS)]


@pytest.fixture
def device(monkeypatch):
    """A GPU that exists for bookkeeping only; the limits that its allocator was held to."""
    limits: list = []
    monkeypatch.setattr(module, "_device", lambda pipe: torch.device("cuda"))
    for name, result in [("memory_allocated", 10), ("max_memory_allocated", 30)]:
        monkeypatch.setattr(torch.cuda, name, lambda device, result=result: result)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *a: None)

    @contextmanager
    def held(device, limit):
        limits.append(limit)
        yield

    monkeypatch.setattr(module, "_held_to", held)
    return limits


def test_the_next_saving_after_running_out(device):
    pipe, tries = HOSTS["flux"].build_pipeline(), []

    def run():
        tries.append(1)
        if len(tries) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return "done"

    budget = Budget(limit=1000)
    result, remarks = frugal(pipe, budget, 4, run)
    assert result == "done" and device == [1000]
    assert "CUDA out of memory" in remarks[0] and SAVINGS[0] in remarks[0] and SAVINGS[1] in remarks[1]
    assert remarks[2] == f"To fit into memory: {SAVINGS[0]}, {SAVINGS[1]}."
    assert (budget.peak, budget.weights, budget.pixels, budget.savings) == (30, 10, 4, 2)


def test_all_savings_are_not_enough(device, monkeypatch):
    pipe = HOSTS["flux"].build_pipeline()
    monkeypatch.setattr(StableDiffusionPipeline, "enable_model_cpu_offload", None)

    @contextmanager
    def nothing(pipe):
        yield False

    monkeypatch.setattr(module, "_offload", nothing)

    def run():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried.")

    with pytest.raises(MemoryError, match="CUDA out of memory.*Finished stages are in x"):
        frugal(pipe, Budget(), 4, run, "Finished stages are in x.")
    assert not any("forward" in vars(m) for m in pipe.transformer.modules())


def test_a_cascade_says_what_it_saved():
    from .test_cascade import PIPES

    pipe, arguments = HOSTS["unet-sd15"].build_pipeline().to(torch.float64), cast(PIPES["unet-sd15"][0], torch.float64)
    settings = dict(steps=2, strength=0.5, guidance=4.0, arguments=arguments)
    whole = cascade(pipe, None, (16, 32), **settings)
    saved = cascade(pipe, None, (16, 32), memory="1GiB", **settings)
    assert gap(saved.latents, whole.latents) < 1e-8
    assert all(SAVINGS[0] in s.remarks[0] and "cpu" in s.remarks[0] for s in saved.stages)
