"""window_attention against its specification: values, log-sum-exp and every gradient, on odd grids."""

import math
import subprocess
import sys

import pytest
import torch

from linfusion.kernels import reference, window_attention, window_pairs

GRIDS = [(1, 1), (5, 7), (16, 24), (21, 34), (3, 9, 20), (2, 17, 5)]
RADII = [1, 2.5, 5, 8, 100, (3, 6), (2, 3, 4)]
WINDOWS = [(g, r) for g in GRIDS for r in RADII if not isinstance(r, tuple) or len(r) == len(g)]
CONTEXTS = {
    "image": dict(text=0),
    "text-first": dict(text=4, masked=True, pooled=3),
    "text-last": dict(text=5, text_first=False),
    "all-last": dict(text=3, text_first=False, masked=True, pooled=2),
}


def inputs(grid, text=0, text_first=True, masked=False, pooled=0, heads=2, dim=8, dtype=torch.float64, batch=2):
    torch.manual_seed(0)
    tokens = math.prod(grid) + text
    q, k, v = (torch.randn(batch, tokens, heads, dim, dtype=dtype, requires_grad=True) for _ in range(3))
    extra = [torch.randn(batch, pooled, heads, dim, dtype=dtype, requires_grad=True) for _ in range(2)]
    options = dict(grid=grid, text=text, text_first=text_first)
    if masked:
        options["text_mask"] = torch.rand(batch, text) > 0.4
    if pooled:
        options |= dict(pooled_k=extra[0], pooled_v=extra[1])
    return (q, k, v), options, [q, k, v] + (extra if pooled else [])


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("grid", "radius"), WINDOWS, ids=str)
def test_equals_the_specification(grid, radius, context):
    qkv, options, leaves = inputs(grid, **CONTEXTS[context])
    out, lse = window_attention(*qkv, radius=radius, return_lse=True, **options)
    plain = window_attention(*qkv, radius=radius, **options)
    want, want_lse = reference.window_attention(*qkv, radius=radius, return_lse=True, **options)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(plain, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)
    grads = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out, lse), leaves, grads)
    expected = torch.autograd.grad((want, want_lse), leaves, grads)
    for name, a, b in zip(("dq", "dk", "dv", "dpooled_k", "dpooled_v"), got, expected, strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_the_formula(dtype, assert_accurate):
    qkv, options, _ = inputs((9, 12), text=4, dim=40, dtype=dtype)
    exact_qkv = [x.detach().double().requires_grad_() for x in qkv]
    exact = reference.window_attention(*exact_qkv, radius=4, **options)
    same = naive(*qkv, radius=4, **options)
    out = window_attention(*qkv, radius=4, **options)
    assert out.dtype == dtype
    assert_accurate("out", out, same, exact)
    grad = torch.randn_like(out)
    got, low = (torch.autograd.grad(o, qkv, grad, retain_graph=True) for o in (out, same))
    high = torch.autograd.grad(exact, exact_qkv, grad.double())
    for name, a, b, c in zip(("dq", "dk", "dv"), got, low, high, strict=True):
        assert_accurate(name, a, b, c)


def naive(q, k, v, *, grid, radius, text, text_first):
    """The same formula, every operation in the dtype of the inputs."""
    seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool)
    image = slice(text, None) if text_first else slice(0, q.shape[1] - text)
    seen[image, image] = reference.window_mask(grid, (radius,) * len(grid))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def test_the_rule_is_strict():
    (q, k, v), options, _ = inputs((9, 9))
    neighbours = [reference.window_mask((9, 9), (r, r))[40].sum().item() for r in (1, 2, 3)]
    assert neighbours == [1, 9, 25]  # dy^2 + dx^2 < r^2: radius 3 leaves out (0, 3), keeps (2, 2)
    torch.testing.assert_close(window_attention(q, k, v, radius=1, **options), v)


def test_grouped_heads():
    qkv, options, _ = inputs((4, 5), text=2, heads=4)
    q, k, v = qkv[0], qkv[1][:, :, :2], qkv[2][:, :, :2]
    out = window_attention(q, k, v, radius=2, **options)
    want = window_attention(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2), radius=2, **options)
    torch.testing.assert_close(out, want)
    pk, pv = (torch.randn(2, 3, 2, 8, dtype=torch.float64) for _ in range(2))
    out = window_attention(q, k, v, radius=2, pooled_k=pk, pooled_v=pv, **options)
    want = reference.window_attention(q, k, v, radius=2, pooled_k=pk, pooled_v=pv, **options)
    torch.testing.assert_close(out, want)


def test_equally_long_grids_do_not_share_a_plan():
    (q, k, v), _, _ = inputs((8, 8))
    for grid in [(8, 8), (16, 4), (4, 16), (8, 8)]:
        want = reference.window_attention(q, k, v, grid=grid, radius=2)
        torch.testing.assert_close(window_attention(q, k, v, grid=grid, radius=2), want)


def test_a_plan_made_in_inference_mode_serves_training():
    (q, k, v), _, _ = inputs((7, 11))
    with torch.inference_mode():
        window_attention(q.detach(), k.detach(), v.detach(), grid=(7, 11), radius=3.5)
    window_attention(q, k, v, grid=(7, 11), radius=3.5).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize(("grid", "radius"), WINDOWS, ids=str)
def test_pair_count(grid, radius):
    axes = radius if isinstance(radius, tuple) else (radius,) * len(grid)
    assert window_pairs(grid, radius) == int(reference.window_mask(grid, axes).sum())


