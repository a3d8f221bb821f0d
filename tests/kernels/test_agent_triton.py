"""Triton's agent attention and pooling in its interpreter, against the specification in float64."""

import math
import os
import subprocess
import sys

import pytest
import torch

from linfusion.kernels import agent_attention, agent_launch, bias_factors, pool_agents, reference
from linfusion.kernels.backend import interpreted, without_triton
from linfusion.kernels.launch import Launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]  # the interpreter spoils bf16 products
REAL = agent_launch.WIDE
WHOLE = [f"{n}_kernel" for n in ("gather", "read", "whole_backward", "sum", "whole_backward", "sum")]
SPLIT = [f"{n}_kernel" for n in ("gather", "read", *("tokens_backward", "agents_backward", "sum") * 2)]


@pytest.fixture(autouse=True)
def triton():
    pytest.importorskip("triton")
    with interpreted():
        yield


@pytest.fixture(autouse=True)
def few_operations(monkeypatch):
    """Blocks that suit the interpreter: it pays for the number of operations, not for their size."""
    monkeypatch.setattr(agent_launch, "multiprocessors", lambda device: 1)
    if DEVICE == "cpu":
        monkeypatch.setattr(agent_launch, "WIDE", agent_launch.Blocks(64, 64, 4, 1, 1))


@pytest.fixture
def many_programs(monkeypatch):
    """As on a large device: sequences are cut into many pieces."""
    monkeypatch.setattr(agent_launch, "multiprocessors", lambda device: 64)
    monkeypatch.setattr(agent_launch, "SCRATCH", 100.0)


def inputs(tokens=50, agents=6, heads=2, kv_heads=None, dim=40, keys=None, rank=0, shared=False, dtype=torch.float32):
    """By name; `rank` is that of both biases, in one of them `shared` by the heads."""
    keys, kv_heads = keys or tokens, kv_heads or heads
    shapes = {"q": (tokens, heads), "k": (keys, kv_heads), "v": (keys, kv_heads), "agents": (agents, heads)}
    given = {name: torch.randn(2, *shape, dim) for name, shape in shapes.items()}
    if rank:
        given["key_table"] = torch.randn(heads, agents, rank)
        given["query_table"] = torch.randn(1 if shared else heads, agents, rank)
    weights = {"key_weights": torch.rand(keys, rank), "query_weights": torch.rand(tokens, rank)} if rank else {}
    return (*({n: x.to(DEVICE, dtype) for n, x in group.items()} for group in (given, weights)),)


