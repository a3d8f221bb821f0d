"""sparse_linear_attention against its formula written out block by block in float64: values and every gradient."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from linfusion.kernels import reference, sparse_linear_attention, sparse_linear_torch

PHI = {"softmax": lambda x: x.softmax(-1), "relu": F.relu, "elu1": lambda x: torch.where(x > 0, x + 1, x.exp())}
PARTS = [("all", 0.0), ("complement", 0.0), ("marginal", 0.0), ("marginal", 0.3)]
SHAPES = {  # tokens, block_q, block_k, topk
    "one-token": (1, 16, 16, 0.5),
    "one-block": (63, 64, 64, 0.1),
    "tails": (63, 16, 16, 0.5),
    "odd-blocks": (130, 7, 11, 0.25),
    "uneven-blocks": (130, 48, 32, 0.4),
    "whole-blocks": (64, 16, 32, 0.5),
    "long": (1000, 128, 64, 0.2),
    "long-whole-blocks": (768, 128, 64, 0.2),
    "long-tiny-share": (1000, 64, 96, 0.001),
}
TEXTS = {
    "image": {},
    "text-first": dict(text=5),
    "text-last": dict(text=6, text_first=False),
    "padded-first": dict(text=5, masked=True),
    "padded-last": dict(text=6, text_first=False, masked=True),
}
LONG = ("image", "padded-last")  # long shapes take their time to be written out
CASES = [(shape, text) for shape in SHAPES for text in TEXTS if not shape.startswith("long") or text in LONG]


def inputs(tokens, text=0, text_first=True, masked=False, heads=2, kv_heads=2, dim=8, dtype=torch.float64, batch=2):
    torch.manual_seed(0)
    total = tokens + text
    leaves = [torch.randn(batch, total, heads, dim, dtype=dtype)]
    leaves += [torch.randn(batch, total, kv_heads, dim, dtype=dtype) for _ in range(2)]
    leaves += [torch.randn(dim, dim, dtype=dtype) / 3, torch.randn(dim, dtype=dtype)]
    options = {}
    if text:
        options["keep"] = (0, text) if text_first else (tokens, total)
    if masked:
        options["text_mask"] = torch.tensor([[i % 2 == b or i == 2 for i in range(text)] for b in range(batch)])
    return [x.requires_grad_() for x in leaves], options


def call(leaves, op=sparse_linear_attention, **settings):
    q, k, v, weight, bias = leaves
    return op(q, k, v, proj_weight=weight, proj_bias=bias, **settings)


def written_out(leaves, *, topk, block_q, block_k, feature_map="softmax", linear, skip, keep=(0, 0), text_mask=None):
    """The sparse and the projected linear part, one query block at a time; every rule is spelled out here."""
    q, k, v, weight, bias = leaves
    phi, (batch, total, heads, dim) = PHI[feature_map], q.shape
    kept = list(range(*keep))
    image = [i for i in range(total) if i not in kept]
    blocks = [image[i : i + block_k] for i in range(0, len(image), block_k)]
    count = max(1, math.floor(topk * len(blocks)))
    drop = math.floor(skip * len(blocks))
    sparse, rest = torch.zeros_like(q), torch.zeros_like(q)
    for b in range(batch):
        words = [i for j, i in enumerate(kept) if text_mask is None or text_mask[b, j]]
        for h in range(heads):
            g = h // (heads // k.shape[2])
            qs, ks, vs = q[b, :, h], k[b, :, g], v[b, :, g]
            smooth = ks - ks[image].mean(0)
            pooled = torch.stack([smooth[block].mean(0) for block in blocks])
            for i in range(0, len(image), block_q):
                rows = image[i : i + block_q]
                ranking = torch.argsort(-(pooled @ qs[rows].mean(0))).tolist()
                chosen, low = ranking[:count], ranking[len(blocks) - drop :]
                seen = words + [t for j in chosen for t in blocks[j]]
                sparse[b, rows, h] = (qs[rows] @ ks[seen].T / dim**0.5).softmax(-1) @ vs[seen]
                if linear == "all":
                    others = words + image
                else:
                    others = [t for j, block in enumerate(blocks) if j not in chosen + low for t in block]
                weights = phi(qs[rows]) @ phi(ks[others]).T
                out = weights @ vs[others] / (weights.sum(-1, keepdim=True) + 1e-5)
                rest[b, rows, h] = out @ weight.T + bias
            everything = words + image
            sparse[b, kept, h] = (qs[kept] @ ks[everything].T / dim**0.5).softmax(-1) @ vs[everything]
    return sparse, rest


@pytest.mark.parametrize(("linear", "skip"), PARTS)
@pytest.mark.parametrize(("shape", "text"), CASES)
def test_equals_the_formula(shape, text, linear, skip):
    tokens, block_q, block_k, topk = SHAPES[shape]
    leaves, options = inputs(tokens, **TEXTS[text], batch=1 if shape.startswith("long") else 2)
    settings = options | dict(topk=topk, block_q=block_q, block_k=block_k, linear=linear, skip=skip)
    sparse, rest = call(leaves, **settings, return_parts=True)
    want_sparse, want_rest = written_out(leaves, **settings)
    close = dict(rtol=0, atol=1e-11)
    torch.testing.assert_close(sparse, want_sparse, **close)
    torch.testing.assert_close(rest, want_rest, **close)
    torch.testing.assert_close(call(leaves, **settings), want_sparse + want_rest, **close)
    torch.testing.assert_close(call(leaves, reference.sparse_linear_attention, **settings), sparse + rest, **close)
    check_gradients(sparse + rest, want_sparse + want_rest, leaves)


def check_gradients(out, want, leaves):
    grad = torch.randn_like(out)
    got, expected = (torch.autograd.grad(o, leaves, grad) for o in (out, want))
    for name, a, b in zip(("dq", "dk", "dv", "dweight", "dbias"), got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("chunk", [1, 3000, 20000])
def test_chunks_do_not_show(monkeypatch, chunk):
    """One query block at a time, some of a head's, and some heads at a time, with odd ones left over."""
    leaves, options = inputs(210, text=3, heads=3, kv_heads=3, masked=True)
    settings = options | dict(topk=0.3, block_q=16, block_k=16, linear="marginal", skip=0.2)
    want = call(leaves, **settings)
    grad = torch.randn_like(want)
    expected = torch.autograd.grad(want, leaves, grad)
    monkeypatch.setattr(sparse_linear_torch, "CHUNK", chunk)
    out = call(leaves, **settings)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("feature_map", PHI)
