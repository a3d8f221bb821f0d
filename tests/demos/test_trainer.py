"""The training code on twelve made-up pictures and a toy model."""

import json
import time

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from linfusion.demos import train_teacher
from linfusion.demos.emoji.data import EmojiData, load_data
from linfusion.demos.emoji.evaluate import retrieved
from linfusion.demos.emoji.flow import draw_times
from linfusion.demos.emoji.loop import Length, Run
from linfusion.demos.emoji.models import TINY, Denoiser, build_ddim, build_unet, pack, unpack
from linfusion.demos.emoji.optim import orthogonalise, split_parameters
from linfusion.demos.emoji.text import EOS_ID, UNKNOWN_ID, build_tokenizer, normalise, tokenize
from linfusion.demos.emoji.unet import LEVELS, NOISE_ALONE, draw_steps, whiten_text

STAGES = ("vae", "flow", "guidance")
SIZES = ["--tiny", "--device", "cpu", "--captions", "4"]
SIZES += ["--batch-vae", "4", "--batch-flow", "8", "--batch-guidance", "8", "--batch-unet", "8"]
STEPS = ["--steps-vae", "6", "--steps-flow", "8", "--steps-guidance", "6", "--steps-unet", "6"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # the toy model's operations are so small that threads only wait for each other
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    captions = {}
    for colour in ("red", "blue", "green"):
        for shape in ("ellipse", "rectangle", "pieslice", "chord"):
            picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
            angles = () if shape in ("ellipse", "rectangle") else (0, 250)
            getattr(ImageDraw.Draw(picture), shape)((8, 8, 56, 56), *angles, fill=colour)
            picture.save(folder / f"{colour}-{shape}.png")
            captions[f"{colour}-{shape}.png"] = f"{colour.title()} {shape}!"
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken")
    assert train_teacher.main(["--data", str(pictures), "--output", str(output), *SIZES, *STEPS]) == 0
    return output


def test_all_stages(trained):
    figures = json.loads((trained / "figures.json").read_text())
    assert figures["pictures"] == 12
    assert figures["captions"] == 4
    assert set(figures["retrieval"]) == {"guidance 3"}
    assert {"emoji-dataset.png", "emoji-unseen.png", "emoji-flux"} <= {f.name for f in trained.iterdir()}
    assert not list(trained.glob("*.part"))


def test_a_run_cut_in_every_stage_ends_with_the_same_weights(pictures, trained, tmp_path, monkeypatch):
    command = ["--data", str(pictures), "--output", str(tmp_path), *SIZES, *STEPS, "--stage"]
    train = Run.train
    for stage in STAGES:
        monkeypatch.setattr(Run, "train", lambda self, loss, **k: train(self, loss, **{**k, "stop_at": 3}))
        assert train_teacher.main([*command, "export"]) == 0
        assert not (tmp_path / "emoji-flux").exists()
        monkeypatch.setattr(Run, "train", train)
        assert train_teacher.main([*command, stage]) == 0
    assert train_teacher.main([*command, "export"]) == 0
    for file in (trained / "emoji-flux").rglob("*.safetensors"):
        ours, theirs = load_file(tmp_path / file.relative_to(trained)), load_file(file)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), file


