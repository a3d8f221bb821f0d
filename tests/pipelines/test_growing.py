"""Growing grids: the spectrum and the noise level across a switch, and whole pictures; the published scales."""

import math

import diffusers
import pytest
import torch

import linfusion as lf
from linfusion.pipelines.growing import grow, matched_level, to_finer
from linfusion.pipelines.latents import coarse, dct_matrix, dct_resize, resize
from linfusion.pipelines.scale import log_ratio, ntk_base, proportional, rotary, temperature

from ..models import HOSTS, TEXT, forward, gap
from .test_cascade import PIPES


@pytest.mark.parametrize("n", [1, 2, 7])
def test_dct(n):
    """Orthonormal, and the DCT-II by its definition."""
    m = dct_matrix(n)
    assert torch.allclose(m @ m.T, torch.eye(n, dtype=torch.float64))
    x = torch.randn(n, dtype=torch.float64)
    second = sum(x[i] * math.cos(math.pi / n * (i + 0.5) * (n - 1)) for i in range(n)) * math.sqrt((2 - (n == 1)) / n)
    assert (m @ x)[-1] == pytest.approx(second)


def test_dct_resize_keeps_the_picture():
    """Constants and slow waves keep their amplitude; what is added above the old grid's frequencies stays above."""
    rows = torch.cos(math.pi * (torch.arange(6, dtype=torch.float64) + 0.5) * 2 / 6)
    fine = torch.cos(math.pi * (torch.arange(18, dtype=torch.float64) + 0.5) * 2 / 18)
    x = 3 + rows[None, None, :, None].expand(1, 1, 6, 4)
    out = dct_resize(x, (18, 8))
    assert torch.allclose(out, 3 + fine[None, None, :, None].expand(1, 1, 18, 8))
    noise = torch.randn(1, 1, 18, 8, dtype=torch.float64)
    mixed = dct_resize(x, (18, 8), noise)
    spectrum = dct_matrix(18) @ (mixed - out) @ dct_matrix(8).T
    assert spectrum[..., :6, :4].abs().max() < 1e-12 and spectrum[..., 6:, 4:].abs().min() > 0
    with pytest.raises(ValueError, match="must not be smaller"):
        dct_resize(x, (5, 8))


def test_noise_is_matched():
    """Latents of a flow at 0.4, on twice the grid: white noise of the matched level around the upscaled picture."""
    level, after = 0.4, matched_level(0.4, 2.0)
    assert after == pytest.approx(0.8 / 1.4)
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(64, 1, 4, 4, generator=generator, dtype=torch.float64)
    small, large = (torch.randn(64, 1, n, n, generator=generator, dtype=torch.float64) for n in (4, 8))
    out = to_finer((1 - level) * clean + level * small, level, large)
    noise = out - (1 - after) * dct_resize(clean, (8, 8))
    spectrum = dct_matrix(8) @ noise @ dct_matrix(8).T
    for part in (spectrum[..., :4, :4], spectrum[..., 4:, :]):
        assert part.std().item() == pytest.approx(after, rel=0.05)


def test_growing_pictures():
    pipe, arguments = HOSTS["flux"].build_pipeline(), PIPES["flux"][0]
    pipe.set_progress_bar_config(disable=True)
    steps: list = []
    done = grow(pipe, None, (16, 32), [0.5], steps=4, arguments=arguments, on_step=lambda *s: steps.append(s))
    assert done.image.size == (32, 32) and done.latents.isfinite().all()
    assert steps == [(1, 1, 2), (1, 2, 2), (2, 1, 2), (2, 2, 2)]
    assert [s.level for s in done.stages] == [1.0, pytest.approx(2 / 3)]
    whole = grow(pipe, None, (32,), [], steps=4, arguments=arguments)
    own = pipe(
        None, height=32, width=32, num_inference_steps=4, generator=torch.Generator().manual_seed(0),
        output_type="latent", **arguments,
    )[0]  # fmt: skip
    assert torch.equal(whole.latents.flatten().sort()[0], own.flatten().sort()[0])
    for switches in ([], [1.0], [0.3, 0.5]):
        with pytest.raises(ValueError, match="switches must fall"):
            grow(pipe, None, (16, 32), switches)
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match="flow-matching"):
        grow(pipe, None, (16, 32), [0.5])