@pytest.mark.parametrize("linear", ["all", "complement"])
def test_feature_maps_and_fewer_kv_heads(feature_map, linear):
    leaves, options = inputs(70, text=4, heads=6, kv_heads=2)
    settings = options | dict(topk=0.4, block_q=32, block_k=16, feature_map=feature_map, linear=linear, skip=0.0)
    out, want = call(leaves, **settings), sum(written_out(leaves, **settings))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-11)
    check_gradients(out, want, leaves)


@pytest.mark.parametrize("text", ["image", "padded-first", "padded-last"])
@pytest.mark.parametrize(("linear", "skip"), PARTS[:3])
def test_topk_one_is_softmax(text, linear, skip):
    """By the sparse part alone; the empty complement is 0 and only the projection's bias is left of it."""
    leaves, options = inputs(130, **TEXTS[text])
    (q, k, v, _, bias), batch = leaves, 2
    mask = torch.ones(batch, q.shape[1], dtype=torch.bool)
    if "text_mask" in options:
        mask[:, slice(*options["keep"])] = options["text_mask"]
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask[:, None, None])
    settings = options | dict(topk=1.0, linear=linear, skip=skip)
    sparse, rest = call(leaves, **settings, return_parts=True)
    torch.testing.assert_close(sparse, want.transpose(1, 2))
    if linear != "all":
        image = torch.ones(q.shape[1], dtype=torch.bool)
        image[slice(*options.get("keep", (0, 0)))] = False
        assert torch.equal(rest[:, image], bias.expand_as(rest[:, image]))
    zero = [q, k, v, torch.zeros(8, 8).double(), torch.zeros(8).double()]
    torch.testing.assert_close(call(zero, **settings), want.transpose(1, 2))
    assert (call(zero, **settings | {"topk": 0.5}, block_k=16) - want.transpose(1, 2)).abs().max() > 0.1


