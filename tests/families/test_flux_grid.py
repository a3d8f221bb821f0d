"""The grid of FLUX is noted on the tensor that tells it: the steps of samplers and trainers need not wait for it."""

import torch

import linfusion as lf
from linfusion.families import flux

from ..models import HOSTS, flux_ids, forward


def test_read_once_a_tensor(monkeypatch):
    """Until it is written to; another tensor of as many tokens is another grid."""
    reads, real = [], flux.ids_grid
    monkeypatch.setattr(flux, "ids_grid", lambda ids: reads.append(1) or real(ids))
    tiny = HOSTS["flux"]
    model, inputs = lf.apply(tiny.build(), lf.CLEAR(2)), tiny.inputs(6, 9)

    def grid():
        forward(model, inputs)
        return lf.describe(model).layers[0].grid

    assert [grid(), grid(), grid()] == [(6, 9)] * 3 and len(reads) == 1
    inputs["img_ids"].copy_(flux_ids(9, 6))
    assert grid() == (9, 6) and len(reads) == 2
    inputs["img_ids"] = flux_ids(3, 18)
    assert grid() == (3, 18) and len(reads) == 3
    with torch.inference_mode():  # such tensors do not tell whether they were written to
        inputs["img_ids"] = flux_ids(6, 9)
    assert [grid(), grid()] == [(6, 9)] * 2 and len(reads) == 5
