"""Triton's linear attention in its interpreter, against the specification in float64."""

import pytest
import torch

from linfusion.kernels import RopeTables, backend, linear_attention, linear_launch, qk_norm_rope, reference
from linfusion.kernels.backend import interpreted, without_triton
from linfusion.kernels.launch import Launch, forget
from linfusion.kernels.linear_launch import linear_attention_op

from .test_linear import tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = {"state_kernel", "output_kernel", "query_backward_kernel", "key_backward_kernel"}
HALF = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]  # the interpreter spoils bf16 products


@pytest.fixture(autouse=True)
def triton():
    pytest.importorskip("triton")
    with interpreted():
        yield


def doubled(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def compare(assert_accurate, q, k, v, launched, **settings):
    """Output and gradients as near to float64 as the specification in the same dtype is, twice over."""
    grad = torch.randn_like(q)
    results = []
    exact_rope = settings.get("rope")
    if exact_rope is not None:
        exact_rope = RopeTables(exact_rope.cos.double(), exact_rope.sin.double(), exact_rope.interleaved)
    exact = settings | {"rope": exact_rope, "key_weight": doubled(settings.get("key_weight"))}
    same_dtype = [x.detach().clone() for x in (q, k, v)]
    for inputs, function, given in (
        ([x.detach().clone() for x in (q, k, v)], linear_attention, settings),
        (same_dtype, plain, settings),
        ([x.detach().double() for x in (q, k, v)], reference.linear_attention, exact),
    ):
        for x in inputs:
            x.requires_grad_()
        out = function(*inputs, **given)
        results.append((out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))))
    assert set(launched) == KERNELS
    launched.clear()
    for name, *values in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_accurate(name, *values)


def plain(q, k, v, *, eps=1e-6, scale=1.0, feature_map="elu1", normalize="divide", rope=None, **given):
    """The formula with every step rounded to the dtype, as PyTorch's operators leave it."""
    from linfusion.kernels.features import FEATURE_MAPS
    from linfusion.kernels.rotary import rotate

    phi = FEATURE_MAPS[feature_map]
    mask, weight = given.get("key_mask"), given.get("key_weight")
    group = q.shape[2] // k.shape[2]
    q, k = phi(q), phi(k)
    count = torch.full((k.shape[0], 1, 1), k.shape[1], device=k.device)
    if mask is not None:
        k, v, count = k * mask[..., None, None], v * mask[..., None, None], mask.sum(1).clamp(min=1)[:, None, None]
    if weight is not None:
        k = k * weight[..., None].to(k.dtype)
    rq, rk = (q, k) if rope is None else (rotate(q, rope), rotate(k, rope))
    rk, k, v = (x.repeat_interleave(group, 2) for x in (rk, k, v))
    root = count[..., None] ** -0.5
    state = (rk * root).to(k.dtype).permute(0, 2, 3, 1) @ (v * root).to(k.dtype).transpose(1, 2)
    out = (rq.transpose(1, 2) @ state).transpose(1, 2) * scale
    total = (q * (k.sum(1, keepdim=True) / count[..., None]).to(q.dtype)).sum(-1, keepdim=True) * scale
    mean = (v.sum(1, keepdim=True) / count[..., None]).to(v.dtype)
    if normalize == "divide":
        out = out / (total + eps)
    elif normalize == "inline":
        out = out + (1 - total) * mean
    elif normalize == "mala":
        out = (1 + 1 / (total + eps)) * out - total * mean
    return out


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 16), (2, 63, 3, 40), (1, 200, 2, 72), (2, 100, 1, 128), (1, 70, 1, 160)], ids=str
)
def test_any_length_and_head_dim(shape, dtype, assert_accurate, launched):
    q, k, v = (random(*shape, dtype=dtype) for _ in range(3))
    compare(assert_accurate, q, k, v, launched, eps=1e-4)


@pytest.mark.parametrize("normalize", ["divide", "none", "inline", "mala"])
@pytest.mark.parametrize("feature_map", ["elu1", "relu", "relu_eps", "softmax", "identity"])
def test_feature_maps_and_epilogues(feature_map, normalize, assert_accurate, launched):
    if feature_map == "identity" and normalize in ("divide", "mala"):
        return  # divides by what may be zero
    q, k, v = (random(2, 90, 2, 24) for _ in range(3))
    compare(
        assert_accurate, q, k, v, launched, feature_map=feature_map, normalize=normalize, eps=1e-3,
        scale=1.0 if normalize == "divide" else 0.3,
    )  # fmt: skip


@pytest.mark.parametrize("form", ["interleaved", "halves", "per head", "per sample"])
def test_rotation(form, assert_accurate, launched):
    q, k, v = (random(2, 50, 2, 32) for _ in range(3))
    cos, sin, kind = tables(50, 32, form != "halves")
    cos, sin = cos.float(), sin.float()
    if form == "per head":
        cos, sin = (torch.stack((x, x.roll(1, 0)), dim=1)[None] for x in (cos, sin))
    if form == "per sample":
        cos, sin = (torch.stack((x, x.roll(1, 0)))[:, :, None] for x in (cos, sin))
    compare(assert_accurate, q, k, v, launched, rope=RopeTables(cos.to(DEVICE), sin.to(DEVICE), kind))


def test_masks_weights_groups_and_another_length(assert_accurate, launched):
    q, k, v = random(2, 45, 4, 32), random(2, 70, 2, 32), random(2, 70, 2, 32)
    mask = torch.rand(2, 70, device=DEVICE) > 0.3
    compare(assert_accurate, q, k, v, launched, key_mask=mask)
    compare(assert_accurate, q, k, v, launched, key_weight=torch.rand(2, 70, 2, device=DEVICE))
    compare(assert_accurate, q, k, v, launched, key_mask=mask, key_weight=torch.rand(2, 70, 2, device=DEVICE))
    compare(assert_accurate, q, k, v, launched, key_mask=mask, normalize="inline", feature_map="identity")


