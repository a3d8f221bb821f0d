"""Strips: the same pixels and latents as the whole autoencoder's, whatever the strips' height."""

import weakref

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.upsampling import Upsample2D
from PIL import Image

from linfusion.pipelines import strips
from linfusion.pipelines import vae as module
from linfusion.pipelines.files import picture_writer, save_latents
from linfusion.pipelines.upsample import doubled
from linfusion.pipelines.vae import decode, decode_rows, encode, supported, to_bytes

from ..models import gap


@pytest.fixture(scope="module")
def vae():
    """Each kind of layer of the real ones: shortcuts, attention in the middle, projections of the latents."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        latent_channels=4, block_out_channels=(4, 8, 8), layers_per_block=1, norm_num_groups=2, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, scaling_factor=0.5,
    )  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.normal_(float(name.endswith("weight")), 0.3)
            elif "attentions" in name and name.endswith("weight"):
                p.mul_(4)
    return model.eval()


@pytest.fixture
def low(monkeypatch):
    """Strips of two rows."""
    monkeypatch.setattr(strips, "STRIP_BYTES", 1)


def decoded(vae, latents, **settings):
    parts: list = []
    decode_rows(vae, latents, lambda first, rows: parts.append((first, rows)), **settings)
    assert [first for first, _ in parts] == [sum(r.shape[2] for _, r in parts[:i]) for i in range(len(parts))]
    return torch.cat([rows for _, rows in parts], dim=2), len(parts)


@pytest.mark.parametrize(("fuse", "store"), [(2**33, None), (2**33, "cpu"), (0, "cpu")])
def test_decoding_equals_the_whole(vae, low, monkeypatch, fuse, store):
    """With room for two activations, for one, and for one without the upsampled. A bright corner: a strip's own norms
    would differ from the picture's. Not square.
    """
    monkeypatch.setattr(module, "FUSE_BYTES", fuse)
    latents = torch.randn(2, 4, 9, 6)
    latents[:, :, :3, :3] += 5
    with torch.no_grad():
        whole = vae.decode(latents, return_dict=False)[0]
    out, count = decoded(vae, latents, store=store)
    assert count == 18 and gap(out, whole) < 1e-5
    assert all("forward" not in vars(m) for m in vae.modules())


def test_norms_see_the_whole_picture(vae, low, monkeypatch):
    """The same strips with moments of the last strip alone do not pass for the whole picture."""
    latents = torch.randn(1, 4, 9, 6)
    latents[:, :, :3] += 5
    with torch.no_grad():
        whole = vae.decode(latents, return_dict=False)[0]
    add = strips.Moments.add

    def forget(self, x):
        self.count, self.mean, self.spread = 0, 0.0, 0.0
        add(self, x)

    monkeypatch.setattr(strips.Moments, "add", forget)
    assert gap(decoded(vae, latents)[0], whole) > 1e-2


def test_one_activation_is_kept(vae, low, monkeypatch):
    """Never the input and the output of a layer at once, but for a few rows."""
    live, most = weakref.WeakSet(), []
    start = strips.Rows.__init__

    def born(self, *parts):
        live.add(self)
        start(self, *parts)

    monkeypatch.setattr(strips.Rows, "__init__", born)
    run = strips.Rows.append

    def append(self, part):
        run(self, part)
        most.append(sum(p.numel() for rows in live for p in rows.parts if p is not None))

    monkeypatch.setattr(strips.Rows, "append", append)
    latents = torch.randn(1, 4, 40, 8)
    decoded(vae, latents, store="cpu")
    largest = 8 * 160 * 32  # the upsampler's, with the last but one block's channels
    assert largest <= max(most) < 1.2 * largest
    assert module.room_needed(vae, latents) == 4 * largest + module.WORK_BYTES


def test_half_precision(vae, low):
    """No further from float64 than the whole decode in the same dtype, with one rounding's room."""
    latents = torch.randn(1, 4, 7, 6)
    half = AutoencoderKL.from_config(vae.config).eval()
    half.load_state_dict(vae.state_dict())
    with torch.no_grad():
        exact = half.double().decode(latents.double(), return_dict=False)[0]
        half.to(torch.bfloat16)
        whole = half.decode(latents.bfloat16(), return_dict=False)[0]
    out, _ = decoded(half, latents)
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).abs().max() <= 2 * (whole.double() - exact).abs().max()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_doubling(layout):
    torch.manual_seed(0)
    layer = Upsample2D(3, use_conv=True, out_channels=5)
    x = torch.randn(2, 3, 4, 7).contiguous(memory_format=layout)
    fast = doubled(layer)
    with torch.no_grad():
        assert fast is not layer and gap(fast(x), layer(x)) < 1e-6
    layer.register_forward_hook(lambda *a: None)
    assert doubled(layer) is layer
    other = Upsample2D(3, use_conv=True, kernel_size=5, padding=2)
    assert doubled(other) is other


