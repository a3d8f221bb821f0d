"""Triton's window attention in its interpreter, against the specification in float64."""

import math
import os
import subprocess
import sys

import pytest
import torch

from linfusion.kernels import reference, window_attention, window_launch, window_plan
from linfusion.kernels.backend import interpreted, without_triton
from linfusion.kernels.launch import forget

from .test_window import inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter spoils bf16 products
KERNELS = {"forward_kernel", "query_backward_kernel", "key_backward_kernel"}


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    pytest.importorskip("triton")
    small = window_launch.Blocks(64, 32, 4, 2)
    monkeypatch.setattr(window_launch, "SHORTEST_PIECE", 2)
    if DEVICE == "cpu":
        monkeypatch.setattr(window_launch, "BLOCKS", {name: {256: small} for name in window_launch.BLOCKS})
        monkeypatch.setattr(window_launch, "multiprocessors", lambda device: 8)  # so that text is cut into pieces
    with interpreted():
        yield


def naive(q, k, v, *, grid, radius, text=0, text_first=True, text_mask=None, pooled_k=None, pooled_v=None, **given):
    """The formula with every step rounded to the dtype, as PyTorch's operators leave it."""
    heads, tokens = q.shape[2], q.shape[1]
    if pooled_k is not None:
        k, v = torch.cat((k, pooled_k), 1), torch.cat((v, pooled_v), 1)
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    words = slice(0, text) if text_first else slice(tokens - text, tokens)
    image = slice(text, tokens) if text_first else slice(0, tokens - text)
    seen = torch.zeros(q.shape[0], tokens, k.shape[1], dtype=torch.bool, device=q.device)
    radius = radius if isinstance(radius, tuple) else (radius,) * len(grid)
    seen[:, image, image] = reference.window_mask(grid, radius, q.device, given.get("shape", "ellipsoid"))
    seen[:, image, words] = seen[:, image, tokens:] = True
    seen[:, words, image if given.get("text_sees") == "image" else slice(0, tokens)] = True
    if text_mask is not None:
        seen[:, :, words] &= text_mask[:, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1), v)


def compare(assert_accurate, leaves, launched, options, kernels=KERNELS):
    """Output and gradients as near to float64 as the formula in the same dtype is, twice over."""
    grad, results = torch.randn_like(leaves[0]), []
    for dtype, function in ((leaves[0].dtype, window_attention), (leaves[0].dtype, naive),
                            (torch.float64, reference.window_attention)):  # fmt: skip
        q, k, v, *pooled = (x.detach().to(dtype).requires_grad_() for x in leaves)
        more = dict(zip(("pooled_k", "pooled_v"), pooled, strict=False))
        out = function(q, k, v, **options, **more)
        results.append((out.detach(), *torch.autograd.grad(out, (q, k, v, *pooled), grad.to(dtype))))
    assert kernels <= set(launched), f"only {launched} ran"
    for name, *values in zip(("out", "dq", "dk", "dv", "dpooled_k", "dpooled_v"), *results, strict=False):
        assert_accurate(name, *values)


def case(grid, radius, dtype=torch.float32, heads=2, kv_heads=None, dim=16, batch=1, **context):
    (q, k, v), options, leaves = inputs(grid, heads=heads, dim=dim, dtype=dtype, batch=batch, **context)
    leaves = [x.detach().to(DEVICE) for x in leaves]
    if kv_heads is not None:
        leaves = [leaves[0], *(x[:, :, :kv_heads] for x in leaves[1:])]
    options = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    return leaves, {n: x for n, x in options.items() if not n.startswith("pooled")} | {"radius": radius}


CASES = {
    "image alone": dict(grid=(5, 7), radius=2.5),
    "wide": dict(grid=(3, 40), radius=6, text=3),
    "tall, text last": dict(grid=(40, 3), radius=6, text=70, text_first=False),
    "everything": dict(grid=(13, 11), radius=100, text=4, batch=2),
    "even": dict(grid=(16, 24), radius=5, text=64),
    "an ellipsoid": dict(grid=(16, 24), radius=(3, 7), text=32),
    "padded text": dict(grid=(9, 12), radius=4, text=40, masked=True, batch=2),
    "all": dict(grid=(9, 12), radius=4, text=5, masked=True, pooled=9, text_first=False, batch=2),
    "many pooled": dict(grid=(10, 9), radius=3, text=3, pooled=150),
    "grouped": dict(grid=(9, 12), radius=4, text=5, pooled=3, heads=4, kv_heads=2),
    "video": dict(grid=(2, 9, 10), radius=(2, 3, 6), text=5, heads=1),
    "a ball": dict(grid=(3, 4, 8), radius=2, text=2, text_first=False, heads=1),
    "D 40": dict(grid=(9, 12), radius=4, text=5, dim=40),
    "D 72": dict(grid=(8, 9), radius=3, text=5, dim=72),
    "D 160": dict(grid=(5, 7), radius=3, text=5, heads=1, dim=160),
}


FULL = ("all", "an ellipsoid")