def test_opcheck():
    q, k, v, pk, pv = (torch.randn(1, n, 2, 8, requires_grad=True) for n in (10, 10, 10, 2, 2))
    op = torch.ops.linfusion.window_attention.default
    settings = ([2.0, 2.0], False, 2, True, True, 0.3)
    torch.library.opcheck(op, (q, k, v, None, None, None, None, [2, 4], *settings, False, False))
    mask, grid = torch.tensor([[True, False]]), torch.tensor([2, 4])
    torch.library.opcheck(op, (q, k, v, pk, pv, mask, grid, [], *settings, True, False))


@pytest.mark.parametrize(("grid", "radius"), [((9, 12), 4), ((9, 12), (2, 5)), ((3, 6, 7), (2, 3, 2.5))], ids=str)
def test_a_box(grid, radius):
    qkv, options, leaves = inputs(grid, text=3, pooled=2)
    options |= dict(radius=radius, shape="box")
    out, want = window_attention(*qkv, **options), reference.window_attention(*qkv, **options)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_a_box_has_its_corners():
    assert reference.window_mask((9, 9), (3, 3), shape="box")[40].sum() == 25
    assert reference.window_mask((9, 9), (3, 3))[40].sum() == 21 + 4  # strict: (2, 2) lies within the disc of 3, too
    assert reference.window_mask((9, 9), (4, 4), shape="box")[40].sum() == 49
    assert reference.window_mask((9, 9), (4, 4))[40].sum() == 45


@pytest.mark.parametrize("text_first", [True, False])
def test_parts_of_several_ranks_merge(text_first):
    """Text queries of two halves of a picture, of which one leaves the text out, are those of the whole."""
    qkv, options, _ = inputs((8, 6), text=5, masked=True, text_first=text_first)
    words = slice(0, 5) if text_first else slice(48, 53)
    whole = window_attention(*qkv, radius=3, **options)[:, words]

    def half(rows, sees):
        image = [x[:, 5:] if text_first else x[:, :48] for x in qkv]
        image = [x.unflatten(1, (8, 6))[:, rows].flatten(1, 2) for x in image]
        parts = [(x[:, words], y) if text_first else (y, x[:, words]) for x, y in zip(qkv, image, strict=True)]
        return window_attention(
            *(torch.cat(p, 1) for p in parts), radius=3, **options | dict(grid=(4, 6)), text_sees=sees, return_lse=True
        )

    at = slice(0, 5) if text_first else slice(24, 29)
    (a, lse_a), (b, lse_b) = ((x[:, at] for x in half(*how)) for how in ((slice(0, 4), "all"), (slice(4, 8), "image")))
    share = torch.sigmoid(lse_a - lse_b)[..., None]
    torch.testing.assert_close(share * a + (1 - share) * b, whole)


def test_compiles_whole():
    (q, k, v), options, _ = inputs((6, 5), text=2)
    eager = window_attention(q, k, v, radius=3, **options)
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, radius=3, **options), eager)
    on_device = options | {"grid": torch.tensor([6, 5])}
    torch.testing.assert_close(compiled(q, k, v, radius=3, **on_device), eager)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_square():
    """512 x 512 tokens: a mask of S x S bytes alone would be 64 GiB. Measured in a process of its own, by VmHWM: what
    getrusage says of a child begins, on Linux, with the peak of the process that started it."""
    code = (
        "import torch; from linfusion.kernels import window_attention;"
        "q, k, v = (torch.randn(1, 512 * 512, 2, 32) for _ in range(3));"
        "out = window_attention(q, k, v, grid=(512, 512), radius=8);"
        "assert out.isfinite().all();"
        "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 2e9


BAD = {
    "radius zero": (dict(radius=0), "radius must be positive"),
    "radius negative": (dict(radius=-3), "radius must be positive"),
    "radius nan": (dict(radius=float("nan")), "radius must be positive"),
    "radius of another rank": (dict(radius=(2, 2, 2)), "has 3 axes, the grid has 2"),
    "grid of another length": (dict(grid=(4, 4)), "4 x 4 = 16"),
    "grid of one axis": (dict(grid=(20,)), "grid must be"),
    "mask of another shape": (dict(text=0, text_mask=torch.ones(2, 3, dtype=torch.bool)), "text_mask must be bool"),
    "shape": (dict(shape="disc"), "shape must be one of 'ellipsoid', 'box', got 'disc'"),
    "text_sees": (dict(text_sees="text"), "text_sees must be one of 'all', 'image', got 'text'"),
    "half of the pooled pair": (dict(pooled_k=torch.randn(2, 1, 2, 8)), "go together"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, message = BAD[case]
    q, k, v = (torch.randn(2, 20, 2, 8) for _ in range(3))
    with pytest.raises(ValueError, match=message):
        window_attention(q, k, v, **({"grid": (4, 5), "radius": 2} | change))


def test_mismatched_tensors():
    q = torch.randn(2, 20, 2, 8)
    with pytest.raises(ValueError, match="share one floating dtype"):
        window_attention(q, q.double(), q.double(), grid=(4, 5), radius=2)
    with pytest.raises(ValueError, match=r"must be \[B, S, H, D\]"):
        window_attention(q[0], q[0], q[0], grid=(4, 5), radius=2)
    with pytest.raises(ValueError, match="heads of k must divide"):
        window_attention(q, q.repeat(1, 1, 2, 1)[:, :, :3], q.repeat(1, 1, 2, 1)[:, :, :3], grid=(4, 5), radius=2)