def test_strided_inputs_and_many_pieces(assert_accurate, launched, monkeypatch):
    from linfusion.kernels import linear_launch

    monkeypatch.setattr(linear_launch, "multiprocessors", lambda device: 8)
    monkeypatch.setattr(linear_launch, "SCRATCH", 100.0)
    whole = random(1, 170, 3, 2, 32)
    q, k, v = (whole[:, 5:165, i] for i in range(3))
    compare(assert_accurate, q, k, v, launched)  # several partial records a head, summed first
    monkeypatch.setattr(linear_launch, "READ_TOGETHER", 64)
    forget()
    compare(assert_accurate, q, k, v, launched)  # and added up by their readers


def test_regrouped_heads(assert_accurate, launched):
    q, k, v = (random(1, 60, 4, 16) for _ in range(3))
    cos, sin, kind = tables(60, 16)
    rope = RopeTables(cos.float().to(DEVICE), sin.float().to(DEVICE), kind)
    got = linear_attention(q, k, v, heads=2, rope=rope, feature_map="relu_eps")
    with without_triton():
        want = linear_attention(q, k, v, heads=2, rope=rope, feature_map="relu_eps")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_no_gradient_needs_no_operator(launched):
    q, k, v = (random(1, 30, 2, 16) for _ in range(3))
    with without_triton():
        want = linear_attention(q, k, v)
    torch.testing.assert_close(linear_attention(q, k, v), want, rtol=1e-5, atol=1e-5)
    assert launched == ["state_kernel", "output_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_pointers_of_any_alignment(dtype):
    """The second call has the first one's shapes, but begins an odd number of elements later."""
    whole = random(3 * 40 * 2 * 32 + 1, dtype=dtype)
    for at in (0, 1):
        q, k, v = whole[at : at + 3 * 40 * 2 * 32].view(3, 1, 40, 2, 32)
        torch.testing.assert_close(linear_attention(q, k, v), linear_attention(q.clone(), k.clone(), v.clone()))


@pytest.mark.parametrize(("shape", "v_dim"), [((2, 20, 2, 16), 32), ((0, 20, 2, 16), 16), ((2, 0, 2, 16), 16)])
def test_what_the_kernels_do_not_know(shape, v_dim, launched):
    """Values of another width, and nothing at all."""
    q, k, v = random(*shape), random(*shape), random(*shape[:3], v_dim)
    assert linear_attention(q, k, v).shape == v.shape
    assert not launched


def test_operator():
    q, k, v = (random(1, 20, 2, 16).requires_grad_() for _ in range(3))
    cos, sin, _ = tables(20, 16)
    weight, count = torch.rand(1, 20, 2, device=DEVICE), torch.full((1,), 20.0, device=DEVICE)
    for extra in ((None,) * 4, (weight, count, cos.float().to(DEVICE), sin.float().to(DEVICE))):
        torch.library.opcheck(linear_attention_op, (q, k, v, *extra, True, "elu1", "divide", 1e-6, 1.0))


def test_whole_graph():
    q, k, v = (random(1, 20, 2, 16).requires_grad_() for _ in range(3))
    compiled = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), linear_attention(q, k, v))


def halves(dim):
    return RopeTables(*tables(9, dim, False)[:2], interleaved=False)


@pytest.mark.parametrize(
    ("dim", "call", "reason"),
    [
        (16, lambda q, k, v: linear_attention(q, k, torch.cat((v, v), -1)), "values have head dim 32"),
        (24, lambda q, k, v: linear_attention(q, k, v, rope=halves(24)), "a power of two, not 24"),
        (16, lambda q, k, v: linear_attention(q, k, v, feature_map="softmax", heads=1), "cannot be put in 1"),
        (16, lambda q, k, v: linear_attention(q, k, v, key_weight=q[..., 0].clone().requires_grad_()), "key_weight"),
        (16, lambda q, k, v: qk_norm_rope(q.mT.contiguous().mT, k, eps=1e-6), "last dimension"),
        (16, lambda q, k, v: qk_norm_rope(q.transpose(1, 2).contiguous().transpose(1, 2), k, eps=1e-6), "side by side"),
    ],
)  # fmt: skip
def test_what_pytorch_computes_is_said(caplog, launched, dim, call, reason):
    backend._log_once.cache_clear()
    call(*random(3, 2, 9, 2, dim))
    assert not launched
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "dim"), [(2, 20, 2048, 64), (2, 16, 4096, 72), (1, 24, 4096, 128)]
)
def test_memory(monkeypatch, batch, heads, tokens, dim):
    """What backward takes beside inputs and outputs is under a twentieth of them, with what forward kept for it."""
    taken, empty = [], torch.empty
    monkeypatch.setattr(Launch, "__call__", lambda self, *tensors: None)
    monkeypatch.setattr(linear_launch, "multiprocessors", lambda device: 132)
    q, k, v, grad = (empty(batch, tokens, heads, dim, dtype=torch.bfloat16, device="meta") for _ in range(4))
    settings = (None, None, None, None, True, "elu1", "divide", 1e-4, 1.0)
    recipe = linear_launch._forward_recipe(q, k, v, *settings)
    _, records = linear_launch.forward_to_keep(q, k, v, *settings, recipe)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: taken.append(empty(*a, **k)) or taken[-1])
    linear_launch.backward(grad, q, k, v, records, *settings)
    beside = [records, *(x for x in taken if x.dtype is torch.float32)]
    assert len(beside) > 1
    assert sum(x.nbytes for x in beside) < 0.05 * 7 * q.nbytes