def run(function, given, weights, grad, **settings):
    """Output and gradients of all that is given, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    sides = [side for side in ("key", "query") if f"{side}_table" in given]
    biases = {f"{side}_bias": (leaves[f"{side}_table"], weights[f"{side}_weights"]) for side in sides}
    out = function(*(leaves[n] for n in ("q", "k", "v", "agents")), **biases, **settings)
    grads = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
    return {"out": out.detach()} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def compare(assert_accurate, given, weights, **settings):
    grad = torch.randn_like(given["q"])
    got = run(agent_attention, given, weights, grad, **settings)
    with without_triton():
        same_dtype = run(agent_attention, given, weights, grad, **settings)
    wide = ({n: x.double() for n, x in group.items()} for group in (given, weights))
    exact = run(reference.agent_attention, *wide, grad, **settings)
    for name, x in got.items():
        assert x.dtype == same_dtype[name].dtype and x.shape == same_dtype[name].shape
        # a table in fp32 meets products in q's dtype
        assert_accurate(name, x.to(given["q"].dtype), same_dtype[name], exact[name])
    return got, grad


CASES = [
    (dict(tokens=1, keys=2, agents=2, dim=32), WHOLE),
    (dict(tokens=63, agents=49, dim=64, rank=5), WHOLE),
    (dict(tokens=40, keys=70, agents=16, dim=72, heads=4, kv_heads=2, rank=16, shared=True), WHOLE),
    (dict(tokens=65, agents=130, heads=1, rank=3), SPLIT),
    (dict(tokens=40, keys=33, agents=129, dim=80, kv_heads=1, rank=3, shared=True), SPLIT),
    (dict(tokens=20, agents=70, dim=160, heads=1), SPLIT),
]


@pytest.mark.parametrize(("shape", "kernels"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_accuracy(assert_accurate, launched, shape, kernels, dtype):
    compare(assert_accurate, *inputs(**shape, dtype=dtype), scale=0.2, agent_scale=0.5)
    assert launched == kernels


def test_one_token_and_one_agent():
    given, _ = inputs(tokens=1, agents=1)
    got = run(agent_attention, given, {}, given["v"])
    assert torch.equal(got["out"], given["v"]) and torch.equal(got["dv"], given["v"])
    assert all(got[n].abs().max() < 1e-5 for n in ("dq", "dk", "dagents"))  # there is no choice


def test_blocks_of_fp32(assert_accurate, monkeypatch, launched):
    monkeypatch.setattr(agent_launch, "WIDE", REAL)
    compare(assert_accurate, *inputs(tokens=40, agents=20, heads=1, dim=32, rank=2))
    assert launched == SPLIT


@pytest.mark.parametrize("agents", [6, 130])
def test_cut_into_pieces(assert_accurate, many_programs, launched, agents):
    given, weights = inputs(tokens=150, agents=agents, heads=1, rank=3)
    got, grad = compare(assert_accurate, given, weights)
    assert launched == ["gather_kernel", "merge_kernel", *(WHOLE if agents == 6 else SPLIT)[1:]]
    again = run(agent_attention, given, weights, grad)
    assert all(torch.equal(again[n], got[n]) for n in got)


def test_large_scores(assert_accurate, many_programs):
    """Weights that underflow in most pieces."""
    given, weights = inputs(tokens=300, heads=1)
    compare(assert_accurate, given | {"k": 30 * given["k"], "q": 30 * given["q"]}, weights)


@pytest.mark.parametrize(("agents", "kv_heads"), [(6, 2), (130, 1)])
def test_shortcut(assert_accurate, agents, kv_heads):
    given, weights = inputs(kv_heads=kv_heads, agents=agents)
    got, grad = compare(assert_accurate, given, weights, shortcut=0.075)
    assert (run(agent_attention, given, weights, grad)["out"] - got["out"]).abs().max() > 0.01
    with torch.no_grad():
        assert torch.equal(agent_attention(**given, shortcut=0.075), got["out"])


def test_what_would_be_noticed():
    given, weights = inputs(rank=3)
    grad = torch.randn_like(given["q"])
    right = run(agent_attention, given, weights, grad)
    exchanged = given | {"key_table": given["query_table"], "query_table": given["key_table"]}
    for wrong in (
        run(agent_attention, exchanged, weights, grad),
        run(agent_attention, given, weights, grad, scale=0.1),
    ):
        assert all((wrong[n] - right[n]).abs().max() > 1e-3 for n in right)


LAYOUTS = {
    "joint": lambda x: torch.cat((torch.full_like(x[:, :3], float("nan")), x), 1)[:, 3:],
    "fused": lambda x: torch.stack((x, torch.full_like(x, float("nan"))), dim=3)[:, :, :, 0],
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one of a batch": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("agents", [6, 130])
def test_strided(assert_accurate, launched, layout, agents):
    given, weights = inputs(tokens=35, agents=agents, heads=1 if agents == 130 else 2)
    compare(assert_accurate, {n: LAYOUTS[layout](x) for n, x in given.items()}, weights)
    assert launched == (WHOLE if agents == 6 else SPLIT)


def test_gradients_come_in_any_layout():
    given, weights = inputs()
    ones = torch.ones_like(given["q"])
    want = run(agent_attention, given, weights, ones)
    got = run(agent_attention, given, weights, torch.ones((), device=DEVICE).expand(ones.shape))
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_tables_may_be_wider_than_queries(assert_accurate):
    given, weights = inputs(rank=3)
    narrow = {n: x if "table" in n else x.half() for n, x in given.items()}
    got, _ = compare(assert_accurate, narrow, {n: x.half() for n, x in weights.items()})
    assert got["out"].dtype == torch.float16 and got["dkey_table"].dtype == torch.float32


FALLBACKS = {
    "dense": (dict(key_bias=torch.randn(2, 6, 50)), {}),
    "negative": (dict(agent_scale=-0.3), {}),
    "many columns": (dict(query_bias=(torch.randn(1, 6, 65), torch.rand(50, 65))), {}),
    "weights to train": (dict(query_bias=(torch.randn(1, 6, 5), torch.rand(50, 5, requires_grad=True))), {}),
    "tiny heads": ({}, dict(dim=8)),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_what_pytorch_computes(launched, case):
    settings, shape = FALLBACKS[case]
    given, _ = inputs(**shape)
    settings = {n: tuple(y.to(DEVICE) for y in x) if isinstance(x, tuple) else x for n, x in settings.items()}
    settings = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in settings.items()}
    out = agent_attention(**given, **settings)
    torch.testing.assert_close(out, reference.agent_attention(**given, **settings), rtol=1e-4, atol=1e-5)
    assert not launched


@pytest.mark.parametrize("agents", [6, 130])
def test_opcheck(agents):
    given, weights = inputs(tokens=10, agents=agents, heads=1, dim=16, rank=3)
    tensors = [x.requires_grad_() for x in given.values()]
    factors = tensors[4], weights["key_weights"], tensors[5], weights["query_weights"]
    for biases in (factors, (None,) * 4)[agents == 130 :]:
        torch.library.opcheck(agent_launch.agent_attention_op, (*tensors[:4], *biases, 0.3, 0.5, 0.1))


def test_compiles_whole(launched):
    """Also with a grid that is known only when it runs."""

    def whole(q, k, v, table, grid):
        bias = bias_factors(table, grid=grid, tokens=q.shape[1])
        return agent_attention(q, k, v, pool_agents(q, grid=grid, agents=6), key_bias=bias, query_bias=bias)

    q, k, v = (torch.randn(1, 30, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    table = torch.randn(2, 6, 7, 7, device=DEVICE, requires_grad=True)
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    want = whole(q, k, v, table, (6, 5))
    expected = torch.autograd.grad(want.square().sum(), (q, table))
    assert launched == ["pool_kernel", *WHOLE, "pool_backward_kernel"]
    for grid in ((6, 5), torch.tensor([6, 5])):
        launched.clear()
        got = compiled(q, k, v, table, grid)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.square().sum(), (q, table)), expected)
        assert launched == ["pool_kernel", *WHOLE, "pool_backward_kernel"]


CELLS = [((1, 1), (1, 1)), ((2, 7), (3, 2)), ((9, 8), (3, 2)), ((3, 5, 4), (2, 1, 2))]


@pytest.mark.parametrize("late", [False, True], ids=["known", "tensor"])
@pytest.mark.parametrize(("grid", "cells"), CELLS, ids=str)
def test_pooling(launched, grid, cells, late):
    x = torch.randn(1, math.prod(grid), 2, 40, device=DEVICE)
    x = torch.stack((x, torch.full_like(x, float("nan"))), dim=3)[:, :, :, 0].requires_grad_()
    out = pool_agents(x, grid=torch.tensor(grid) if late else grid, agents=cells)
    want = reference.pool_agents(x.double(), grid=grid, agents=cells)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(out)
    (dx,) = torch.autograd.grad(out, x, LAYOUTS["heads first"](grad))
    torch.testing.assert_close(dx, torch.autograd.grad(want, x, grad.double())[0])
    assert launched == ["pool_kernel", "pool_backward_kernel"]
    assert torch.equal(pool_agents(x.detach(), grid=grid, agents=cells), out)


def test_means_of_large_cells_keep_their_precision():
    x = (torch.randn(1, 70 * 113, 1, 16, device=DEVICE) + 30).half()  # their sum is beyond fp16
    error = (pool_agents(x, grid=(70, 113), agents=1).double() - x.double().mean(1, keepdim=True)).abs().max()
    assert error <= 0.51 * 16 * torch.finfo(torch.half).eps


@pytest.mark.parametrize("late", [False, True], ids=["known", "tensor"])
def test_opcheck_of_pooling(late):
    x = torch.randn(1, 20, 2, 16, device=DEVICE, requires_grad=True)
    grid = (torch.tensor([4, 5]), []) if late else (None, [4, 5])
    torch.library.opcheck(torch.ops.linfusion.pool_agents.default, (x, *grid, [6]))


@pytest.mark.parametrize("agents", [16, 49, 64, 100, 256, 1024])
@pytest.mark.parametrize(("heads", "tokens", "dim"), [(24, 16384, 128), (20, 4096, 64), (24, 65536, 64)])
def test_memory(monkeypatch, agents, heads, tokens, dim):
    """Partial sums take under a twentieth of what goes in and comes out, or little; most multiprocessors have work."""
    monkeypatch.setattr(agent_launch, "multiprocessors", lambda device: 132)
    grids, taken, empty = {}, [], torch.empty
    monkeypatch.setattr(Launch, "__call__", lambda run, *_: grids.setdefault(run.kernel.fn.__name__, run.grid))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: taken.append(empty(*a, **k)) or taken[-1])
    q = empty((1, tokens, heads, dim), dtype=torch.bfloat16, device="meta")
    a = empty((1, agents, heads, dim), dtype=torch.bfloat16, device="meta")
    tensors = q, q, q, a, None, None, None, None
    recipe = agent_launch._forward_recipe(*tensors, 0.1, 0.1, 0.0, False, True)
    out, *saved = agent_launch.forward(*tensors, recipe)
    agent_launch.backward(q, *tensors, out, *saved, 0.1, 0.1, 0.0)
    partial = sum(x.numel() * 4 for x in taken if x.dtype == torch.float32 and x.shape[-1:] == (dim,))
    assert partial < 0.05 * 11 * q.numel() * 2 + 3 * agent_launch.CACHED
    for name, grid in grids.items():
        assert max(grid[1:]) < 65536
        assert math.prod(grid) >= 96 or name in ("merge_kernel", "sum_kernel"), name


COMPILE = """
import os, re, subprocess, sys, tempfile
import torch
import triton
from triton.backends.compiler import GPUTarget
from linfusion.kernels import agent_launch, agent_pool_triton, agent_triton as kernels

