"""pool_grid: plain averages at the published initialisation, whole cells and cut ones."""

import math

import pytest
import torch
import torch.nn.functional as F

from linfusion.kernels import pool_grid


@pytest.mark.parametrize("pool", [2, 3])
@pytest.mark.parametrize("grid", [(1, 1), (4, 6), (7, 5), (3, 8, 5)], ids=str)
def test_equal_weights_are_averages(grid, pool):
    x = torch.randn(2, math.prod(grid), 3, 4, dtype=torch.float64)
    weight = torch.full((pool, pool), pool**-2, dtype=torch.float64)
    image = x.reshape(-1, *grid[-2:], 12).permute(0, 3, 1, 2)
    want = F.avg_pool2d(image, pool, ceil_mode=True, count_include_pad=False)
    want = want.permute(0, 2, 3, 1).reshape(2, -1, 3, 4)
    torch.testing.assert_close(pool_grid(x, grid=grid, weight=weight), want)


@pytest.mark.parametrize("grid", [(4, 6), (7, 5), (3, 8, 5)], ids=str)
def test_grid_in_a_tensor(grid):
    x = torch.randn(2, math.prod(grid), 2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    plain, op = (pool_grid(x, grid=g, weight=weight) for g in (grid, torch.tensor(grid)))
    assert torch.equal(plain, op)
    grad = torch.randn_like(plain)
    want, got = (torch.autograd.grad(o, (x, weight), grad) for o in (plain, op))
    torch.testing.assert_close(got, want)


def test_opcheck():
    x, weight = torch.randn(1, 20, 2, 4, requires_grad=True), torch.randn(2, 2, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.linfusion.pool_grid.default, (x, weight, torch.tensor([4, 5])), test_utils=checks)