def test_every_block_chosen_through_the_blocks():
    """Short of topk=1 nothing is special: one key block of all tokens is chosen, and its complement is empty."""
    leaves, _ = inputs(40)
    sparse, rest = sparse_linear_attention(*leaves[:3], topk=0.9, linear="complement", return_parts=True)
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves[:3])).transpose(1, 2)
    torch.testing.assert_close(sparse, want)
    assert torch.equal(rest, torch.zeros_like(rest))
    grads = torch.autograd.grad((sparse + rest).sum(), leaves[:3])
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("topk", [1.0, 0.5])
def test_relu_features_may_vanish(topk):
    """No feature of any query or key is positive: every weight and every sum is zero, and so is the linear part."""
    q, k, v = (torch.randn(1, 64, 1, 8) for _ in range(3))
    q = (-q.abs() - 0.1).requires_grad_()
    k.requires_grad_()
    for linear in ("all", "complement", "marginal"):
        sparse, rest = sparse_linear_attention(
            q, k, v, topk=topk, block_q=16, block_k=16, linear=linear, feature_map="relu", return_parts=True
        )
        assert torch.equal(rest, torch.zeros_like(rest)) and sparse.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad((sparse + rest).sum(), (q, k)))


def test_a_small_remainder_is_not_lost_beside_a_large_total():
    """Subtraction from the total would leave rounding errors: one block has features 1e6 times the other's."""
    torch.manual_seed(0)
    q, k, v = (torch.rand(1, 32, 1, 8) + 0.5 for _ in range(3))
    k[:, :16] *= 1e6
    sparse, rest = sparse_linear_attention(
        q, k, v, topk=0.5, block_q=32, block_k=16, linear="complement", feature_map="relu", return_parts=True
    )
    weights = torch.einsum("bqhd,bkhd->bhqk", q.double(), k[:, 16:].double())
    want = torch.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdim=True), v[:, 16:].double())
    torch.testing.assert_close(rest.double(), want, rtol=1e-5, atol=1e-6)


def test_the_share_is_rounded_down_to_blocks():
    q, k, v = (torch.randn(1, 100, 1, 4, dtype=torch.float64) for _ in range(3))
    v = torch.eye(100, dtype=torch.float64)[None, :, None]  # the output says which keys were seen

    def seen(topk):
        q8, k8 = (F.pad(x, (0, 96)) for x in (q, k))
        sparse, _ = sparse_linear_attention(q8, k8, v, topk=topk, block_q=100, block_k=1, return_parts=True)
        return int((sparse[0, 0, 0] > 0).sum())

    assert [seen(t) for t in (0.001, 0.019, 0.02, 0.29, 0.295, 0.57, 1.0)] == [1, 1, 2, 29, 29, 57, 100]


def test_the_routing_survives_an_offset_of_all_keys():
    """k less its mean: what all keys share says nothing about which to choose, and must not drown the rest in fp32."""
    (q, k, v, *_), _ = inputs(256, dtype=torch.float32)
    k = k.detach() + 3e5
    routing = sparse_linear_torch.Routing(0.25, 0.0, 16, 16)
    problem = sparse_linear_torch.Problem(q, k, v, k[:, :0], v[:, :0], None, routing)
    (chunk,) = problem.chunks()
    want = reference.block_classes(q.double(), k.double(), 0.25, 0.0, 16, 16) == 0
    assert torch.equal(chunk.rest.bool(), want.flatten(0, 1))
    problem.pooled_k = problem.pooled_k + 3e5  # as if the mean had stayed
    (chunk,) = problem.chunks()
    assert not torch.equal(chunk.rest.bool(), want.flatten(0, 1))


