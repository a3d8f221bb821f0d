"""Rotation tables: one form for all tokens, one with angles per sample or head."""

import pytest
import torch

from linfusion.kernels import RopeTables, rotate


def turned(x, angle, interleaved):
    """RoFormer, eq. 34, channel by channel; `x` `[D]`, `angle` `[D / 2]`."""
    out, half = x.clone(), len(x) // 2
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        out[a] = x[a] * angle[i].cos() - x[b] * angle[i].sin()
        out[b] = x[a] * angle[i].sin() + x[b] * angle[i].cos()
    return out


def tables(angle, interleaved):
    wide = angle.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angle, angle), dim=-1)
    return RopeTables(wide.cos(), wide.sin(), interleaved)


def test_every_form_of_table_is_the_formula():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    for interleaved in (True, False):
        for shape in ((5, 4), (1, 5, 1, 4), (2, 5, 1, 4), (1, 5, 3, 4), (2, 5, 3, 4)):
            angle = torch.randn(shape, dtype=torch.float64)
            each = (angle[None, :, None] if angle.ndim == 2 else angle).expand(2, 5, 3, 4)
            pairs = zip(x.flatten(0, 2), each.reshape(-1, 4), strict=True)
            want = torch.stack([turned(a, b, interleaved) for a, b in pairs])
            made = tables(angle, interleaved)
            torch.testing.assert_close(rotate(x, made), want.view_as(x))
            torch.testing.assert_close(rotate(x[:, 1:4], made.slice(1, 4)), want.view_as(x)[:, 1:4])
            other = tables(angle, not interleaved)
            assert (rotate(x, other) - want.view_as(x)).abs().max() > 1e-2


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 3, 4)], ids=str)
def test_tokens_that_do_not_turn(shape, first):
    x, made = torch.randn(2, 7, 3, 8, dtype=torch.float64), tables(torch.randn(shape, dtype=torch.float64), True)
    still, turning = (slice(0, 2), slice(2, 7)) if first else (slice(5, 7), slice(0, 5))
    got = rotate(x, made.still(2, first=first))
    torch.testing.assert_close(got[:, still], x[:, still])
    torch.testing.assert_close(got[:, turning], rotate(x[:, turning], made))


@pytest.mark.parametrize("shape", [(4, 8), (5, 6), (3, 5, 1, 8), (2, 5, 2, 8), (2, 1, 3, 8)], ids=str)
def test_tables_of_another_shape(shape):
    with pytest.raises(ValueError, match="do not fit"):
        rotate(torch.randn(2, 5, 3, 8), RopeTables(torch.ones(shape), torch.zeros(shape)))
