"""`torch.compile(fullgraph=True)` of hosts of pictures; video hosts, UNets, PixArt and FLUX.1 have theirs elsewhere."""

import pytest
import torch

import linfusion as lf

from ..models import HOSTS, forward, gap

SHAPED = ("sd3.5", "dit")
"""Their latents have the grid as their shape, for which everything is compiled again; elsewhere it is data."""


@pytest.fixture(autouse=True)
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [n for n in (*SHAPED, "chroma-padded", "qwen-edit", "flux2") if n in HOSTS])
def test_one_graph_and_the_same_answer(name):
    """A window in some layers and a linear mechanism in the others, trained a little; another grid is its own."""
    tiny = HOSTS[name]
    model = lf.apply(tiny.build(), {tiny.some: lf.CLEAR(2, pool=2), "*": lf.LiT(heads=1)})
    used = {type(m.linfusion.config) for m in model.modules() if hasattr(m, "linfusion")}
    assert used == {lf.CLEAR, lf.LiT}
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".linfusion." in key:
                p.add_(0.2 * torch.randn_like(p))
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    answers = []
    for grid in ((4, 4),) if tiny.square else ((6, 4),) if name in SHAPED else ((4, 4), (8, 2)):
        answers.append(forward(compiled, tiny.inputs(*grid)))
        assert gap(answers[-1], forward(model, tiny.inputs(*grid))) < 1e-5
        assert gap(answers[-1], forward(tiny.build(), tiny.inputs(*grid))) > 1e-2
