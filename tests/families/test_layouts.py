"""Where each host's token grid comes from, and what is refused when it cannot be told."""

import pytest
import torch

import linfusion as lf
from linfusion.families.flux import ids_grid
from linfusion.kernels import window_attention

from ..models import HOSTS, TEXT, TINY, flux_ids, forward, gap, grids_for, noise, whole


def grids(model) -> set:
    return {r.grid for r in lf.describe(model).layers if r.mechanism}


def test_grids_are_the_hosts_own(tiny, model):
    lf.apply(model, lf.CLEAR(radius=2))
    assert grids(model) == {None}
    for grid in grids_for(tiny, (6, 9), (9, 4), (1, 3), (18, 26)):
        forward(model, tiny.inputs(*grid))
        assert grids(model) == {run.grid for run in tiny.sequences(*grid)}


def test_sizes_with_equally_many_tokens(tiny, model):
    """8 x 8 then 4 x 16 then 16 x 4: nothing is remembered by length."""
    sizes = grids_for(tiny, (8, 8), (4, 16), (16, 4))
    fresh = [forward(lf.apply(tiny.build(), lf.CLEAR(3)), tiny.inputs(*g)) for g in sizes]
    lf.apply(model, lf.CLEAR(3))
    for grid, want in zip(sizes, fresh, strict=True):
        assert torch.equal(forward(model, tiny.inputs(*grid)), want)


def test_arguments_by_position(tiny, model, inputs):
    """Hosts may be called with positional arguments, in the order of their signatures."""
    lf.apply(model, lf.CLEAR(3))
    want = forward(model, inputs)
    first, *rest = inputs
    with torch.no_grad():
        out = model(inputs[first], **{k: inputs[k] for k in rest}, return_dict=False)
    assert torch.equal(whole(out), want)


def test_flux_positional_ids():
    model, inputs = lf.apply(TINY["flux"].build(), lf.CLEAR(3)), TINY["flux"].inputs(6, 9)
    with torch.no_grad():
        out = model(*inputs.values(), return_dict=False)[0]
    assert torch.equal(out, forward(model, inputs))


@pytest.mark.parametrize("grid", [(1, 320), (320, 1), (3, 302), (302, 3), (2, 257), (257, 2)], ids=str)
def test_flux_ids_in_bf16_lose_whole_numbers(grid):
    """Pipelines hand ids over in the model's dtype, and bf16 has no 257: beyond 4096 pixels ids repeat and skip."""
    model, inputs = lf.apply(TINY["flux"].build(), lf.CLEAR(2)), TINY["flux"].inputs(*grid)
    forward(model, inputs | {"img_ids": flux_ids(*grid).bfloat16()})
    assert grids(model) == {grid}


def test_flux_ids_with_an_offset_or_a_batch():
    model, inputs = lf.apply(TINY["flux"].build(), lf.CLEAR(3)), TINY["flux"].inputs(6, 9)
    want = forward(model, inputs)
    moved = inputs["img_ids"] + torch.tensor([0.0, 5.0, 7.0])
    assert gap(forward(model, inputs | {"img_ids": moved}), want) < 1.0  # RoPE moves with them, the grid does not
    assert grids(model) == {(6, 9)}
    batched = {"img_ids": inputs["img_ids"][None], "txt_ids": inputs["txt_ids"][None]}  # the old form
    assert torch.equal(forward(model, inputs | batched), want)


BEHIND = [
    flux_ids(6, 9, frame=1),
    flux_ids(9, 6, frame=1),
    flux_ids(1, 1, frame=1),
    torch.cat((flux_ids(1, 4, frame=1), flux_ids(3, 2, frame=2))),
    flux_ids(3, 9, frame=1) + torch.tensor([0, 6, 0]),
]
"""Reference pictures as FLUX Kontext has them: as large, turned, a token, several, and as if the first went on."""


@pytest.mark.parametrize("ids", BEHIND, ids=["same", "turned", "token", "two", "below"])
def test_reference_pictures_stand_behind_the_grid(ids):
    ids = torch.cat((flux_ids(6, 9), ids))
    assert ids_grid(ids).tolist() == ids_grid(ids.bfloat16()).tolist() == [6, 9]
    model, inputs = TINY["flux"].build(), TINY["flux"].inputs(1, len(ids)) | {"img_ids": ids}
    lf.apply(model, {"single*": lf.CLEAR(3), "*": lf.LinFusion()})
    forward(model, inputs)
    for layer in lf.describe(model).layers:
        assert (layer.grid, layer.text) == ((6, 9), TEXT + len(ids) - 54)


ONE_FRAME = [torch.cat((flux_ids(6, 9), flux_ids(2, 2))), torch.cat((flux_ids(6, 9), flux_ids(3, 9)))]


@pytest.mark.parametrize("ids", ONE_FRAME, ids=["other-size", "same-width"])
def test_pictures_that_cannot_be_told_apart_are_refused(ids):
    """By the layout, and by the op where the host is compiled as a whole: there the grid stays a tensor."""
    model, inputs = TINY["flux"].build(), TINY["flux"].inputs(1, len(ids)) | {"img_ids": ids}
    stock = forward(model, inputs)
    lf.apply(model, lf.CLEAR(3))
    with pytest.raises(ValueError, match=r"img_ids.*another number on the first axis"):
        forward(model, inputs)
    lf.apply(model, lf.Softmax())  # needs no grid
    assert torch.equal(forward(model, inputs), stock)
    lf.apply(model, lf.LinFusion())  # neither does this
    assert forward(model, inputs).isfinite().all()
    q = noise(1, len(ids), 1, 8)
    with pytest.raises(ValueError, match="grid"):
        window_attention(q, q, q, grid=ids_grid(ids), radius=2)


def test_a_layer_called_on_its_own_is_refused(tiny, model, inputs):
    """The layout is read where the whole host is called: without it the answer would be silently wrong."""
    given, name = {}, replaced_layer(lf.apply(model, lf.CLEAR(3)))
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args, kwargs: given.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    forward(model, inputs)
    handle.remove()
    for config in (lf.CLEAR(3), lf.LinFusion()):
        attn = lf.apply(model, config).get_submodule(name)
        if isinstance(config, lf.LinFusion) and not attn.linfusion.site.joint:
            continue  # linear attention over picture tokens alone needs no layout
        with pytest.raises(ValueError, match="called on its own"), torch.no_grad():
            attn(*given["args"], **given["kwargs"])


def replaced_layer(model) -> str:
    return next(r.layer for r in lf.describe(model).layers if r.mechanism)


def test_a_processor_without_its_mechanism_says_so(model, inputs):
    lf.apply(model, lf.CLEAR(3))
    name = replaced_layer(model)
    del model.get_submodule(name).linfusion
    with pytest.raises(RuntimeError, match="no mechanism"):
        forward(model, inputs)


def test_qwen_shapes_that_do_not_fit():
    """`img_shapes` is data that nothing else checks: the host itself would fail far from the cause, or not at all."""
    tiny = HOSTS["qwen"]
    model, inputs = tiny.build(), tiny.inputs(6, 9)
    for config in (lf.CLEAR(2), lf.LinFusion(), lf.SLA(topk=0.5, block_q=16, block_k=16)):
        lf.apply(model, config)
        with pytest.raises(ValueError, match="describes 45 image tokens, but there are 54"):
            forward(model, inputs | {"img_shapes": [[(1, 5, 9)]] * 2})
    lf.apply(model, lf.CLEAR(2))
    with pytest.raises(ValueError, match="differ between samples"):
        forward(model, inputs | {"img_shapes": [[(1, 6, 9)], [(1, 9, 6)]]})