def test_encoding_equals_the_whole(vae, low):
    pixels = np.random.default_rng(0).integers(0, 255, (36, 24, 3), dtype=np.uint8)
    pixels[:8] = 255
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        whole = vae.encode(x).latent_dist.mean
    out = encode(vae, Image.fromarray(pixels))
    assert out.shape == (1, 4, 9, 6) and gap(out, whole) < 1e-5


def test_attention_in_windows(vae, low, monkeypatch):
    """Above the limit: seen from a window, places far away do not count; near ones are exactly the window's."""
    monkeypatch.setattr(module, "WHOLE", 16)
    monkeypatch.setattr(module, "WINDOW", 8)
    monkeypatch.setattr(module, "MARGIN", 2)
    latents = torch.randn(1, 4, 13, 9)
    with torch.no_grad():
        whole = vae.decode(latents, return_dict=False)[0]
    out, _ = decoded(vae, latents)
    assert out.shape == whole.shape and 1e-5 < gap(out, whole) < 0.5
    places = torch.zeros(13, 9)
    for top, rows in module._windows(13):
        for left, columns in module._windows(9):
            assert 0 <= top <= rows.start < rows.stop <= top + 8 <= 13 and 0 <= left <= columns.start
            places[rows, columns] += 1
    assert (places == 1).all()


def test_other_blocks_decode_by_themselves(vae):
    other = AutoencoderKL(
        latent_channels=4, block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, sample_size=16,
        up_block_types=("AttnUpDecoderBlock2D",),
    ).eval()  # fmt: skip
    assert supported(vae) and not supported(other) and supported(other, encoder=True)
    latents = torch.randn(1, 4, 4, 4)
    out, count = decoded(other, latents)
    with torch.no_grad():
        assert count == 1 and torch.equal(out, other.decode(latents, return_dict=False)[0])


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".bmp"])
def test_files(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 255, (31, 17, 3), dtype=np.uint8)
    pixels[5:20] = 7
    path = tmp_path / f"a{suffix}"
    with picture_writer(path, 17, 31) as writer:
        for rows in np.split(pixels, [2, 3, 20]):
            writer.write(rows)
    with Image.open(path) as image:
        read = np.asarray(image.convert("RGB"))
    assert read.shape == pixels.shape and (suffix == ".webp" or (read == pixels).all())


def test_png_in_many_pieces(tmp_path, monkeypatch):
    """Blocks of one row, more of them than threads may have waiting."""
    monkeypatch.setattr("linfusion.pipelines.files.CHUNK", 1)
    pixels = np.random.default_rng(0).integers(0, 255, (60, 5, 3), dtype=np.uint8)
    with picture_writer(tmp_path / "a.png", 5, 60) as writer:
        writer.write(pixels)
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        assert (np.asarray(image) == pixels).all()


def test_latents_into_a_file(vae, tmp_path):
    latents = torch.randn(1, 4, 9, 6)
    save_latents(vae, latents, tmp_path / "a.png", (36, 24))
    with Image.open(tmp_path / "a.png") as image:
        assert (np.asarray(image) == np.asarray(decode(vae, latents))).all()
    with pytest.raises(ValueError, match="must end as a picture"):
        save_latents(vae, latents, tmp_path / "a.txt", (36, 24))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_failure_leaves_no_file(vae, tmp_path, monkeypatch):
    monkeypatch.setattr("linfusion.pipelines.files.to_bytes", lambda rows: to_bytes(rows)[:, :2])
    with pytest.raises(ValueError, match="rows must be"):
        save_latents(vae, torch.randn(1, 4, 4, 4), tmp_path / "a.png", (16, 16))
    with pytest.raises(ValueError, match="31 rows, and 1 were"), picture_writer(tmp_path / "b.png", 2, 31) as writer:
        writer.write(np.zeros((1, 2, 3), np.uint8))
    with pytest.raises(ValueError, match=r"4 GiB.*\.png"):
        picture_writer(tmp_path / "c.tif", 40000, 40000)
    assert not (tmp_path / "a.png").exists() and not list(tmp_path.glob(".a*"))