@pytest.mark.parametrize(("name", "dtype"), [*((n, HALF) for n in CASES), *((n, torch.float32) for n in FULL)], ids=str)
def test_as_accurate_as_the_formula(name, dtype, launched, assert_accurate):
    settings = dict(CASES[name])
    leaves, options = case(settings.pop("grid"), settings.pop("radius"), dtype, **settings)
    compare(assert_accurate, leaves, launched, options)


@pytest.mark.parametrize("grid", [(1, 1), (5, 7)], ids=str)
def test_itself_alone(grid, launched):
    """The output is v, to the bit; q and k have no gradients but for rounding."""
    leaves, options = case(grid, 1, HALF)
    q, k, v = (x.requires_grad_() for x in leaves)
    out = window_attention(q, k, v, **options)
    assert torch.equal(out, v)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), out.detach())
    assert torch.equal(dv, v)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5
    assert set(launched) >= KERNELS


@pytest.mark.parametrize("grid", [(9, 12), (2, 6, 8)], ids=str)
def test_boxes_and_text_that_sees_the_image_alone(grid, launched, assert_accurate):
    leaves, options = case(grid, 3, HALF, text=40, masked=True)
    compare(assert_accurate, leaves, launched, options | dict(shape="box", text_sees="image"))


@pytest.mark.parametrize("text_first", [True, False])
def test_log_sum_exps_and_their_gradients(text_first):
    leaves, options = case((9, 12), 4, text=70, text_first=text_first, heads=3)
    grads, results = None, []
    for dtype, function in ((torch.float32, window_attention), (torch.float64, reference.window_attention)):
        qkv = [x.to(dtype).requires_grad_() for x in leaves]
        out = function(*qkv, **options, return_lse=True)
        grads = grads or [torch.randn_like(x) for x in out]
        results.append((*out, *torch.autograd.grad(out, qkv, [g.to(dtype) for g in grads])))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-6)


def test_scores_far_above_a_query_s_own(launched, assert_accurate):
    """What the fast way cannot hold in its numbers is done again."""
    leaves, options = case((9, 12), 4, HALF, text=40)
    leaves[0][:, :, 0] *= 12
    leaves[1][:, ::3, 0] *= -12  # many keys score far higher, or lower, than the query's own
    compare(assert_accurate, leaves, launched, options)
    out = window_attention(*leaves, **options)
    assert out.isfinite().all()


def test_the_fast_way_alone_would_fail(monkeypatch):
    leaves, options = case((9, 12), 4, HALF, text=40)
    leaves[0][:, :, 0] *= 12
    leaves[1][:, ::3, 0] *= -12
    want = window_attention(*leaves, **options)
    monkeypatch.setattr(window_launch, "MODES", ("fast",))
    forget()
    assert not torch.allclose(window_attention(*leaves, **options), want, atol=1e-2, equal_nan=True)


def test_strides_that_the_copy_engine_cannot_take(launched, assert_accurate):
    """Heads that do not lie side by side, and rows that begin at odd places."""
    leaves, options = case((9, 12), 4, HALF, text=5)
    spread = [torch.randn(1, 113, 3, 17, device=DEVICE).to(HALF)[:, :, :2, :16] for _ in leaves]
    for x, y in zip(spread, leaves, strict=True):
        x.copy_(y)
    assert not any(window_launch._tma(x) for x in spread)
    out = window_attention(*spread, **options)
    torch.testing.assert_close(out, window_attention(*leaves, **options), rtol=0, atol=2e-3)