def build(name, kernel, agents, dim, rank, **constants):
    block = agent_launch.blocks(name, agents, dim, False, rank)
    constants |= dict(D=dim, BD=dim, BN=block.agents, BS=block.tokens, R=rank, STAGES=block.stages, ALIGN=8)
    constants |= dict(ONE=agents <= block.agents, FULL=agents % block.agents == 0)
    return compiled(kernel, block.warps, **constants)

def compiled(kernel, warps, **constants):
    constants = {n: x for n, x in constants.items() if n in kernel.arg_names}
    sums = ("LSE", "LSES", "DELTA", "DA", "DC", "DT", "PARTS")
    types = {n: "fp32" if n in ("scale", "shortcut") else "*bf16" if n.isupper() else "i32" for n in kernel.arg_names}
    types |= {n: "*fp32" for n in sums if n in types} | {n: "constexpr" for n in constants}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names)
                  if n.isupper() and n not in constants or len(n) == 2 and n[1] in "bshn"}
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(made.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True).stdout
    # a few spilled registers were measured to be better than smaller blocks
    assert int(re.search(r"STACK:(\\d+) ", usage)[1]) <= 96, (kernel.__name__, constants, usage)
    assert made.metadata.shared <= 227 * 1024

for side in ("query", "key"):
    keys = side == "key"
    build(f"{side}_whole", kernels.whole_backward_kernel, 49, 64, 64, KEYS=keys)
    build(f"{side}_whole", kernels.whole_backward_kernel, 64, 128, 0, KEYS=keys)
    build(f"{side}_tokens", kernels.tokens_backward_kernel, 256, 128, 0, KEYS=keys)
    build(f"{side}_agents", kernels.agents_backward_kernel, 256, 128, 0, KEYS=keys)