def test_resizing():
    x = torch.randn(1, 2, 4, 6)
    assert torch.equal(resize(x, (2, 3)), torch.nn.functional.avg_pool2d(x, 2))
    assert torch.allclose(resize(torch.full((1, 1, 3, 3), 2.0), (6, 9)), torch.full((1, 1, 6, 9), 2.0))
    assert coarse(x, (2, 3)).shape == x.shape and gap(coarse(x, (4, 6)), x) == 0


def test_published_scales():
    """CLEAR: sqrt(log_4608 N) of 1 / sqrt(d), 1.111 squared at 33,280 tokens, and the rotary base times ten."""
    assert log_ratio(4608, 4608) == 1 and log_ratio(33280, 4608) == pytest.approx(math.sqrt(math.log(33280, 4608)))
    assert log_ratio(33280, 4608) ** 2 == pytest.approx(1.2344, abs=1e-3)
    base, ratio, dim = 10000.0, 4.0, 56
    slow = [b ** (-(dim - 2) / dim) for b in (base, ntk_base(base, ratio, dim))]
    assert slow[0] / slow[1] == pytest.approx(ratio)  # the slowest frequency by the ratio, the fastest not at all
    for wrong in (3, 2):
        with pytest.raises(ValueError, match="axis_dim"):
            ntk_base(base, ratio, wrong)
    with pytest.raises(ValueError, match="at least 2"):
        log_ratio(1, 4608)


def test_tokens_count_with_their_text():
    flux, unet = (HOSTS[name].build_pipeline() for name in ("flux", "unet-sd15"))
    assert proportional(unet, (64, 64), (16, 16)) == pytest.approx(log_ratio(1024, 64))
    assert proportional(flux, (64, 32), (16, 16)) == pytest.approx(log_ratio(128, 16))


@pytest.mark.parametrize("name", ["flux", "unet-sd15", "sd3.5"])
@pytest.mark.parametrize("mechanism", [None, lf.Softmax()])
def test_temperature(name, mechanism, monkeypatch):
    """Every self-attention's scores, and only those, are multiplied; afterwards all is as before."""
    tiny = HOSTS[name]
    model, inputs = tiny.build(), tiny.inputs(4, 6)
    if mechanism is not None:
        lf.apply(model, mechanism)
    stock, seen = torch.nn.functional.scaled_dot_product_attention, []

    def spy(query, key, value, *args, **kwargs):
        seen.append((query.clone(), key.clone()))
        return stock(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    before = forward(model, inputs)
    plain, tokens = seen[0], 4 * 6
    seen.clear()
    with temperature(model, 1.5):
        forward(model, inputs)
    assert torch.allclose(seen[0][0], 1.5 * plain[0], rtol=1e-5, atol=1e-5) and torch.equal(seen[0][1], plain[1])
    assert seen[0][0].shape[2] in (tokens, tokens + TEXT)
    assert torch.equal(forward(model, inputs), before)


def test_rotary():
    model, inputs = HOSTS["flux"].build(), HOSTS["flux"].inputs(4, 6)
    before = forward(model, inputs)
    with rotary(model, base=10.0):
        assert model.pos_embed.theta == 100000
        forward(model, inputs)
    with rotary(model, positions=0.5):
        half = forward(model, inputs)
    ids = {name: inputs[name] * 0.5 for name in ("img_ids", "txt_ids")}
    assert torch.equal(half, forward(model, inputs | ids)) and not torch.equal(half, before)
    assert torch.equal(forward(model, inputs), before) and not model.pos_embed._forward_pre_hooks
    with pytest.raises(NotImplementedError, match="PixArt.*leave ntk"), rotary(HOSTS["pixart"].build(), 2.0):
        pass
