"""What is particular to video hosts: grids of frames, LTX's coordinates and heads, Wan 2.2's two models."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel

import linfusion as lf
from linfusion.families.video import coords_grid
from linfusion.kernels import window_attention

from ..models import HOSTS, TEXT, forward, gap, lively, noise
from ..models.ltx import ltx_coords
from ..models.wan import SETTINGS, wan_pipeline
from .test_linfusion import heads, layers, linear, mlp, phi, rms, train, wide


def grids(model) -> set:
    return {r.grid for r in lf.describe(model).layers if r.mechanism}


def test_layers_that_stay_are_explained():
    for name, tiny in HOSTS.items():
        if tiny.frames is None:
            continue
        reasons = {r.layer: r.reason for r in lf.describe(tiny.build()).layers}
        assert set(reasons.values()) <= {"not chosen", "cross-attention", "text-only attention"}, name
        for layer, reason in reasons.items():
            assert (reason == "cross-attention") == layer.endswith("attn2"), layer
            assert (reason == "text-only attention") == ("refiner" in layer), layer


def test_every_axis_of_wan_has_its_patch():
    model = lively(WanTransformer3DModel(**SETTINGS, patch_size=(3, 1, 2))).eval()
    inputs = {"timestep": torch.tensor([500, 700]), "encoder_hidden_states": noise(2, TEXT, 16, seed=2)}
    inputs["hidden_states"] = noise(2, 4, 6, 5, 8)
    stock = forward(model, inputs)
    lf.apply(model, lf.CLEAR(100))
    assert gap(forward(model, inputs), stock) < 1e-5
    assert grids(model) == {(2, 5, 4)}


# LTX


def test_ltx_arguments_by_position():
    tiny = HOSTS["ltx"]
    model, inputs = lf.apply(tiny.build(), lf.CLEAR(3)), tiny.inputs(6, 9)
    with torch.no_grad():
        assert torch.equal(model(*inputs.values(), return_dict=False)[0], forward(model, inputs))


@pytest.mark.parametrize(
    "grid", [(2, 6, 9), (3, 1, 4), (3, 4, 1), (1, 5, 4), (4, 1, 1), (1, 1, 1), (9, 16, 24)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_coords_tell_the_grid(grid, dtype):
    coords = ltx_coords(*grid, start=40)
    assert coords_grid(coords.to(dtype)).tolist() == list(grid)
    assert coords_grid(coords + torch.tensor([1.5, 64.0, 32.0])[:, None]).tolist() == list(grid)


def other_rows() -> torch.Tensor:
    """The last frame starts a row lower; every coordinate falls back where it should."""
    coords = ltx_coords(2, 3, 4)
    coords[:, 1, -12:] += 32
    return coords


def shuffled() -> torch.Tensor:
    coords = ltx_coords(2, 3, 4)
    return coords[..., torch.randperm(24, generator=torch.Generator().manual_seed(0))]


def second_sample() -> torch.Tensor:
    coords = ltx_coords(2, 3, 4)
    coords[1] = ltx_coords(2, 4, 3)[1]
    return coords


NO_GRID = {
    "frame-first": lambda: torch.cat((ltx_coords(1, 3, 4, start=40), ltx_coords(2, 3, 4)), dim=2),
    "frames-first": lambda: torch.cat((ltx_coords(2, 3, 4, start=40), ltx_coords(2, 3, 4)), dim=2),
    "frame-behind": lambda: torch.cat((ltx_coords(2, 3, 4, start=40), ltx_coords(1, 3, 4)), dim=2),
    "smaller": lambda: torch.cat((ltx_coords(2, 3, 4), ltx_coords(1, 2, 2, start=40)), dim=2),
    "same-width": lambda: torch.cat((ltx_coords(2, 3, 4), ltx_coords(1, 2, 4, start=40)), dim=2),
    "other-shape": lambda: torch.cat((ltx_coords(2, 3, 4), ltx_coords(1, 4, 3, start=40)), dim=2),
    "other-rows": other_rows,
    "shuffled": shuffled,
    "second-sample": second_sample,
}


@pytest.mark.parametrize("name", NO_GRID)
def test_frames_out_of_order_are_refused(name):
    """Condition frames stand in front of the video, whatever their time: one window over both would be wrong."""
    coords, tiny = NO_GRID[name](), HOSTS["ltx-coords"]
    inputs = tiny.inputs(1, 1) | {"hidden_states": noise(2, coords.shape[2], 4), "video_coords": coords}
    model = tiny.build()
    stock = forward(model, inputs)
    lf.apply(model, lf.CLEAR(3))
    with pytest.raises(ValueError, match=r"video_coords.*LTXConditionPipeline"):
        forward(model, inputs)
    lf.apply(model, lf.Softmax())  # needs no grid
    assert torch.equal(forward(model, inputs), stock)
    q = noise(1, coords.shape[2], 1, 8)
    with pytest.raises(ValueError, match="grid"):  # where the host is compiled the op is what refuses
        window_attention(q, q, q, grid=coords_grid(coords), radius=2)


@pytest.mark.parametrize("numbers", [{"height": 5}, {"num_frames": None}], ids=str)
def test_numbers_that_do_not_fit_are_refused(numbers):
    tiny = HOSTS["ltx"]
    model = lf.apply(tiny.build(), lf.CLEAR(3))
    with pytest.raises(ValueError, match="num_frames, height and width"):
        forward(model, tiny.inputs(6, 9) | numbers)


def turn(x, tables, hosts_heads):
    """Channels 2i and 2i + 1 of `[B, H, S, D]` by one angle, in tables for all heads or one after the other."""
    cos, sin = (t.double() for t in tables)
    cos, sin = (heads(t, hosts_heads) if t.ndim == 3 else t.transpose(1, 2) for t in (cos, sin))
    cos, sin = cos[..., 0::2], sin[..., 0::2]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_linear_attention_turns_the_numerator_only(name):
    """Features of q and k, normalised over all heads together, are positive before they are turned."""
    tiny = HOSTS[name]
    model = lf.apply(tiny.build().double(), lf.LinFusion())
    train(model)
    seen = layers(model, wide(tiny.inputs(6, 9)))
    assert len(seen) == tiny.layers
    for attn, given, out in seen:
        x, m = given["hidden_states"], attn.linfusion
        tables = given.get("image_rotary_emb", given.get("rotary_emb"))

        q = linear(x + mlp(x, m.q_mlp), attn.to_q)
        k = linear(x + mlp(x, m.k_mlp), attn.to_k)
        q, k = (phi(heads(rms(y, norm), attn.heads)) for y, norm in ((q, attn.norm_q), (k, attn.norm_k)))
        v, tokens = heads(linear(x, attn.to_v), attn.heads), x.shape[1]
        weights = turn(q, tables, attn.heads) @ turn(k, tables, attn.heads).transpose(-1, -2) / tokens
        plain = q @ k.transpose(-1, -2) / tokens
        want, unturned = (
            linear((w @ v / (plain.sum(-1, keepdim=True) + 1e-4)).transpose(1, 2).flatten(2), attn.to_out[0])
            for w in (weights, plain)
        )
        assert gap(out, want) < 1e-9
        assert gap(out, unturned) > 1e-2


# Wan 2.2


def test_both_models_of_wan22():
    """The first denoises the noisy steps, the second the others; both are replaced, described and restored."""
    tiny = HOSTS["wan"]
    second = lively(copy.deepcopy(tiny.build()))
    with torch.no_grad():
        for p in second.parameters():
            p.mul_(0.9)
    pipe = wan_pipeline(tiny.build(), second.eval())
    pipe.set_progress_bar_config(disable=True)
    stock = tiny.draw(pipe, 1.0)
    lf.apply(pipe, lf.Softmax())
    assert torch.equal(tiny.draw(pipe, 1.0), stock)
    lf.apply(pipe, lf.CLEAR(2))
    report = lf.describe(pipe)
    names = [r.layer for r in report.layers if r.mechanism]
    assert names == [f"{c}.blocks.{i}.attn1" for c in ("transformer", "transformer_2") for i in range(2)]
    both = tiny.draw(pipe, 1.0)
    assert gap(both, stock) > 1e-2
    assert all(r.grid == (2, 3, 5) for r in lf.describe(pipe).layers if r.mechanism)  # both had their steps
    for model in (pipe.transformer, pipe.transformer_2):
        with lf.applied(model, lf.Softmax()):
            assert gap(tiny.draw(pipe, 1.0), both) > 1e-2
        lf.apply(model, lf.CLEAR(2))
    lf.restore(pipe)
    assert torch.equal(tiny.draw(pipe, 1.0), stock)
    assert not any(hasattr(m, "linfusion") for t in (pipe.transformer, pipe.transformer_2) for m in t.modules())


@pytest.mark.parametrize("name", ["wan", "ltx-coords", "cogvideox-1.5", "hunyuan-video-i2v"])
def test_whole_video_hosts_compile(name):
    tiny = HOSTS[name]
    model, inputs = tiny.build(), tiny.inputs(3, 4)
    lf.apply(model, {tiny.some: lf.CLEAR(2, pool=2), "*": lf.LinFusion(mid_dim=4)})
    train(model)
    want = forward(model, inputs)
    torch._dynamo.reset()
    try:
        assert gap(forward(torch.compile(model, fullgraph=True, backend="eager"), inputs), want) < 1e-5
    finally:
        torch._dynamo.reset()
