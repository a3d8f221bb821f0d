"""depthwise_conv against the sum written out token by token: values, every gradient, grids known late."""

import math

import pytest
import torch

from linfusion.kernels import depthwise_conv, reference

GRIDS = [(1, 1), (5, 7), (2, 3, 5)]


def written_out(v, grid, weight, bias):
    """`[B, N, H, D]`; `weight` `[H * D or D, k, k]`, the latter the same for every head."""
    heads, dim = v.shape[2:]
    reach, (h, w), frames = weight.shape[1] // 2, grid[-2:], math.prod(grid[:-2])
    per_head = weight.shape[0] != dim
    rows = []
    for t in range(frames * h * w):
        f, y, x = t // (h * w), t // w % h, t % w
        total = torch.zeros_like(v[:, 0])
        for a in range(max(0, y - reach), min(h, y + reach + 1)):
            for b in range(max(0, x - reach), min(w, x + reach + 1)):
                taps = weight[:, a - y + reach, b - x + reach]
                total = total + v[:, (f * h + a) * w + b] * (taps.view(heads, dim) if per_head else taps)
        if bias is not None:
            total = total + (bias.view(heads, dim) if per_head else bias)
        rows.append(total)
    return torch.stack(rows, dim=1)


def inputs(grid, kernel=3, shared=False, heads=2, dim=8, dtype=torch.float64):
    torch.manual_seed(0)
    v = torch.randn(2, math.prod(grid), heads, dim, dtype=dtype, requires_grad=True)
    channels = dim if shared else heads * dim
    weight = torch.randn(channels, kernel, kernel, dtype=dtype, requires_grad=True)
    return v, weight, torch.randn(channels, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("late", [False, True], ids=["known", "tensor"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize(("kernel", "shared", "dim"), [(1, False, 8), (3, False, 40), (5, True, 8)], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_the_sum(grid, kernel, shared, dim, with_bias, late):
    v, weight, bias = inputs(grid, kernel, shared, dim=dim)
    bias = bias if with_bias else None
    leaves = [x for x in (v, weight, bias) if x is not None]
    want = written_out(v, grid, weight, bias)
    out = depthwise_conv(v, grid=torch.tensor(grid) if late else grid, weight=weight, bias=bias)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(reference.depthwise_conv(v, grid=grid, weight=weight, bias=bias), want)
    grad = torch.randn_like(want)
    got, expected = (torch.autograd.grad(o, leaves, grad) for o in (out, want))
    for name, a, b in zip(("dv", "dweight", "dbias"), got, expected, strict=False):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


def test_what_would_be_noticed():
    v, weight, bias = inputs((5, 7))
    out = depthwise_conv(v, grid=(5, 7), weight=weight, bias=bias)
    for wrong in (dict(grid=(7, 5)), dict(weight=weight.transpose(1, 2)), dict(weight=weight.flip(1, 2))):
        other = depthwise_conv(v, **({"grid": (5, 7), "weight": weight, "bias": bias} | wrong))
        assert (other - out).abs().max() > 1e-2
    # frames do not see each other
    v, weight, bias = inputs((2, 3, 5))
    apart = [depthwise_conv(x, grid=(3, 5), weight=weight, bias=bias) for x in v.split(15, dim=1)]
    torch.testing.assert_close(depthwise_conv(v, grid=(2, 3, 5), weight=weight, bias=bias), torch.cat(apart, dim=1))


def test_a_part_of_a_longer_sequence():
    v, weight, bias = inputs((5, 7))
    longer = torch.cat((torch.full_like(v[:, :3], float("nan")), v), dim=1)[:, 3:]
    for grid in ((5, 7), torch.tensor([5, 7])):
        want = depthwise_conv(v, grid=(5, 7), weight=weight, bias=bias)
        torch.testing.assert_close(depthwise_conv(longer, grid=grid, weight=weight, bias=bias), want)


@pytest.mark.parametrize("late", [False, True], ids=["known", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_the_formula(dtype, late, assert_accurate):
    v, weight, bias = inputs((5, 7), kernel=5, dtype=dtype)
    exact = written_out(*(x.double() if torch.is_tensor(x) else x for x in (v, (5, 7), weight, bias)))
    out = depthwise_conv(v, grid=torch.tensor([5, 7]) if late else (5, 7), weight=weight, bias=bias)
    assert out.dtype == dtype
    assert_accurate("out", out, written_out(v, (5, 7), weight, bias), exact)


def test_weights_follow_the_values():
    """Parameters may be kept wider than what they are applied to."""
    v, weight, bias = inputs((5, 7), dtype=torch.float32)
    out = depthwise_conv(v.bfloat16(), grid=(5, 7), weight=weight, bias=bias)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.sum(), (weight, bias))
    assert all(g.dtype == torch.float32 for g in grads)


def test_opcheck():
    v, weight, bias = inputs((4, 5), dtype=torch.float32)
    op, grid, text = torch.ops.linfusion.depthwise_conv.default, torch.tensor([4, 5]), torch.randn(2, 3, 2, 8)
    torch.library.opcheck(op, (v, weight, bias, torch.randn_like(v), text, False, [], grid))
    torch.library.opcheck(
        op, (v, weight, None, None, None, True, [4, 5], None), test_utils=("test_schema", "test_faketensor")
    )


def test_compiles_whole():
    def both(v, weight, bias, grid):
        return depthwise_conv(v, grid=grid, weight=weight, bias=bias)

    v, weight, bias = inputs((6, 5), shared=True)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    want = written_out(v, (6, 5), weight, bias)
    for grid in ((6, 5), torch.tensor([6, 5])):
        got = compiled(v, weight, bias, grid)
        torch.testing.assert_close(got, want)
        grads = (torch.autograd.grad(o.square().sum(), (v, weight, bias), retain_graph=True) for o in (got, want))
        torch.testing.assert_close(*grads)


BAD = {
    "even": (dict(weight=torch.randn(8, 2, 2)), "k odd so that there is a centre"),
    "not square": (dict(weight=torch.randn(8, 3, 5)), r"weight must be \[C, k, k\]"),
    "other channels": (dict(weight=torch.randn(5, 3, 3)), r"weight must be \[8 or 16, k, k\]"),
    "one axis": (dict(weight=torch.randn(8, 3)), r"weight must be \[8 or 16, k, k\]"),
    "other bias": (dict(bias=torch.randn(16)), r"bias must be \[8\]"),
    "grid of another length": (dict(grid=(4, 4)), "4 x 4 = 16"),
    "late grid of another length": (dict(grid=torch.tensor([4, 4])), "4 x 4 = 16"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        depthwise_conv(torch.randn(2, 20, 2, 8), **({"grid": (4, 5), "weight": torch.randn(8, 3, 3)} | change))
    with pytest.raises(ValueError, match="v must be"):
        depthwise_conv(torch.randn(20, 2, 8), grid=(4, 5), weight=torch.randn(8, 3, 3))