def test_emoji_unet_is_trained_on_the_parts_of_emoji_flux(pictures, trained, tmp_path, monkeypatch):
    command = ["--data", str(pictures), *SIZES, *STEPS, "--teacher", "emoji-unet", "--shared"]
    command.append(str(trained / "emoji-flux"))
    assert train_teacher.main([*command, "--output", str(tmp_path / "unbroken")]) == 0
    folder = tmp_path / "unbroken" / "emoji-unet"
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        ours, theirs = load_file(folder / part), load_file(trained / "emoji-flux" / part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part
    assert (folder / "tokenizer/tokenizer.json").read_text() == (
        trained / "emoji-flux/tokenizer/tokenizer.json"
    ).read_text()
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is StableDiffusionPipeline
    assert pipe("red chord", num_inference_steps=2, output_type="np").images.shape == (1, 64, 64, 3)
    assert json.loads((folder.parent / "figures.json").read_text())["captions"] == 4

    cut = [*command, "--output", str(tmp_path / "cut")]
    train = Run.train
    monkeypatch.setattr(Run, "train", lambda self, loss, **k: train(self, loss, **{**k, "stop_at": 3}))
    assert train_teacher.main(cut) == 0
    file = "unet/diffusion_pytorch_model.safetensors"
    unfinished = load_file(tmp_path / "cut" / "emoji-unet" / file)  # what there is, and it is the average
    assert not all(torch.equal(unfinished[name], value) for name, value in load_file(folder / file).items())
    monkeypatch.setattr(Run, "train", train)
    assert train_teacher.main([*cut, "--stage", "export"]) == 0
    ours, theirs = load_file(tmp_path / "cut" / "emoji-unet" / file), load_file(folder / file)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_unet_learns(pictures, trained, tmp_path):
    """On twelve pictures the loss falls well below that of answering zero, which is where it starts."""
    losses = []
    update = Run._update

    def watched(self, loss):
        losses.append(update(self, loss))
        return losses[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_update", watched)
        command = ["--data", str(pictures), "--output", str(tmp_path), *SIZES, "--steps-unet", "100"]
        command += ["--batch-unet", "24", "--teacher", "emoji-unet", "--shared", str(trained / "emoji-flux")]
        assert train_teacher.main([*command, "--stage", "unet"]) == 0
    first, last = (torch.stack(part).mean().item() for part in (losses[:3], losses[-20:]))
    assert first == pytest.approx(1, abs=0.1)
    assert last < 0.7 * first


def test_a_stage_of_the_other_teacher(pictures, tmp_path, capsys):
    command = ["--data", str(pictures), "--output", str(tmp_path), *SIZES, "--teacher", "emoji-unet"]
    assert train_teacher.main([*command, "--stage", "vae"]) == 2
    assert "emoji-unet has no stage vae; its stages: unet, export, evaluate" in capsys.readouterr().err


def test_steps_are_even_with_more_at_the_last():
    steps = draw_steps(5000, torch.Generator().manual_seed(0))
    assert (steps.min(), steps.max()) == (0, LEVELS - 1)
    assert ((steps == LEVELS - 1).float().mean() - NOISE_ALONE - 0.001).abs() < 2e-3
    assert (steps[steps < LEVELS - 1].float().mean() - 499).abs() < 1


def test_the_last_step_of_the_schedule_is_noise_alone():
    scheduler = build_ddim()
    assert scheduler.alphas_cumprod[-1] == 0
    scheduler.set_timesteps(28)
    assert scheduler.timesteps[0] == LEVELS - 1
    noise, picture = torch.randn(2, 1, 8, 4, 4)
    # there v is minus the picture, so that one step from noise alone lands on it when nothing follows
    scheduler.set_timesteps(1)
    assert torch.allclose(scheduler.step(-picture, scheduler.timesteps[0], noise).prev_sample, picture)


def test_text_begins_white():
    unet = build_unet(TINY)
    tokens = torch.randn(500, 16) @ torch.diag(torch.logspace(-0.5, 0.5, 16)) + 3
    whiten_text(unet, tokens)
    for layer in (unet.encoder_hid_proj, unet.add_embedding.pool.v_proj):
        white = layer(tokens).detach()
        assert white.mean(0).abs().max() < 1e-3
        assert (torch.cov(white.T) - torch.eye(16)).abs().max() < 0.05  # but for the floor, nothing


def test_every_matrix_of_the_unet_goes_to_muon():
    unet = build_unet(TINY)
    names = {id(p): name for name, p in unet.named_parameters()}
    matrices, rest = split_parameters(unet)
    assert {p.ndim for p in matrices} == {2, 4}
    left = {names[id(p)].rpartition(".")[0] for p in rest if p.ndim >= 2}
    assert {name.split(".")[-1] for name in left if "_block" in name} == {"time_emb_proj"}


def test_stop_after(pictures, tmp_path, capsys):
    command = ["--data", str(pictures), "--output", str(tmp_path), *SIZES, "--steps-vae", "100000"]
    assert train_teacher.main([*command, "--stop-after", "0"]) == 0
    assert (tmp_path / "vae.pt").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_missing_data_is_one_line(tmp_path, capsys, exists):
    folder = tmp_path / "data"
    if exists:
        folder.mkdir()
    assert train_teacher.main(["--data", str(folder), "--output", str(tmp_path / "out"), *SIZES]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: no")
    assert str(folder) in error
    assert "\n" not in error


def test_data(pictures):
    data = load_data(pictures, 32)
    assert data.images.shape == (12, 3, 32, 32)
    assert data.captions[0] == "blue chord"
    assert data.pixels(slice(0, 1)).max() == 1
    assert (data.images[:, :, 0, 0] == 255).all(), "transparent is white"


def test_variants_of_a_concept_share_its_weight():
    captions = ["cook", "cook dark skin tone", "cook medium light skin tone", "cook light skin tone", "rocket"]
    weights = EmojiData(captions, torch.zeros(5, 3, 1, 1, dtype=torch.uint8)).sampling_weights()
    assert weights[:4].unique().numel() == 1
    assert weights[4] == pytest.approx(2 * weights[0])
    assert weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("text", ["Piñata", "man’s shoe", "Côte_d’Ivoire", "flag: A & B", "", "  8-bit "])
def test_tokenizer_sees_what_normalise_gives(text):
    tokenizer = build_tokenizer([text, "something else"])
    ids = tokenize(tokenizer, [text, normalise(text)])
    assert torch.equal(ids[0], ids[1])
    assert UNKNOWN_ID not in ids
    assert ids.shape == (2, 16)
    assert ids[0, len(normalise(text).split())] == EOS_ID


def test_velocity_is_the_stock_forward():
    torch.manual_seed(0)
    denoiser = Denoiser(TINY, 20)
    for p in denoiser.transformer.parameters():
        torch.nn.init.normal_(p, std=0.1)
    grid = TINY.grid
    ids = torch.zeros(grid, grid, 3)
    ids[..., 1] += torch.arange(grid)[:, None]
    ids[..., 2] += torch.arange(grid)
    latents, time, guidance = torch.randn(2, grid**2, 32), torch.rand(2), torch.tensor([1.0, 3.0])
    text, pooled = denoiser.encode(torch.randint(20, (2, 16)))
    stock = denoiser.transformer(
        hidden_states=latents,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=time,
        guidance=guidance,
        img_ids=ids.view(-1, 3),
        txt_ids=torch.zeros(16, 3),
        return_dict=False,
    )[0]
    assert torch.equal(denoiser.velocity(latents, time, guidance, text, pooled, denoiser.rotary("cpu")), stock)


def test_pack_is_undone_by_unpack():
    latents = torch.randn(2, 8, 12, 12)
    assert torch.equal(unpack(pack(latents), 6), latents)


def test_orthogonalise():
    for shape in ((3, 16, 16), (2, 8, 24), (2, 24, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert values.min() > 0.4
        assert values.max() < 1.3


def test_times_are_in_range_and_lean_to_noise():
    times = draw_times(4096, torch.Generator().manual_seed(0))
    assert times.min() > 0
    assert times.max() < 1
    assert 0.58 < times.median() < 0.66


def test_learning_rate_shape():
    length = Length(steps=100, warmup=10, decay=0.5)
    shape = [length.factor(step, 100) for step in (0, 9, 49, 75, 99)]
    assert shape == pytest.approx([0.1, 1, 1, 0.5, 0.02])
    assert length.factor(50, None) == 1


def test_equal_pictures_count_under_either_name():
    reference = torch.tensor([[0.0, 0], [1, 1], [1, 1], [5, 5]])
    names = ["a", "b", "c", "d"]
    drawn = torch.tensor([[0.9, 1.0], [0.9, 1.0], [0.9, 1.0]])
    assert retrieved(drawn, ["b", "c", "d"], reference, names) == [True, True, False]


def test_a_length_in_minutes_ends_before_the_deadline(tmp_path):
    """Or the decay of its learning rate would be cut off; ten minutes would be 300,000 steps."""
    module = torch.nn.Linear(2, 2)
    run = Run("x", module, [torch.optim.SGD(module.parameters(), lr=0.1)], tmp_path, Length(None, minutes=10))
    until = time.monotonic() + 1.0

    def loss(generator):
        time.sleep(0.002)
        return module(torch.randn(1, 2, generator=generator)).square().mean()

    run.train(loss, deadline=until)
    assert 100 < run.steps < 500
