"""Triton's sparse-linear attention in its interpreter, against the formula written out block by block in float64."""

import math
import os
import subprocess
import sys

import pytest
import torch

from linfusion.kernels import block_map, block_sparse_attention, linear_launch, reference, routing_launch, sparse_launch
from linfusion.kernels import sparse_linear_attention as sla
from linfusion.kernels.backend import interpreted, without_triton
from linfusion.kernels.block_sparse import lacking

from .test_sparse_linear import TEXTS, call, inputs, written_out

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("dq", "dk", "dv", "dweight", "dbias")
ALL = {"forward_kernel", "query_backward_kernel", "key_backward_kernel", "select_kernel", "state_kernel", "fold_kernel"}
REST = ALL | {"rest_query_kernel", "rest_key_kernel"}


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """Tiles that suit the interpreter: it pays for the number of operations, not for their size."""
    pytest.importorskip("triton")
    if DEVICE == "cpu":
        monkeypatch.setattr(routing_launch, "SELECT_ROWS", 16)
        monkeypatch.setattr(sparse_launch, "WIDE", sparse_launch.Tile(32, 32, 4, 1))
    sparse_launch.tile.cache_clear()
    with interpreted():
        yield
    sparse_launch.tile.cache_clear()


def on_device(leaves, dtype):
    """q, k, v in `dtype`, the projection in fp32, as training has it."""
    torch.manual_seed(1)
    q, k, v, *projection = (x.detach() for x in leaves)
    dim = q.shape[-1]
    tensors = [x.to(DEVICE, dtype) for x in (q, k, v)]
    tensors += [torch.randn(s, device=DEVICE) / n for s, n in (((dim, dim), dim**0.5), ((dim,), 1))]
    return [x.requires_grad_() for x in tensors[: 3 + len(projection)]]


def double(leaves):
    return [x.detach().double().requires_grad_() for x in leaves]


CASES = {  # tokens, heads, heads of k, dim, text, settings
    "tails": (63, 2, 2, 40, "image", dict(topk=0.5, block_q=16, block_k=16)),
    "relu-grouped-padded-last": (
        70, 2, 1, 16, "padded-last", dict(topk=0.3, block_q=32, block_k=16, feature_map="relu"),
    ),
    "text-first-uneven-blocks": (
        90, 1, 1, 72, "text-first", dict(topk=0.5, block_q=48, block_k=48, feature_map="elu1"),
    ),
    "complement-subtracted-text-last": (70, 2, 1, 16, "text-last", dict(topk=0.3, block_k=16, linear="complement")),
    "complement-summed": (
        60, 1, 1, 40, "image", dict(topk=0.8, block_q=48, block_k=16, linear="complement", feature_map="elu1"),
    ),
    "marginal-subtracted": (
        100, 1, 1, 16, "padded-first", dict(topk=0.2, block_k=16, linear="marginal", skip=0.2, feature_map="elu1"),
    ),
    "marginal-summed": (60, 1, 1, 16, "image", dict(topk=0.5, block_q=32, block_k=16, linear="marginal", skip=0.3)),
}  # fmt: skip
HALF = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]  # the interpreter spoils bf16 products


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_good_as_the_formula(case, dtype, assert_accurate, launched):
    tokens, heads, kv_heads, dim, text, settings = CASES[case]
    if DEVICE == "cpu" and dtype == torch.float16 and case in ("complement-summed", "marginal-summed"):
        return  # seconds each
    leaves, options = inputs(tokens, **TEXTS[text], heads=heads, kv_heads=kv_heads, dim=dim, batch=1)
    leaves = on_device(leaves, dtype)
    options = {n: x.to(DEVICE) if n == "text_mask" else x for n, x in options.items()}
    settings = dict(block_q=32, linear="all", skip=0.0) | options | settings
    exact_leaves = double(leaves)
    same_leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    exact, same = sum(written_out(exact_leaves, **settings)), sum(written_out(same_leaves, **settings))
    out = call(leaves, **settings)
    assert out.dtype == dtype and "forward_kernel" in launched
    assert_accurate("out", out, same, exact)
    grad = torch.randn_like(out)
    got, low = (torch.autograd.grad(o, x, grad) for o, x in ((out, leaves), (same, same_leaves)))
    high = torch.autograd.grad(exact, exact_leaves, grad.double())
    for name, leaf, a, b, c in zip(NAMES, leaves, got, low, high, strict=True):
        assert a.dtype == leaf.dtype
        assert_accurate(name, a.to(dtype), b, c)
    assert set(launched) >= (ALL if settings["linear"] == "all" else REST)