build("gather", kernels.gather_kernel, 256, 128, 64, EVEN=False)
build("read", kernels.read_kernel, 256, 128, 64, LSES=True, SHORTCUT=True)
build("read", kernels.read_kernel, 49, 64, 0, LSES=False, SHORTCUT=False)
small = dict(D=64, BD=64, BN=16)
compiled(kernels.merge_kernel, 4, **small)
compiled(kernels.sum_kernel, 4, **small, DELTAS=True)
for kernel in (agent_pool_triton.pool_kernel, agent_pool_triton.pool_backward_kernel):
    compiled(kernel, 4, D=64, BD=64, BS=32)

agent_launch.multiprocessors = lambda device: 132

def special(run):
    "What Triton compiles a kernel for: its constants, and which numbers are 1 or multiples of 16."
    names = [p.name for p in run.kernel.params if not p.is_constexpr][-len(run.numbers):]
    free = [p.name for p in run.kernel.params if p.do_not_specialize]
    numbers = [n if n in (0, 1) else n % 16 for name, n in zip(names, run.numbers) if name not in free]
    return run.kernel.__name__, str(run.settings), str(numbers)

for agents in (49, 64, 256):
    variants = []
    for tokens in (64 * 64, 96 * 96, 128 * 128, 80 * 112, 48 * 72):
        x, a = (torch.empty(1, n, 8, 64, dtype=torch.bfloat16, device="meta") for n in (tokens, agents))
        there = agent_launch._forward_recipe(x, x, x, a, *(None,) * 4, 0.1, 0.1, 0.0, False, True)
        back = agent_launch._backward_recipe(x, x, x, x, a, None, None, 0.1, 0.1)
        every = [there.gather, there.merge, there.read, *back.query[:2], back.gathered, *back.key[:2], back.total]
        variants.append({special(run) for run in every if run is not None})
    assert all(v == variants[0] for v in variants), variants
"""


def test_the_compiler_takes_them():
    """Hardly spilling registers, and once for all lengths. It also checks types that the interpreter does not."""
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_values_of_another_head_dim(launched):
    q, k, v, agents = (torch.randn(1, n, 2, d) for n, d in ((9, 16), (9, 16), (9, 32), (4, 16)))
    got = agent_attention(q, k, v, agents)
    assert not launched
    torch.testing.assert_close(got, reference.agent_attention(q, k, v, agents))
