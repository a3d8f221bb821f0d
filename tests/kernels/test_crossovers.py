"""Which implementation is chosen: by what was measured on a GPU, by an override, never by other maths."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import linfusion as lf
from linfusion.kernels import backend, crossovers, linear, use_backend
from linfusion.kernels.bench import checks, here, ops, runner, timing
from linfusion.kernels.crossovers import Crossover

from ..models import forward

GPU = torch.device("cuda")
KNOWN = [
    Crossover("linear_attention", "bfloat16", 64, 4096, 1024),
    Crossover("linear_attention", "bfloat16", 128, 0, 2048),
    Crossover("linear_attention", "float32", 64, None, 0),
    Crossover("depthwise_conv", "bfloat16", 64, 100),
]


@pytest.fixture(autouse=True)
def files(monkeypatch, tmp_path):
    """This user's file, on a machine with one kind of GPU, and nothing that the package brings."""
    monkeypatch.setenv("LINFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(crossovers, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setattr(crossovers, "_name", lambda device: "a GPU")
    crossovers.forget()
    yield
    crossovers.forget()


@pytest.fixture
def known():
    crossovers.write(crossovers.own_file(), "a GPU", {"date": "today"}, KNOWN)


def found(dim, dtype=torch.bfloat16, op="linear_attention", device=GPU):
    return crossovers.crossover(op, dim, dtype, device)


def test_the_nearest_measured_counts(known):
    assert [found(d).dim for d in (40, 64, 72, 128, 256)] == [64, 64, 128, 128, 128]
    assert found(64, torch.float16) == KNOWN[0] and found(64, torch.float32) == KNOWN[2]
    assert found(None, op="depthwise_conv") == KNOWN[3]
    assert found(64, op="agent_attention") is None and found(64, device=torch.device("cpu")) is None


def test_an_unknown_gpu_has_no_crossovers(known, monkeypatch):
    monkeypatch.setattr(crossovers, "_name", lambda device: "another GPU")
    assert found(64) is None and backend.slower("linear_attention", 64, torch.bfloat16, GPU, 1) is None


def test_own_measurements_come_before_those_of_the_package():
    crossovers.write(crossovers.SHIPPED, "a GPU", {}, KNOWN[1:2])
    assert found(64) == KNOWN[1]
    crossovers.write(crossovers.own_file(), "a GPU", {}, KNOWN[:1])
    assert found(64) == KNOWN[0]


def test_other_gpus_stay_in_the_file(known):
    file = crossovers.own_file()
    crossovers.write(file, "another GPU", {"date": "now"}, KNOWN[:1])
    every = crossovers.read(file)
    assert every["a GPU"]["crossovers"] == KNOWN and every["another GPU"]["crossovers"] == KNOWN[:1]
    assert json.loads(file.read_text())["another GPU"]["date"] == "now"


@pytest.mark.parametrize("text", ["{", '{"a GPU": 3}', '{"a GPU": {"crossovers": [{"op": "x"}]}}', "[]"])
def test_a_broken_file_says_so(text):
    file = crossovers.own_file()
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(ValueError, match=r"crossovers.json holds no crossovers .* linfusion bench --here"):
        found(64)


def test_which_is_slower(known):
    def slower(elements, dim=64, dtype=torch.bfloat16):
        return backend.slower("linear_attention", dim, dtype, GPU, elements)

    assert slower(4096) is None and "below 4096 elements" in slower(4095)
    assert slower(1, dim=128) is None and "at all sizes" in slower(10**9, dtype=torch.float32)


@pytest.fixture
def as_gpu(monkeypatch):
    """Tensors of Triton's interpreter count as a GPU's."""
    pytest.importorskip("triton")
    monkeypatch.setattr(backend, "crossover", lambda op, dim, dtype, device: found(dim, op=op))
    with backend.interpreted():
        yield


def test_calls_are_chosen_by_size(known, as_gpu):
    small, large = torch.empty(1, 63, 1, 64), torch.empty(1, 64, 1, 64)

    def why_not(x):
        return backend.why_not_triton("linear_attention", 64, x)

    assert "below 4096 elements" in why_not(small) and why_not(large) is None
    with use_backend("triton"):
        assert why_not(small) is None
    with use_backend("torch"):
        assert why_not(large) == "Triton is switched off here"
    # only what can run is chosen between
    assert why_not(large.double()) == "torch.float64 is computed by PyTorch"


def test_the_choice_reaches_the_op(known, as_gpu, monkeypatch):
    """And changes nothing but the implementation."""
    in_torch = []
    right = linear.reference.linear_attention
    monkeypatch.setattr(
        linear, "reference", SimpleNamespace(linear_attention=lambda *a, **k: (in_torch.append(1), right(*a, **k))[1])
    )
    q = torch.randn(1, 20, 2, 16)
    want = linear.linear_attention(q, q, q)
    assert in_torch == [1]
    with use_backend("triton"):
        torch.testing.assert_close(linear.linear_attention(q, q, q), want, rtol=1e-4, atol=1e-5)
    assert in_torch == [1]


def test_overrides_end_and_unknown_ones_are_refused():
    before = backend._enabled
    with pytest.raises(RuntimeError), use_backend("torch"):
        raise RuntimeError
    assert backend._enabled == before
    with (
        pytest.raises(ValueError, match=r"Unknown backend 'cuda'. Available: auto, triton, torch"),
        use_backend("cuda"),
    ):
        pass


def test_describe(known, tiny, model, inputs, monkeypatch):
    """What the latest forward ran in, and where exact attention would be faster: said, not acted on."""
    lf.apply(model, lf.LinFusion())
    assert {r.backend for r in lf.describe(model).layers} == {None}
    forward(model, inputs)
    assert all(r.backend.startswith("PyTorch: ") for r in lf.describe(model).layers if r.mechanism)
    module = sys.modules["linfusion.describe"]  # the name is the function's, too
    monkeypatch.setattr(module, "crossover", lambda op, dim, dtype, device: found(dim, op=op))
    monkeypatch.setattr(module, "explain", lambda *about: None)
    report = lf.describe(model)
    assert {r.backend for r in report.layers if r.mechanism} == {"Triton; exact attention is faster up to 1024 tokens"}
    assert "1024" in str(report)
    lf.apply(model, lf.Softmax())
    forward(model, inputs)
    assert {r.backend for r in lf.describe(model).layers} == {None}


# the measurement itself, with a clock that says what it is told


@pytest.mark.parametrize(
    ("won", "start"), [("11111", 0), ("00111", 30), ("10101", 50), ("11110", None), ("00000", None)]
)
def test_where_a_crossover_is(won, start):
    assert here._start([(10 * (i + 1), w == "1") for i, w in enumerate(won)]) == start


def session(lines):
    return runner.Session(torch.device("cpu"), lines.append, git="abc")


@pytest.fixture
def clock(monkeypatch):
    """PyTorch takes 2 ms, Triton 3 up to 64 tokens and 1 beyond, exact attention 1.5 up to 256 tokens."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(here, "SIDES", (8, 16))
    monkeypatch.setattr(here, "HEADS", 1)
    monkeypatch.setattr(checks, "CUT", 64)
    monkeypatch.setattr(here, "release", lambda session: None)  # collecting garbage takes most of the time

    def loop(fn, calls=1, rounds=1):
        out = fn()[0]
        ours = {"triton": 3.0 if out.shape[1] <= 64 else 1.0, "": 2.0}.get(backend._enabled, 1.5)
        return (ours,) * 3

    monkeypatch.setattr(timing, "loop", loop)


def test_measuring_here(clock):
    lines = []
    file = here.measure(session(lines))
    assert file == crossovers.own_file() and any("checked" in line for line in lines)
    measured = crossovers.read(file)["a GPU"]
    assert measured["git"] == "abc" and {c.op for c in measured["crossovers"]} == {x.op for x in here.LADDERS}
    assert found(64) == Crossover("linear_attention", "bfloat16", 64, 256 * 64, 64)
    assert found(128, torch.float32, "agent_attention") == Crossover("agent_attention", "float32", 128, 256 * 128, 64)
    assert found(64, op="depthwise_conv") == Crossover("depthwise_conv", "bfloat16", 64, 256 * 64, None)


def test_a_wrong_kernel_is_never_chosen(clock, monkeypatch):
    right, lines = ops.KERNELS["linear"].ours, []

    def wrong(case):
        made = right(case)
        return made._replace(call=lambda **given: 1.1 * made.call(**given))

    monkeypatch.setattr(ops.KERNELS["linear"], "ours", wrong)
    given = session(lines)
    assert here.climb(here.LADDERS[0], 64, torch.float32, given).triton_from is None
    assert given.refused and any("REFUSED" in line for line in lines)


def test_the_ladders_are_of_ops_that_ask():
    """A name that no op asks by would be measured for nothing."""
    for ladder in here.LADDERS:
        assert any(f'"{ladder.op}"' in file.read_text() for file in Path(backend.__file__).parent.glob("*.py"))