@pytest.mark.parametrize(
    ("linear", "topk", "block_k"),
    [("all", 0.4, 16), ("complement", 0.1, 16), ("marginal", 0.4, 16), ("complement", 0.4, 64), ("marginal", 0.4, 64)],
    ids=["all", "complement-one-block", "marginal", "complement-of-everything", "marginal-of-everything"],
)
def test_both_parts_and_their_gradients(linear, topk, block_k):
    """At 64 keys a block, there is one, and nothing is left for the linear part: 0, and no gradient."""
    leaves, options = inputs(60, text=6, heads=1, kv_heads=1, dim=16, batch=1)
    leaves = on_device(leaves, torch.float32)
    skip = 0.3 if linear == "marginal" else 0.0
    settings = options | dict(topk=topk, block_q=32, block_k=block_k, linear=linear, skip=skip, return_parts=True)
    exact_leaves = double(leaves)
    got, want = call(leaves, **settings), call(exact_leaves, reference.sparse_linear_attention, **settings)
    grads = [torch.randn_like(x) for x in got]
    got_grads = torch.autograd.grad(got, leaves, grads)
    want_grads = torch.autograd.grad(want, exact_leaves, [x.double() for x in grads])
    for name, a, b in zip(("sparse", "linear", *NAMES), (*got, *got_grads), (*want, *want_grads), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert (got[1] - want[0]).abs().max() > 0.1  # the parts differ


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_scores_that_leave_the_first_block_far_behind(dtype):
    """What softmax is measured from is the first block's highest score, until that overflows."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 70, 1, 16, device=DEVICE, dtype=dtype).unbind()
    k[:, 40:44] = 60 * q[:, :4]
    settings = dict(topk=0.99, block_q=32, block_k=16)
    out = sla(q, k, v, **settings)
    want = reference.sparse_linear_attention(q.double(), k.double(), v.double(), **settings)
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=1e-4 if dtype == torch.float32 else 2e-2)


def test_one_token():
    """Its weights are all 1, so that its query and key have no gradients but through the linear part's 1e-5."""
    leaves, _ = inputs(1, heads=1, kv_heads=1, dim=16, batch=1)
    leaves = on_device(leaves, torch.float32)
    exact_leaves, settings = double(leaves), dict(topk=0.5, block_q=16, block_k=16)
    out, want = call(leaves, **settings), call(exact_leaves, reference.sparse_linear_attention, **settings)
    got_grads = torch.autograd.grad(out.sum(), leaves)
    for a, b in zip((out, *got_grads), (want, *torch.autograd.grad(want.sum(), exact_leaves)), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)


def test_another_length_strides_and_no_projection():
    torch.manual_seed(0)
    whole = torch.randn(2, 50, 3, 2, 24, device=DEVICE)
    q, k = whole[:, 5:45, 0], torch.randn(2, 77, 1, 32, device=DEVICE)[..., :24]
    v = torch.randn(2, 1, 77, 24, device=DEVICE).transpose(1, 2)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    exact_leaves = double(leaves)
    settings = dict(topk=0.3, block_q=32, block_k=32, scale=0.4)
    out, want = sla(*leaves, **settings), reference.sparse_linear_attention(*exact_leaves, **settings)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(out).transpose(1, 2).contiguous().transpose(1, 2)
    want_grads = torch.autograd.grad(want, exact_leaves, grad.double())
    for a, b in zip(torch.autograd.grad(out, leaves, grad), want_grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_the_same_twice_and_with_gradients_or_without():
    q, k, v = torch.randn(3, 1, 70, 1, 16, device=DEVICE).requires_grad_().unbind()
    with torch.no_grad():
        once = sla(q, k, v, topk=0.4, block_q=32, block_k=16)
    out = sla(q, k, v, topk=0.4, block_q=32, block_k=16)
    assert torch.equal(once, out)
    first, second = (torch.autograd.grad(out, (q, k, v), v, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_small_remainder_is_not_lost_beside_a_large_total():
    """Rounding errors would be left of it: one block's features are 1e4 times the others', and it is subtracted."""
    q, k, v = (torch.rand(1, 64, 1, 16, device=DEVICE) + 0.5 for _ in range(3))
    k[:, :16] *= 1e4
    sparse, rest = sla(
        q, k, v, topk=0.25, block_q=64, block_k=16, linear="complement", feature_map="relu", return_parts=True
    )
    weights = torch.einsum("bqhd,bkhd->bhqk", q.double(), k[:, 16:].double())
    want = torch.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdim=True), v[:, 16:].double())
    torch.testing.assert_close(rest.double(), want, rtol=0.02, atol=0)
    assert (v.double().mean(1) - v[:, 16:].double().mean(1)).abs().max() > 0.02


@pytest.mark.parametrize("linear", ["all", "complement", "marginal"])
def test_features_that_vanish_and_tokens_all_alike(linear):
    """No feature is positive; and every score is the same, so the first blocks are chosen."""
    q = (-torch.rand(1, 1, 1, 16, device=DEVICE)).expand(1, 40, 1, 16).half().requires_grad_()
    sparse, rest = sla(
        q, q, q, topk=0.4, block_q=32, block_k=16, linear=linear, feature_map="relu", return_parts=True
    )  # fmt: skip
    assert torch.equal(rest, torch.zeros_like(rest))
    torch.testing.assert_close(sparse, q)
    (grad,) = torch.autograd.grad((sparse + rest).sum(), q)
    assert grad.isfinite().all()


def test_the_map():
    """An offset that all keys share does not drown it; ties go to the first blocks; PyTorch agrees."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 150, 2, 40, device=DEVICE), torch.randn(2, 205, 1, 40, device=DEVICE) + 3e5
    settings = dict(topk=0.25, block_q=32, block_k=16)
    got = block_map(q, k, **settings)
    assert got.dtype == torch.bool and got.shape == (2, 2, 5, 13) and (got.sum(-1) == 3).all()
    assert torch.equal(got, reference.block_map(q.double(), k.double(), **settings))
    with without_triton():
        assert torch.equal(got, block_map(q, k, **settings))
    alike = block_map(q, k[:, :1].expand(-1, 205, -1, -1), **settings)
    assert alike[..., :3].all() and not alike[..., 3:].any()
    assert block_map(q, k, topk=1.0).all()


@pytest.mark.parametrize("second", [0, 1, 2])
def test_the_highest_and_the_lowest_of_each_row(second):
    """Ties go to the first and are dropped from the last; what is no number counts as the lowest."""
    torch.manual_seed(0)
    rows = torch.randn(8, 37, device=DEVICE)
    rows[1] = rows[1].round()
    rows[2] = 0.25
    rows[3, ::2], rows[3, 1::2] = -1e-30, 1e30
    rows[4, 5], rows[4, 7], rows[4, 9] = float("inf"), float("-inf"), float("nan")
    rows[5] = -rows[5].abs()
    rows[6] = 0
    rows[6, 20:] = -0.0
    chosen, dropped = 5, 9
    lists, other = routing_launch.choose(rows[None], chosen, dropped, second)
    order = rows.nan_to_num(-3e38, 3e38, -3e38).sort(dim=1, descending=True, stable=True).indices
    best, rest, lowest = order.split((chosen, 37 - chosen - dropped, dropped), dim=1)
    want = torch.cat((best.sort(1).values.flatten(), torch.arange(37, device=DEVICE)))
    assert torch.equal(lists.entries[0].long(), want)
    if other is not None:
        want = rest if second == 2 else torch.cat((best, lowest), dim=1)
        assert torch.equal(other.entries[0].long(), want.sort(1).values.flatten())


def test_one_pass_for_block_means_and_states(launched):
    k, v = torch.randn(2, 2, 150, 2, 40, device=DEVICE).half().unbind()
    means = torch.empty(4, 3, 40, device=DEVICE)
    linear_launch.partial_records(k, v, "softmax", budget=math.inf, means=means)
    want = torch.stack([x.double().mean(1) for x in k.split(64, 1)], 2).flatten(0, 1)
    torch.testing.assert_close(means.double(), want, rtol=1e-5, atol=1e-6)
    assert "means_kernel" not in launched
    sla(k, k, v, topk=0.5, block_q=64, block_k=64)
    assert launched.count("means_kernel") == 1  # of the queries


@pytest.mark.parametrize("kernels", [True, False], ids=["triton", "torch"])
def test_attention_by_a_map_of_ones_own(kernels, launched):
    torch.manual_seed(0)
    leaves = [torch.randn(1, n, h, 24, device=DEVICE).requires_grad_() for n, h in ((70, 2), (90, 1), (90, 1))]
    chosen = torch.rand(1, 2, 3, 6, device=DEVICE) > 0.5
    chosen[:, 1, 1] = False  # sees nothing
    chosen[:, 0, 1] = True
    with without_triton() if not kernels else interpreted():
        out = block_sparse_attention(*leaves, chosen, block_q=32, block_k=16)
        grad = torch.randn_like(out)
        got = torch.autograd.grad(out, leaves, grad)
    assert bool(launched) == kernels
    exact = double(leaves)
    want = reference.block_sparse_attention(*exact, chosen, block_q=32, block_k=16)
    assert (out[:, 32:64, 1] == 0).all() and (out[:, 32:64, 0] != 0).all()
    for a, b in zip((out, *got), (want, *torch.autograd.grad(want, exact, grad.double())), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    if not kernels:
        ones = block_sparse_attention(
            *leaves, torch.ones(1, 1, 3, 6, dtype=torch.bool, device=DEVICE), block_q=32, block_k=16
        )
        assert (ones - out).abs().max() > 0.1
        with pytest.raises(ValueError, match=r"= \[1, 2, 3, 6\] .* got torch.bool \[1, 2, 3, 5\]"):
            block_sparse_attention(*leaves, chosen[..., :5], block_q=32, block_k=16)


def test_what_the_kernels_do_not_know_runs_in_pytorch(launched):
    q = torch.randn(1, 40, 1, 16, device=DEVICE)
    sla(q, q, q, topk=0.5, block_q=7, block_k=16)
    sla(q, q, q, topk=0.5, block_q=16, block_k=16, scale=-1.0)
    assert not launched
    assert "block_k=24" in lacking(q, q, 16, 24, 1.0)
    assert "scale=0" in lacking(q, q, 16, 16, 0)
    assert "more than 32768 blocks" in lacking(q, q.expand(1, 40, 1, 16).repeat(1, 20000, 1, 1), 16, 16, 1.0)
    assert "torch.float32 at head dim 160" in lacking(q.repeat(1, 1, 1, 10), q, 16, 16, 1.0)
    assert lacking(q, q, 16, 16, 1.0) is None


def test_tiles_fit_blocks_and_devices():
    for kernel, by_dim in sparse_launch.TILES.items():
        for dim in by_dim:
            whole = sparse_launch.tile(kernel, dim, False, False, 128, 64)
            assert whole == by_dim[dim]
            little = sparse_launch.tile(kernel, dim, False, True, 48, 16)
            assert little.queries <= 64 and little.keys == 16 and 4 <= little.warps <= whole.warps
            assert little.stages <= sparse_launch.SMALL.stages


@pytest.mark.parametrize("linear", ["all", "marginal"])
def test_operator(linear):
    q, k, v = (torch.randn(1, 20, 1, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    weight, bias = torch.randn(16, 16, device=DEVICE).requires_grad_(), torch.randn(16, device=DEVICE).requires_grad_()
    settings = (0.5, 0.5 if linear == "marginal" else 0.0, 16, 16, "softmax", linear, 0.25, 0, 0, False)
    op = torch.ops.linfusion.sla.default
    torch.library.opcheck(op, (q, k, v, None, weight, bias, *settings), test_utils=("test_schema", "test_faketensor"))


def test_compiles_whole():
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for tokens in (40, 52):  # the second size makes the lengths symbolic
        leaves, options = inputs(tokens, text=3, heads=1, kv_heads=1, dim=16, masked=True, batch=1)
        leaves = on_device(leaves, torch.float32)
        settings = options | dict(topk=0.5, block_q=32, block_k=16)
        out, want = compiled(leaves, **settings), call(leaves, **settings)
        assert torch.equal(out, want)
        grads = (torch.autograd.grad(o, leaves, torch.ones_like(o)) for o in (out, want))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


COMPILE = """
import os, re, subprocess, tempfile, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from linfusion.kernels import sparse_launch, sparse_triton

FP32 = ("LSE", "STATS", "PLANES", "Z", "BIAS", "FACTOR")
ENGINE = hasattr(triton.language, "make_tensor_descriptor")
STRIDES = [a + b for a in "qkvgol" for b in "bsh"]

def build(name, dim):
    kernel, tile = getattr(sparse_triton, name + "_kernel"), sparse_launch.tile(name, dim, False, False, 128, 64)
    constants = dict(D=dim, BD=dim, BQ=tile.queries, BK=tile.keys, BLOCK_Q=128, BLOCK_K=64, STAGES=tile.stages, ALIGN=8)
    constants |= dict(KEPT=0, RAGGED=True, PHI="softmax", LINEAR="all", PROJECT=True, BIASED=True, PARTS=False,
                      TMA=ENGINE, MOST=2.0**60, EQUAL=True, EARLY=tile.queries >= sparse_launch.EARLY)
    constants = {n: x for n, x in (constants | dict(GROUPED=False)).items() if n in kernel.arg_names}
    types = {n: "*bf16" if n[0].isupper() else "i32" for n in kernel.arg_names}
    types |= {n: "*fp32" for n in FP32} | {"INDEX": "*i32", "START": "*i32", "REAL": "*u8"}
    types |= {"scale": "fp32", "eps": "fp32"}
    met = tile.queries if name == "key_backward" else tile.keys
    if ENGINE:
        types |= {n: f"tensordesc<bf16[1, {met}, 1, {dim}]>" for n in ("KT", "VT", "QT", "GT")}
        types["ST"] = f"tensordesc<fp32[1, {2 * met}]>"
    types = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    aligned = [i for i, n in enumerate(types) if types[n][0] not in "ct" and (n[0].isupper() or n in STRIDES)]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    options = dict(num_warps=tile.warps)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma" in compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "a.ptx")
        open(file, "w").write(compiled.asm["ptx"])
        command = [get_ptxas(90).path, "-arch=sm_90a", "-v", file, "-o", file + ".cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    print(name, dim, said)
    spilled = int(re.search(r"(\\d+) bytes spill stores", said).group(1))
    assert spilled <= 16, name + said  # once, before the loop

for name in ("forward", "query_backward", "key_backward"):
    build(name, 128)
"""


def test_the_compiler_takes_them_and_spills_next_to_nothing():
    """It checks types that the interpreter does not; compiling for a GPU needs none."""
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_values_of_another_head_dim_are_refused():
    q, k, v = (torch.randn(1, 32, 2, n, device=DEVICE) for n in (16, 16, 32))
    for values in (v, v[..., :8]):
        with pytest.raises(ValueError, match="v must have the head dim of q, 16"):
            sla(q, k, values, topk=0.5, block_q=16, block_k=16)
        with pytest.raises(ValueError, match="v must have the head dim of q, 16"):
            block_sparse_attention(q, k, values, torch.ones(1, 2, 2, 2, dtype=torch.bool), block_q=16, block_k=16)


def test_a_bias_with_a_stride():
    q, k, v = (torch.randn(1, 32, 2, 16, device=DEVICE) for _ in range(3))
    weight, bias = torch.randn(16, 16, device=DEVICE), torch.randn(32, device=DEVICE)[::2]
    settings = {"topk": 0.5, "block_q": 16, "block_k": 16, "proj_weight": weight}
    torch.testing.assert_close(
        sla(q, k, v, proj_bias=bias, **settings), sla(q, k, v, proj_bias=bias.clone(), **settings)
    )
