"""qk_norm_rope: the specification against the formulas written out, and the kernels in Triton's interpreter."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from linfusion.kernels import RopeTables, qk_norm_rope, reference
from linfusion.kernels.backend import interpreted
from linfusion.kernels.prologue_launch import prologue_op

from .test_linear import tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def spelled_out(x, weight, eps, angle=None):
    """Norm over the last axis, then every pair (2i, 2i + 1) as a complex number times exp(i angle)."""
    x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
    if angle is None:
        return x
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2)


def test_specification():
    q, k, v, tq, tk, tv = (torch.randn(2, n, 3, 8, dtype=torch.float64) for n in (5, 5, 5, 4, 4, 4))
    weights = tuple(torch.rand(8, dtype=torch.float64) for _ in range(4))
    angle = torch.rand(9, 4, dtype=torch.float64)
    both = angle.repeat_interleave(2, 1)
    rope = RopeTables(both.cos(), both.sin())
    got = qk_norm_rope(
        q, k, v, eps=1e-3, weights=weights[:2], text=(tq, tk, tv), text_weights=weights[2:], rope=rope
    )  # fmt: skip
    for out, image, words, w, tw in ((got[0], q, tq, weights[0], weights[2]), (got[1], k, tk, weights[1], weights[3])):
        want = torch.cat(
            (spelled_out(words, tw, 1e-3, angle[:4, None]), spelled_out(image, w, 1e-3, angle[4:, None])), 1
        )
        torch.testing.assert_close(out, want)
    torch.testing.assert_close(got[2], torch.cat((tv, v), 1))
    # text behind the image, only the image turns
    rope = RopeTables(both[:5].cos(), both[:5].sin())
    out = qk_norm_rope(q, k, eps=1e-3, weights=weights[:2], text=(tq, tk, None), rope=rope, text_first=False)[0]
    want = torch.cat((spelled_out(q, weights[0], 1e-3, angle[:5, None]), spelled_out(tq, weights[0], 1e-3)), 1)
    torch.testing.assert_close(out, want)
    # one norm over all heads
    weights = tuple(torch.rand(24, dtype=torch.float64) for _ in range(2))
    out = qk_norm_rope(q, k, eps=1e-3, weights=weights, across_heads=True)[1]
    torch.testing.assert_close(out, spelled_out(k.flatten(2), weights[1], 1e-3).unflatten(-1, (3, 8)))


CASES = {
    "FLUX, double": {"text": True, "own_weights": True, "rope": "joint"},
    "FLUX, single": {"rope": "joint"},
    "SD3.5": {"text": True, "own_weights": True, "text_first": False},
    "HunyuanVideo": {"text": True, "own_weights": True, "text_first": False, "rope": "image"},
    "Wan": {"across": True, "rope": "joint"},
    "LTX": {"across": True, "rope": "per head"},
    "grouped heads": {"rope": "per sample", "kv_heads": 2},
    "halves": {"rope": "halves"},
    "norm alone": {},
    "rotation alone": {"rope": "joint", "eps": None},
    "no weight": {"weights": False},
    "image first, text before it turns": {"rope": "text", "text": True},
}


def build(case, dtype, dim=24, heads=6, image=7, words=5):
    kv_heads = case.get("kv_heads", heads)
    count = (dim, dim) if not case.get("across") else (heads * dim, kv_heads * dim)
    q, k, v = (random(2, image, h, dim, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    tensors = {"q": q, "k": k, "v": v}
    if case.get("text"):
        tensors |= {f"text_{n}": random(2, words, *x.shape[2:], dtype=dtype) for n, x in (("q", q), ("k", k), ("v", v))}
    names = () if not case.get("weights", True) or case.get("eps", 0) is None else ("q_weight", "k_weight")
    if case.get("own_weights"):
        names += ("text_q_weight", "text_k_weight")
    tensors |= {n: 1 + 0.3 * random(count["k" in n.split("_")], dtype=dtype) for n in names}
    tokens = image + words * bool(case.get("text"))
    kind = case.get("rope")
    settings = {"eps": case.get("eps", 1e-3), "across_heads": bool(case.get("across"))}
    settings |= {"text_first": case.get("text_first", True)}
    rope = None
    if kind is not None:
        length = {"image": image, "text": words}.get(kind, tokens)
        cos, sin, pairs = tables(length, dim, kind != "halves")
        if kind == "per head":
            cos, sin = (torch.stack([x.roll(h, 0) for h in range(heads)], 1)[None] for x in (cos, sin))
        if kind == "per sample":
            cos, sin = (torch.stack((x, x.roll(1, 0)))[:, :, None] for x in (cos, sin))
        rope = RopeTables(cos.float().to(DEVICE), sin.float().to(DEVICE), pairs)
    return tensors, settings, rope


def call(function, t, settings, rope):
    weights = (t["q_weight"], t["k_weight"]) if "q_weight" in t else None
    own = (t["text_q_weight"], t["text_k_weight"]) if "text_q_weight" in t else None
    text = (t["text_q"], t["text_k"], t["text_v"]) if "text_q" in t else None
    return function(t["q"], t["k"], t["v"], weights=weights, text=text, text_weights=own, rope=rope, **settings)


def eager(q, k, v, *, eps, weights, across_heads, rope, text, text_weights, text_first):
    """As hosts do it: each step rounded to the dtype, but for the sum of squares and the rotation."""

    def norm(x, w):
        if eps is None:
            return x
        flat = x.flatten(2) if across_heads else x
        y = (flat.float() * torch.rsqrt(flat.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
        return (y if w is None else y * w).reshape(x.shape)

    weights = weights or (None, None)
    parts = [norm(x, w) for x, w in zip((q, k), weights, strict=True)] + [v]
    if text is not None:
        words = [norm(x, w) for x, w in zip(text, text_weights or weights, strict=False)] + [text[2]]
        parts = [torch.cat((t, x) if text_first else (x, t), 1) for t, x in zip(words, parts, strict=True)]
    return reference.qk_norm_rope(*parts, rope=rope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", list(CASES))
def test_kernels(case, dtype, assert_accurate, launched):
    pytest.importorskip("triton")
    if DEVICE == "cpu" and dtype is torch.bfloat16:
        dtype = torch.float32  # the interpreter is not used for bf16: then this is the same as fp32
    dim = 32 if case == "halves" else 24
    tensors, settings, rope = build(CASES[case], dtype, dim)
    tensors = {n: x.requires_grad_() for n, x in tensors.items()}
    grads, results = None, []
    for function, convert in ((qk_norm_rope, 0), (eager, 0), (reference.qk_norm_rope, 1)):
        t, turn = tensors, rope
        if convert:
            t = {n: x.detach().double().requires_grad_() for n, x in tensors.items()}
            turn = None if rope is None else RopeTables(rope.cos.double(), rope.sin.double(), rope.interleaved)
        with interpreted() if function is qk_norm_rope else nullcontext():
            outs = call(function, t, settings, turn)
            grads = grads or [torch.randn_like(o) for o in outs]
            back = torch.autograd.grad(
                outs, list(t.values()), [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)]
            )
        results.append([o.detach() for o in outs] + list(back))
    assert set(launched) == {"prologue_kernel", "prologue_backward_kernel"}
    for name, *values in zip(("out q", "out k", "out v", *(f"d {n}" for n in tensors)), *results, strict=True):
        assert_accurate(name, *values)


@pytest.mark.parametrize("dim, image", [(40, 1), (72, 17)])
def test_sizes(dim, image, assert_accurate):
    pytest.importorskip("triton")
    tensors, settings, rope = build(CASES["FLUX, double"], torch.float32, dim, 2, image, 1)
    results = []
    for context, to in ((interpreted(), torch.float32), (nullcontext(), torch.float32), (nullcontext(), torch.float64)):
        t = {n: x.to(to).requires_grad_() for n, x in tensors.items()}
        with context:
            outs = call(qk_norm_rope, t, settings, rope)
            results.append([*outs, *torch.autograd.grad(sum(o.sin().sum() for o in outs), list(t.values()))])
    for i, values in enumerate(zip(*results, strict=True)):
        assert_accurate(str(i), *(x.detach() for x in values))


@pytest.mark.parametrize("learns", ["nothing", "one weight", "all weights"])
def test_weights_learn_in_their_own_dtype(learns):
    """Weights wider than the values keep their digits; frozen ones cost nothing."""
    pytest.importorskip("triton")
    tensors, settings, rope = build(CASES["FLUX, double"], torch.float16)
    names = {"nothing": [], "one weight": ["text_k_weight"], "all weights": [n for n in tensors if "weight" in n]}
    results = []
    for context in (interpreted(), nullcontext()):
        t = {n: x.float() if "weight" in n else x for n, x in tensors.items()}
        t = {n: x.detach().requires_grad_(n in ("q", *names[learns])) for n, x in t.items()}
        with context:
            outs = call(qk_norm_rope, t, settings, rope)
        loss = outs[0].float().sin().sum() + outs[1].float().cos().sum()
        results.append(torch.autograd.grad(loss, [x for x in t.values() if x.requires_grad]))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
    assert len(results[0]) == 1 + len(names[learns])


def test_strided_parts_and_no_gradient():
    pytest.importorskip("triton")
    fused = random(2, 9, 3 * 48)
    q, k, v = (x.unflatten(-1, (2, 24)) for x in fused.chunk(3, -1))
    text = tuple(x.unflatten(-1, (2, 24)) for x in random(2, 4, 3 * 48).chunk(3, -1))
    v = v.contiguous()  # laid out unlike the keys
    want = reference.qk_norm_rope(q, k, v, eps=1e-6, text=text)
    with interpreted():
        for a, b in zip(qk_norm_rope(q, k, v, eps=1e-6, text=text), want, strict=True):
            torch.testing.assert_close(a, b)


def test_without_values():
    """Text and image joined for queries and keys alone, where values are joined already."""
    pytest.importorskip("triton")
    q, k, text_q, text_k = (random(2, n, 2, 24).requires_grad_() for n in (9, 9, 4, 4))
    results = []
    for context in (nullcontext(), interpreted()):
        with context:
            out_q, out_k, nothing = qk_norm_rope(q, k, eps=1e-6, text=(text_q, text_k, None))
            grads = torch.autograd.grad(
                (out_q * out_q.detach().cos()).sum() + out_k[:, 1:].sum(), (q, k, text_q, text_k)
            )
        assert nothing is None
        results.append((out_q, out_k, *grads))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_operator():
    pytest.importorskip("triton")
    tensors, settings, rope = build(CASES["FLUX, double"], torch.float32)
    arguments = [
        tensors[n].requires_grad_()
        for n in ("q", "k", "v", "text_q", "text_k", "text_v", "q_weight", "k_weight", "text_q_weight", "text_k_weight")
    ]
    torch.library.opcheck(prologue_op, (*arguments, rope.cos, rope.sin, True, 1e-3, False, True, 0, 12))
    bare = (*arguments[:2], *(None,) * 10, True, 1e-3, False, True, 0, 0)
    torch.library.opcheck(prologue_op, bare)


@pytest.mark.parametrize("change, message", [
    ({"weights": (torch.ones(3), torch.ones(8))}, "weight must be"),
    ({"rope": RopeTables(torch.ones(9, 8), torch.ones(9, 8))}, "do not fit"),
    ({"rope": RopeTables(torch.ones(5, 6), torch.ones(5, 6))}, "do not fit"),
    ({"text": (torch.ones(2, 3, 3, 8),) * 2 + (None,)}, "go together"),
    ({"text": (torch.ones(2, 3, 2, 8),) * 3}, "text's q"),
    ({"text_weights": (torch.ones(8),) * 2}, "text_weights"),
])  # fmt: skip
def test_wrong_input(change, message):
    q, k, v = (torch.randn(2, 5, 3, 8) for _ in range(3))
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(q, k, v, eps=1e-6, **change)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from linfusion.kernels import prologue_triton as kernels

def build(kernel, **constants):
    constants = dict(D=128, BD=128, BH=32, NORM=True, WEIGHT=True, ROPE=True, PER_HEAD=False) | constants
    types = {n: "constexpr" if n in constants else "fp32" if n == "eps" else "i32" for n in kernel.arg_names}
    types |= {n: "*bf16" for n in types if n.isupper() and n not in constants}
    types |= {n: "*fp32" for n in ("COS", "SIN", "PARTIAL") if n in types}
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4))

for across, paired in ((False, True), (True, False)):
    build(kernels.prologue_kernel, ACROSS=across, PAIRED=paired, VALUES=True)
    build(kernels.prologue_backward_kernel, ACROSS=across, PAIRED=paired, LEARN=True, STAGES=2)
"""


def test_the_compiler_takes_them():
    """It checks types that the interpreter does not; compiling for a GPU needs none."""
    pytest.importorskip("triton")
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
