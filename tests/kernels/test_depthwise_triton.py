"""Triton's depthwise convolution in its interpreter, against the specification in float64."""

import math
import os
import subprocess
import sys

import pytest
import torch

from linfusion.kernels import depthwise_conv, depthwise_launch, launch, reference
from linfusion.kernels.backend import interpreted, without_triton
from linfusion.kernels.launch import forget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
REAL = depthwise_launch.TILES


@pytest.fixture(autouse=True)
def triton():
    pytest.importorskip("triton")
    with interpreted():
        yield


@pytest.fixture(autouse=True)
def few_operations(monkeypatch):
    """Blocks that suit the interpreter: it pays for the number of operations, not for their size."""
    if DEVICE == "cpu":
        tiles = {n: {k: t._replace(channels=128, columns=2) for k, t in by.items()} for n, by in REAL.items()}
        monkeypatch.setattr(depthwise_launch, "TILES", tiles)


@pytest.fixture
def many_programs(monkeypatch):
    """As on a large device: strips are cut into three, the weight's gradient into parts."""
    monkeypatch.setattr(depthwise_launch, "multiprocessors", lambda device: 8)
    monkeypatch.setattr(depthwise_launch, "SCRATCH", 8.0)
    monkeypatch.setattr(depthwise_launch, "cut", lambda height, *_: -(-height // 3))


def inputs(grid, size, shared, dim, heads=2, batch=2, dtype=torch.float32):
    channels = dim if shared else heads * dim
    v = torch.randn(batch, math.prod(grid), heads, dim, dtype=dtype, device=DEVICE)
    weight = torch.randn(channels, size, size, dtype=dtype, device=DEVICE)
    return {"v": v, "weight": weight, "bias": weight.new_empty(channels).normal_(), "add": torch.randn_like(v)}


def run(function, given, grid, grad, **more):
    """Output and gradients of all that is given, by name."""
    given = {name: x if x.requires_grad else x.detach().requires_grad_() for name, x in given.items()}
    out = function(grid=grid, **given, **more)
    grads = torch.autograd.grad(out, list(given.values()), grad.to(out.dtype))
    return {"out": out.detach()} | {f"d{name}": g for name, g in zip(given, grads, strict=True)}


def compare(assert_accurate, given, grid, **more):
    batch, tokens, heads, dim = given["v"].shape
    tokens += given["text"].shape[1] if "text" in given else 0
    grad = torch.randn(batch, tokens, heads, dim, device=DEVICE).to(given["v"].dtype)
    got = run(depthwise_conv, given, grid, grad, **more)
    with without_triton():
        same_dtype = run(depthwise_conv, given, grid, grad, **more)
    exact = run(reference.depthwise_conv, {n: x.double() for n, x in given.items()}, grid, grad, **more)
    for name, x in got.items():
        assert x.dtype == same_dtype[name].dtype and x.shape == same_dtype[name].shape
        assert_accurate(name, x, same_dtype[name], exact[name])
    return got, grad


CASES = [  # grid, size, shared, dim, what is left out
    ((1, 1), 5, True, 8, ()),
    ((1, 1), 1, False, 40, ("add", "bias")),
    ((5, 7), 1, True, 40, ()),
    ((5, 7), 3, False, 72, ("bias",)),
    ((5, 7), 5, True, 40, ("add",)),
    ((5, 7), 7, False, 8, ()),
    ((3, 5, 7), 3, True, 8, ("add", "bias")),
    ((3, 5, 7), 5, False, 40, ()),
    ((2, 2, 3), 7, True, 72, ("bias",)),
]


@pytest.mark.parametrize(("grid", "size", "shared", "dim", "without"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_accuracy(assert_accurate, launched, grid, size, shared, dim, without, dtype):
    given = inputs(grid, size, shared, dim, batch=2 if grid[0] == 1 else 1, dtype=dtype)
    compare(assert_accurate, {n: x for n, x in given.items() if n not in without}, grid)
    assert launched == ["forward_kernel", "forward_kernel", "weight_kernel", "sum_kernel"]


@pytest.mark.parametrize(
    ("grid", "size", "dim", "real"),
    [((16, 24), 3, 40, False), ((9, 20), 3, 72, True), ((2, 6, 3), 5, 8, False), ((5, 3), 7, 8, False)],
    ids=str,
)
def test_cut_into_pieces(assert_accurate, many_programs, monkeypatch, grid, size, dim, real):
    if real:
        monkeypatch.setattr(depthwise_launch, "TILES", REAL)
    given = inputs(grid, size, True, dim, heads=1, batch=1)
    got, grad = compare(assert_accurate, given, grid)
    again = run(depthwise_conv, given, grid, grad)
    assert all(torch.equal(again[n], got[n]) for n in got)
    # the pieces do not show in the values
    monkeypatch.setattr(depthwise_launch, "cut", lambda height, *_: height)
    forget()
    assert torch.equal(depthwise_conv(grid=grid, **given), got["out"])  # by the operator and without


@pytest.mark.parametrize("height", [1, 7, 64, 128, 1000])
@pytest.mark.parametrize("columns", [1, 30, 384, 5000])
@pytest.mark.parametrize("reach", [0, 2])
def test_cut(height, columns, reach):
    """Rows of a piece: no empty pieces, and few columns are cut where there is room beside them."""
    rows = depthwise_launch.cut(height, reach, columns, 396, height)
    pieces = -(-height // rows)
    assert 1 <= rows <= height and rows * (pieces - 1) < height
    assert pieces == 1 or -(-columns * pieces // 396) * rows < -(-columns // 396) * height
    assert depthwise_launch.cut(height, reach, columns, 396, 1) == height
    if height >= 64 and columns < 40:
        assert pieces > 4


def test_what_would_be_noticed():
    given = inputs((5, 7), 3, True, 8)
    grad = torch.randn_like(given["v"])
    right = run(depthwise_conv, given, (5, 7), grad)
    wrong = run(depthwise_conv, given | {"weight": given["weight"].flip(1, 2)}, (5, 7), grad)
    turned = run(depthwise_conv, given | {"weight": given["weight"].mT}, (5, 7), grad)
    for other in (wrong, turned, run(depthwise_conv, given, (7, 5), grad)):
        assert (other["out"] - right["out"]).abs().max() > 0.1
        assert (other["dv"] - right["dv"]).abs().max() > 0.1


def joint(x):
    """The image part of a longer sequence; what stands around is no number."""
    return torch.cat((torch.full_like(x[:, :3], float("nan")), x, torch.full_like(x[:, :2], float("nan"))), 1)[:, 3:-2]


LAYOUTS = {
    "joint": joint,
    "fused": lambda x: torch.stack((x, torch.full_like(x, float("nan"))), dim=3)[:, :, :, 0],
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one of a batch": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "channels"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided(assert_accurate, launched, layout, shared):
    given = inputs((3, 5), 3, shared, 40)
    views = given | {name: LAYOUTS[layout](given[name]) for name in ("v", "add")}
    assert not views["v"].is_contiguous()
    compare(assert_accurate, views, (3, 5))
    compare(assert_accurate, given | {"v": views["v"]}, (3, 5))
    assert "weight_kernel" in launched


def test_gradients_come_in_any_layout():
    given = inputs((3, 5), 3, True, 40)
    for x, y in (
        (given["add"], LAYOUTS["heads first"](given["add"])),
        (torch.ones_like(given["v"]), torch.ones((), device=DEVICE).expand(given["v"].shape)),
    ):
        want, got = run(depthwise_conv, given, (3, 5), x), run(depthwise_conv, given, (3, 5), y)
        assert all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.parametrize("first", [True, False], ids=["text-first", "text-last"])
def test_text_is_carried_along(assert_accurate, first):
    given = inputs((4, 6), 3, True, 8)
    given["text"] = torch.randn(2, 5, 2, 8, device=DEVICE)
    got = compare(assert_accurate, given, (4, 6), text_first=first)[0]["out"]
    text, image = got.split((5, 24) if first else (24, 5), dim=1)[:: 1 if first else -1]
    assert torch.equal(text, given["text"])
    assert torch.equal(image, depthwise_conv(grid=(4, 6), **{n: x for n, x in given.items() if n != "text"}))


@pytest.mark.parametrize("leaf", ["v", "weight", "bias", "add"])
def test_one_gradient_alone(launched, leaf):
    given = inputs((4, 6), 3, False, 8)
    want = run(depthwise_conv, given, (4, 6), given["v"])[f"d{leaf}"]
    launched.clear()
    given[leaf].requires_grad_()
    (got,) = torch.autograd.grad(depthwise_conv(grid=(4, 6), **given), given[leaf], given["v"])
    assert torch.equal(got, want)
    extra = {"v": ["forward_kernel"], "add": []}.get(leaf, ["weight_kernel", "sum_kernel"])
    assert launched == ["forward_kernel", *extra]


def test_weights_may_be_wider_than_values():
    given = inputs((4, 6), 3, True, 40)
    v, add = given["v"].half(), given["add"].half()
    narrow = given | {"v": v, "add": add}
    got = run(depthwise_conv, narrow, (4, 6), v)
    exact = run(reference.depthwise_conv, {n: x.double() for n, x in narrow.items()}, (4, 6), v)
    assert got["out"].dtype == torch.float16 and got["dweight"].dtype == got["dbias"].dtype == torch.float32
    # only the output is rounded, not the weight
    assert (got["out"] - exact["out"]).abs().max() <= 2**-11 * exact["out"].abs().max()
    torch.testing.assert_close(got["dweight"].double(), exact["dweight"], rtol=1e-5, atol=1e-5)


def test_a_size_without_a_kernel(launched, assert_accurate):
    compare(assert_accurate, inputs((4, 6), 9, True, 8), (4, 6))
    assert not launched


@pytest.mark.parametrize("late", [False, True], ids=["known", "tensor"])
def test_opcheck(late):
    given = inputs((3, 4), 3, True, 8)
    leaves = [given[n].requires_grad_() for n in ("v", "weight", "bias", "add")]
    text = torch.randn(2, 2, 2, 8, device=DEVICE, requires_grad=True)
    grid = ([], torch.tensor([3, 4])) if late else ([3, 4], None)
    torch.library.opcheck(torch.ops.linfusion.depthwise_conv.default, (*leaves, text, True, *grid))


def test_compiles_whole(launched):
    def both(given, grid):
        return depthwise_conv(grid=grid, **given)

    given = inputs((3, 4), 3, True, 8)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    want = run(lambda **given: depthwise_conv(**given), given, (3, 4), given["v"])
    for grid in ((3, 4), torch.tensor([3, 4])):
        launched.clear()
        got = run(lambda grid, **given: compiled(given, grid), given, grid, given["v"])
        assert all(torch.equal(got[n], want[n]) for n in want)
        assert "weight_kernel" in launched


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"add": torch.zeros(2, 12, 1, 16)}, r"add must be \(2, 12, 2, 8\) torch.float32 as v"),
        ({"add": torch.zeros(2, 12, 2, 8, dtype=torch.float16)}, "got .* torch.float16"),
        ({"text": torch.zeros(2, 3, 1, 8)}, r"text must be \[2, T, 2, 8\]"),
        ({"grid": (3, 5)}, "3 x 5 = 15"),
    ],
    ids=["shape", "dtype", "text", "grid"],
)
def test_bad_input(change, message):
    given = inputs((3, 4), 3, True, 8) | {"grid": (3, 4)}
    with pytest.raises(ValueError, match=message):
        depthwise_conv(**(given | change))


@pytest.mark.parametrize(
    ("grid", "heads", "dim"), [((128, 128), 24, 128), ((1024, 1024), 10, 64), ((21, 30, 52), 12, 128)]
)
@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_memory(monkeypatch, size, grid, heads, dim):
    """Partial sums take under a twentieth of what goes in and comes out, and every program has work."""
    launches, taken = [], []

    class Launcher:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, programs):
            launches.append((self.name, programs))
            return lambda *arguments, **constants: None

    class Kernels:
        def __getattr__(self, name):
            return Launcher(name)

    empty = torch.empty
    monkeypatch.setattr(depthwise_launch, "triton_kernels", Kernels())
    monkeypatch.setattr(launch, "_DIRECT", False)
    monkeypatch.setattr(depthwise_launch, "TILES", REAL)
    monkeypatch.setattr(depthwise_launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: taken.append(empty(*a, **k)) or taken[-1])
    v = empty((1, math.prod(grid), heads, dim), dtype=torch.bfloat16, device="meta")
    weight = empty((dim, size, size), device="meta")
    depthwise_launch.weight_gradient(v, v, weight, None, grid)
    assert sum(x.numel() * x.element_size() for x in taken) < 0.05 * 3 * v.numel() * 2
    depthwise_launch.convolve(v, weight, None, v, v, grid)
    assert all(
        math.prod(programs) >= 128 and max(programs[1:]) < 65536 for name, programs in launches if "sum" not in name
    )


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from linfusion.kernels import depthwise_launch, depthwise_triton as kernels

def build(kernel, **constants):
    tile = depthwise_launch.TILES["forward"][constants["K"]]
    constants |= dict(CHANNELS=tile.channels, COLUMNS=tile.columns, TILES=tile.warps, VECTOR=8)
    types = {n: "constexpr" if n in constants else "i32" for n in kernel.arg_names}
    types |= {n: "*bf16" for n in ("v", "weight", "bias", "add", "out", "grad") if n in types}
    types |= {n: "*fp32" for n in ("partial",) if n in types}
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=tile.warps))

TOKENS = dict(V_TOKEN=384, ADD_TOKEN=128, OUT_TOKEN=128, AHEAD=2)
for flat in (True, False):
    settings = dict(K=3, WHOLE=flat, FLAT=flat)
    build(kernels.forward_kernel, **settings, **TOKENS, PADDED=16, ADD_FLAT=True, FLIP=False, BIAS=True, ADD=True)
    build(kernels.weight_kernel, **settings, GRAD_FLAT=True)
settings = dict(K=1, WHOLE=True, FLAT=True, PADDED=1, ADD_FLAT=True)
build(kernels.forward_kernel, **settings, **TOKENS, FLIP=True, BIAS=False, ADD=False)
"""


def test_the_compiler_takes_them():
    """It checks types that the interpreter does not; compiling for a GPU needs none."""
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