def test_queries_of_another_length():
    q = torch.randn(2, 37, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 90, 2, 8, dtype=torch.float64)
    settings = dict(topk=0.3, block_q=16, block_k=16, linear="complement")
    want = reference.sparse_linear_attention(q, k, v, **settings)
    torch.testing.assert_close(sparse_linear_attention(q, k, v, **settings), want)


def test_text_may_be_all_there_is():
    leaves, options = inputs(0, text=5, masked=True)
    out = call(leaves, topk=0.5, linear="complement", **options)
    torch.testing.assert_close(out, call(leaves, topk=1.0, **options))
    assert out.shape == leaves[0].shape and out.isfinite().all()


@pytest.mark.parametrize("linear", ["all", "complement"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_the_formula(dtype, linear, assert_accurate):
    leaves, options = inputs(200, text=4, dim=40, dtype=dtype)
    settings = options | dict(topk=0.4, block_q=32, block_k=32, linear=linear, skip=0.0)
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact, same = sum(written_out(exact_leaves, **settings)), sum(written_out(leaves, **settings))
    out = call(leaves, **settings)
    assert out.dtype == dtype
    assert_accurate("out", out, same, exact)
    grad = torch.randn_like(out)
    got, low = (torch.autograd.grad(o, leaves, grad) for o in (out, same))
    high = torch.autograd.grad(exact, exact_leaves, grad.double())
    for name, a, b, c in zip(("dq", "dk", "dv", "dweight", "dbias"), got, low, high, strict=True):
        assert_accurate(name, a, b, c)


def test_autocast_leaves_the_routing_in_fp32():
    """Scores in bf16 would choose other blocks; what is 16 bits wide here is the exact attention of kept tokens."""
    (q, k, v, *_), _ = inputs(512, dtype=torch.float32)
    settings = dict(topk=0.1, block_q=16, block_k=16, linear="complement")
    want = sparse_linear_attention(q, k, v, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        got = sparse_linear_attention(q, k, v, **settings)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_opcheck():
    q, k, v = (torch.randn(1, 40, 2, 8, requires_grad=True) for _ in range(3))
    text_k, text_v = (torch.randn(1, 3, 2, 8, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[True, True, False]])
    op = torch.ops.linfusion.sparse_linear_attention.default
    features = [torch.rand(1, 40, 2, 8, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(op, (q, k, v, text_k, text_v, mask, *features, 0.5, 0.2, 16, 16, 0.3))
    torch.library.opcheck(op, (q, k, v, text_k[:, :0], text_v[:, :0], None, None, None, 0.5, 0.0, 16, 16, 0.3))


@pytest.mark.parametrize("linear", ["all", "complement"])
def test_compiles_whole(linear):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for tokens in (50, 66):  # the second size makes the lengths symbolic
        leaves, options = inputs(tokens, text=3, masked=True, dtype=torch.float32)
        settings = options | dict(topk=0.5, block_q=16, block_k=16, linear=linear)
        torch.testing.assert_close(compiled(leaves, **settings), call(leaves, **settings))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(x):
                self.numel = max(self.numel, x.numel())
        return out


def test_nothing_grows_with_the_square(monkeypatch):
    """No S x S mask, no state per block: beyond a chunk's budget nothing is larger than the inputs themselves."""
    monkeypatch.setattr(sparse_linear_torch, "CHUNK", 1 << 13)
    for tokens in (256, 1024):
        q, k, v, text, fq, fk = torch.rand(6, 1, tokens, 1, 32)
        routing = sparse_linear_torch.Routing(0.1, 0.1, 16, 16)
        with Largest() as largest:
            problem = sparse_linear_torch.Problem(q, k, v, text[:, :4], text[:, :4], None, routing)
            sparse_linear_torch.forward(problem, fq, fk, 0.2)
            sparse_linear_torch.backward(problem, fq, fk, 0.2, q, q)
        assert largest.numel <= max(1 << 13, q.numel())
        assert largest.numel < tokens**2 and largest.numel < tokens // 16 * 32**2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_of_a_long_sequence():
    """131,072 tokens, forward and backward: a mask of S x S bytes alone would be 16 GiB. In a process of its own."""
    code = (
        "import torch; from linfusion.kernels import sparse_linear_attention;"
        # of this process alone: getrusage begins with the peak of the one that started it, and would hide growth
        "peak = lambda: int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]);"
        "q, k, v = (torch.randn(1, 1 << 17, 1, 32, requires_grad=True) for _ in range(3));"
        "base = peak();"
        "out = sparse_linear_attention(q, k, v, topk=0.005, linear='complement');"
        "out.sum().backward();"
        "assert all(x.isfinite().all() for x in (out, q.grad, k.grad, v.grad));"
        "print(peak() - base)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 1e9


BAD = {
    "topk zero": (dict(topk=0), r"topk must be the share .* \(0, 1\], got 0"),
    "topk negative": (dict(topk=-0.5), "topk must be"),
    "topk over one": (dict(topk=1.5), "topk must be"),
    "topk nan": (dict(topk=math.nan), "topk must be"),
    "topk a flag": (dict(topk=True), "topk must be"),
    "block_q zero": (dict(block_q=0), "block_q must be a positive whole number"),
    "block_k broken": (dict(block_k=2.5), "block_k must be a positive whole number"),
    "map": (dict(feature_map="identity"), "Available: softmax, elu1, relu"),
    "part": (dict(linear="some"), "Available: all, complement, marginal"),
    "skip one": (dict(linear="marginal", skip=1), r"skip must be .* \[0, 1\)"),
    "skip of another part": (dict(linear="complement", skip=0.1), "linear='marginal' only"),
    "skip and topk": (dict(topk=0.7, linear="marginal", skip=0.4), "must not exceed 1, got 0.7 [+] 0.4"),
    "keep in the middle": (dict(keep=(3, 5)), "at one end of the 20 tokens"),
    "keep too long": (dict(keep=(0, 21)), "at one end of the 20 tokens"),
    "keep backwards": (dict(keep=(20, 3)), "at one end of the 20 tokens"),
    "mask without keep": (dict(text_mask=torch.ones(2, 3, dtype=torch.bool)), r"\[B, kept\] = \[2, 0\]"),
    "mask of numbers": (dict(keep=(0, 3), text_mask=torch.ones(2, 3)), "text_mask must be bool"),
    "bias alone": (dict(proj_bias=torch.zeros(8)), "proj_weight, which is missing"),
    "weight of another size": (dict(proj_weight=torch.zeros(16, 16)), "as the head dim is 8"),
}


@pytest.mark.parametrize("op", [sparse_linear_attention, reference.sparse_linear_attention], ids=["op", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, op):
    change, message = BAD[case]
    q, k, v = (torch.randn(2, 20, 2, 8) for _ in range(3))
    with pytest.raises(ValueError, match=message):
        op(q, k, v, **({"topk": 0.5} | change))


def test_mismatched_tensors():
    q, k = torch.randn(2, 20, 2, 8), torch.randn(2, 30, 2, 8)
    with pytest.raises(ValueError, match="20 queries and 30 keys"):
        sparse_linear_attention(q, k, k, topk=0.5, keep=(0, 2))
    with pytest.raises(ValueError, match="share one floating dtype"):
        sparse_linear_attention(q, q.double(), q.double(), topk=0.5)