def test_the_same_at_every_run():
    leaves, options = case((9, 12), 5, HALF, text=70)
    grad, runs = torch.randn_like(leaves[0]), []
    for _ in range(2):
        qkv = [x.detach().requires_grad_() for x in leaves]
        out = window_attention(*qkv, **options)
        runs.append((out, *torch.autograd.grad(out, qkv, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_compiles_whole(launched):
    leaves, options = case((6, 5), 3, text=2)
    leaves = [x.requires_grad_() for x in leaves]
    eager = window_attention(*leaves, **options)
    want = torch.autograd.grad(eager.square().sum(), leaves)
    for grid in ((6, 5), torch.tensor([6, 5])):
        torch._dynamo.reset()
        compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
        out = compiled(*leaves, **options | {"grid": grid})
        torch.testing.assert_close(out, eager)
        for a, b in zip(torch.autograd.grad(out.square().sum(), leaves), want, strict=True):
            torch.testing.assert_close(a, b)


def test_what_the_kernels_do_not_know_runs_in_pytorch(launched):
    q, k, v = (torch.randn(1, 20, 2, 16, device=DEVICE) for _ in range(3))
    wide = torch.randn(1, 20, 2, 24, device=DEVICE)
    window_attention(q.double(), k.double(), v.double(), grid=(4, 5), radius=2)
    with without_triton():
        plain = window_attention(q, k, v, grid=(4, 5), radius=2)
    assert not launched
    torch.testing.assert_close(plain, window_attention(q, k, v, grid=(4, 5), radius=2))
    assert launched
    with pytest.raises(ValueError, match="v must have the head dim of q, 16, got 24"):
        window_attention(q, k, wide, grid=(4, 5), radius=2)


RADII = [1, 2.5, 5, 8, 16, 100, (3, 6), (2.5, 7.1)]


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("radius", RADII, ids=str)
@pytest.mark.parametrize("tile", [(8, 8), (8, 16)], ids=str)
def test_the_tables_hold_every_pair_once(radius, tile, box):
    """Boxes cover what each tile sees, and those called open lie inside of all its windows."""
    grid, block = (21, 34), (1, 4, 8)
    reach = tuple(map(float, radius if isinstance(radius, tuple) else (radius, radius)))
    decided = window_plan.rule((1, *grid), reach, box)
    plan = window_plan.plan((1, *grid), *decided, box, (1, *tile), block, torch.device("cpu"))
    mask = reference.window_mask(grid, reach, shape="box" if box else "ellipsoid").unflatten(0, grid).unflatten(2, grid)
    starts = plan.starts.tolist()
    for t in range(math.prod(plan.tiles)):
        y, x = (n * m for n, m in zip(divmod(t, plan.tiles[2]), tile, strict=True))
        own = mask[y : y + tile[0], x : x + tile[1]].flatten(0, 1)
        left = own.any(0)
        for i in range(starts[2 * t], starts[2 * t + 2]):
            code = int(plan.boxes[i])
            row, column = (code >> 11 & 2047) * block[1], (code & 2047) * block[2]
            part = own[:, row : row + block[1], column : column + block[2]]
            assert part.any()
            if i < starts[2 * t + 1]:
                assert part.all() and part[0].numel() == 32
            left[row : row + block[1], column : column + block[2]] = False
        assert not left.any()


@pytest.mark.parametrize("radius", [(1.0, 1.0), (7.0, 7.0), (2.5, 2.5), (3.0, 7.0), (2.5, 7.1), (16.0, 5.5)], ids=str)
def test_fp32_decides_as_float64(radius):
    weights, bound = window_plan.rule((1, 40, 40), radius, False)
    y, x = (torch.arange(40.0) ** 2 * w for w in weights[1:])
    expected = reference.window_mask((40, 40), radius)[0].view(40, 40)
    assert torch.equal(x < torch.tensor(bound, dtype=torch.float32) - y[:, None], expected)


def test_radii_that_fp32_cannot_tell_apart_are_refused():
    wide = (4001.0, 3989.0)
    assert window_plan.rule((1, 8000, 8000), wide, False) is None
    assert window_plan.rule((1, 8000, 8000), (2001.0, 2001.0), False) is not None


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from linfusion.kernels import window_triton as kernels

def build(kernel, **given):
    constants = dict(D=64, BD=64, TF=1, TY=8, TX=8, BF=1, BY=8, BX=8, AXES=2, BOX=False, EVEN=False, RAGGED=True,
                     MASKED=True, POOLED=True, SAME=False, TMA=False, KEEP_LSE=True, MODE="fast", MOST=2.0**60,
                     LSE_HAS_GRAD=True, STAGES=2, HELD=0) | given
    constants = {n: x for n, x in constants.items() if n in kernel.arg_names}
    types = {n: "constexpr" if n in constants else "i32" for n in kernel.arg_names}
    halves = ("Q", "K", "V", "PK", "PV", "OUT", "DO", "DQ", "DK", "DV")
    types |= {n: "*bf16" for n in types if n in halves}
    types |= {n: "*fp32" for n in types if n in ("LSE", "LSE_GRAD", "STATS", "PART")}
    types |= {n: "fp32" for n in types if n in ("wf", "wy", "wx", "bound", "scale")} | {"REAL": "*i8"}
    box = "8,8" if constants["AXES"] == 2 else "1,8,8"
    for n in types:
        if n in ("S_RUN", "S_BOX"):
            shape = "1,128" if n == "S_RUN" else f"1,{box[:-1]}16"
            types[n] = f"tensordesc<fp32[{shape}]>" if constants["TMA"] else "*fp32"
        elif n.endswith(("_RUN", "_BOX")):
            shape = "1,64,64" if n.endswith("_RUN") else f"1,{box},64"
            types[n] = f"tensordesc<bf16[{shape}]>" if constants["TMA"] else "*bf16"
        elif n in ("TABLE", "STARTS", "REPAIR"):
            types[n] = "*i32"
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4))

engine = hasattr(triton.language, "make_tensor_descriptor")
plain = dict(RAGGED=False, MASKED=False, POOLED=False, TMA=engine)
build(kernels.forward_kernel, AXES=3, BOX=True)
build(kernels.forward_kernel, MODE="repair", **plain)
build(kernels.query_backward_kernel, AXES=3, HELD=2, **plain)
build(kernels.key_backward_kernel, **plain)
"""


def test_the_compiler_takes_them():
    """It checks types that the interpreter does not; compiling for a GPU needs none."""
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
