"""Adapters on disk: what goes round, and one clear error for each thing that can be wrong with a folder."""

import json
import time

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import linfusion as lf

from .models import TINY, forward, gap, processors

TRAINED = [
    lf.LinFusion(),
    lf.LinFusion(mid_dim=4, eps=1e-3, text="linear"),
    lf.CLEAR(2, pool=2),
    lf.CLEAR((2, 4)),
    lf.LiT(kernel_size=3, heads=1),
    lf.Agent((3, 2)),
    lf.Softmax(),
]
HOST = ["*.to_q.*", "*.to_out.0.*"]


@pytest.fixture(params=TRAINED, ids=repr)
def config(request):
    return request.param


def train(model, seed=5) -> None:
    """Made-up training of the mechanism and of some of the host's projections."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".linfusion." in name or "to_q" in name or "to_out.0" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


def snapshot(model, inputs):
    """Output, names, values and processor objects: what an error must not change."""
    return forward(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}, processors(model)


def same(a, b) -> bool:
    return (
        torch.equal(a[0], b[0])
        and list(a[1]) == list(b[1])
        and all(torch.equal(a[1][k], b[1][k]) for k in a[1])
        and all(a[2][k] is b[2][k] for k in a[2] | b[2])
    )


def test_there_and_back(tmp_path, tiny, model, inputs, config):
    """The trained model's output from the folder alone; then the host's originals, bit for bit."""
    before = snapshot(fresh := tiny.build(), inputs)
    train(lf.apply(model, config))
    trained = forward(model, inputs)
    lf.save(model, tmp_path / "a", host=HOST)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]
    assert lf.load(fresh, tmp_path / "a") is fresh
    assert torch.equal(forward(fresh, inputs), trained)
    assert lf.describe(fresh).to_dict()["layers"] == lf.describe(model).to_dict()["layers"]
    lf.restore(fresh)
    assert same(snapshot(fresh, inputs), before)
    with lf.applied(fresh, config, weights=str(tmp_path / "a")):  # the other door, and the folder as a string
        assert torch.equal(forward(fresh, inputs), trained)
    assert same(snapshot(fresh, inputs), before)


def test_without_host_weights_the_hosts_stay_its_own(tmp_path, tiny, model, inputs):
    train(lf.apply(model, lf.LinFusion()))
    lf.save(model, tmp_path / "a")
    assert all(key.startswith("mechanism.") for key in load_file(tmp_path / "a" / "model.safetensors"))
    fresh = lf.load(tiny.build(), tmp_path / "a")
    plain = dict(tiny.build().state_dict())
    assert all(torch.equal(v, plain[k]) for k, v in fresh.state_dict().items() if ".linfusion." not in k)


def test_what_the_folder_says(tmp_path, tiny, model):
    lf.save(lf.apply(model, lf.CLEAR((2, 4), pool=2), layers=tiny.some), tmp_path / "a", host=["*to_q.weight"])
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["model"] == tiny.family and config["linfusion_version"] == lf.__version__
    names = [r.layer for r in lf.describe(model).layers if r.mechanism]
    assert config["layers"] == dict.fromkeys(names, {"name": "clear", "radius": [2, 4], "pool": 2})
    keys = set(load_file(tmp_path / "a" / "model.safetensors"))
    parameters = {n for n, _ in model.named_parameters()}
    assert {k.removeprefix("host.") for k in keys if k.startswith("host.")} == {
        n for n in parameters if n.endswith("to_q.weight")
    }
    assert {k for k in keys if k.startswith("mechanism.")} == {f"mechanism.{n}.pool_weight" for n in names}


def test_saving_again_keeps_the_host_weights(tmp_path, tiny, model, inputs):
    """Those that came with a loaded adapter go back out with it, unless others are named."""
    train(lf.apply(model, lf.LinFusion(mid_dim=4)))
    lf.save(model, tmp_path / "a", host=HOST)
    twice = lf.load(tiny.build(), tmp_path / "a")
    lf.save(twice, tmp_path / "b")
    lf.save(twice, tmp_path / "b")  # over itself
    assert load_file(tmp_path / "a/model.safetensors").keys() == load_file(tmp_path / "b/model.safetensors").keys()
    assert torch.equal(forward(lf.load(tiny.build(), tmp_path / "b"), inputs), forward(model, inputs))


def test_adapters_one_after_the_other(tmp_path, tiny, inputs):
    """The second finds the host as it was, not as the first one left it."""
    for seed, folder in ((1, "a"), (2, "b")):
        train(model := lf.apply(tiny.build(), lf.LinFusion(mid_dim=4)), seed)
        lf.save(model, tmp_path / folder, host=HOST)
    want = forward(model, inputs)
    model = tiny.build()
    before = snapshot(model, inputs)
    lf.load(lf.load(model, tmp_path / "a"), tmp_path / "b")
    assert torch.equal(forward(model, inputs), want)
    lf.apply(model, lf.Softmax())
    assert torch.equal(forward(model, inputs), before[0])
    lf.restore(model)
    assert same(snapshot(model, inputs), before)


def test_pipelines(tmp_path, tiny):
    pipe = tiny.build_pipeline()
    stock = tiny.draw(pipe, 5.0)
    train(getattr(lf.apply(pipe, lf.LinFusion()), "unet", None) or pipe.transformer)
    trained = tiny.draw(pipe, 5.0)
    lf.save(pipe, tmp_path / "a", host=HOST)
    fresh = tiny.build_pipeline()
    assert lf.load(fresh, tmp_path / "a") is fresh
    assert torch.equal(tiny.draw(fresh, 5.0), trained)
    assert torch.equal(tiny.draw(lf.restore(fresh), 5.0), stock)


def test_other_dtypes(tmp_path, tiny, model, inputs):
    """Saved in fp32, loaded into a bf16 host; its originals come back as they were."""
    train(lf.apply(model, lf.LinFusion(mid_dim=4)))
    lf.save(model, tmp_path / "a", host=HOST)
    fresh = tiny.build().bfloat16()
    values = {k: v.clone() for k, v in fresh.state_dict().items()}
    lf.load(fresh, tmp_path / "a")
    assert {v.dtype for v in fresh.state_dict().values()} == {torch.bfloat16}
    lf.restore(fresh)
    assert all(torch.equal(v, values[k]) for k, v in fresh.state_dict().items())


@pytest.mark.parametrize("lora", ["when-saved", "when-loaded", "both", "loaded-then-lora"])
def test_names_do_not_depend_on_lora(tmp_path, tiny, inputs, lora):
    """PEFT renames `to_q.weight` to `to_q.base_layer.weight`; adapters know only the first."""
    from peft import LoraConfig, inject_adapter_in_model

    def wrap(model):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_out.0"]), model)  # starts at zero effect
        return model

    model = tiny.build()
    if lora in ("when-saved", "both"):
        wrap(model)
    lf.apply(model, lf.LinFusion(mid_dim=4))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" not in name and (".linfusion." in name or "to_q" in name):
                p.add_(0.1 * torch.randn_like(p))
    trained = forward(model, inputs)
    lf.save(model, tmp_path / "a", host=["*to_q.*"])
    assert not [k for k in load_file(tmp_path / "a/model.safetensors") if "lora" in k or "base_layer" in k]
    fresh = tiny.build()
    if lora in ("when-loaded", "both"):
        wrap(fresh)
    stock = forward(fresh, inputs)
    lf.load(fresh, tmp_path / "a")
    if lora == "loaded-then-lora":
        wrap(fresh)
    assert gap(forward(fresh, inputs), trained) < 1e-5
    lf.save(fresh, tmp_path / "b")
    assert load_file(tmp_path / "a/model.safetensors").keys() == load_file(tmp_path / "b/model.safetensors").keys()
    assert torch.equal(forward(lf.restore(fresh), inputs), stock)


def test_a_subclass_saves_for_its_family(tmp_path, inputs, tiny):
    model = tiny.build()
    model.__class__ = type("Mine", (type(model),), {})
    lf.save(lf.apply(model, lf.CLEAR(2)), tmp_path / "a")
    assert torch.equal(forward(lf.load(tiny.build(), tmp_path / "a"), inputs), forward(model, inputs))


# what cannot be saved


def test_nothing_to_save(tmp_path, model):
    with pytest.raises(ValueError, match="exactly one changed model, got 0"):
        lf.save(model, tmp_path / "a")
    lf.apply(model, lf.CLEAR(2))
    with pytest.raises(ValueError, match=r"host='nowhere\.\*' matches no parameter"):
        lf.save(model, tmp_path / "a", host=["*to_q*", "nowhere.*"])
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="missing/a: it must be a folder"):
        lf.save(model, tmp_path / "missing" / "a")
    assert not list(tmp_path.iterdir())


# what cannot be loaded


@pytest.fixture
def saved(tmp_path, tiny):
    train(model := lf.apply(tiny.build(), lf.LinFusion(mid_dim=4)))
    lf.save(model, tmp_path / "a", host=["*to_q.weight"])
    return tmp_path / "a"


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate(folder, keep):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: keep(len(data))])


def first(tensors, prefix):
    return next(k for k in sorted(tensors) if k.startswith(prefix))


DAMAGE = {
    "no-config": (lambda f: (f / "config.json").unlink(), r"not an adapter folder.*config\.json"),
    "no-weights": (lambda f: (f / "model.safetensors").unlink(), r"not an adapter folder.*model\.safetensors"),
    "config-is-no-json": (lambda f: (f / "config.json").write_text("{"), r"config\.json is not an adapter's config"),
    "config-is-binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), r"config\.json is not an adapter's"),
    "config-is-a-list": (lambda f: (f / "config.json").write_text("[1]"), r"config\.json is not an adapter's config"),
    "config-is-another": (
        lambda f: (f / "config.json").write_text('{"_class_name": "UNet"}'),
        r"config\.json is not an adapter's config",
    ),
    "layers-are-a-list": (lambda f: edit_config(f, layers=["a"]), r"config\.json is not an adapter's config"),
    "layers-are-names": (lambda f: edit_config(f, layers={"a": "clear"}), r"config\.json is not an adapter's config"),
    "layers-are-numbers": (lambda f: edit_config(f, layers={"a": 1}), r"config\.json is not an adapter's config"),
    "layers-are-none": (lambda f: edit_config(f, layers={}), r"config\.json is not an adapter's config|No layer"),
    "unknown-mechanism": (
        lambda f: edit_config(f, layers={"a": {"name": "magic"}}),
        "Unknown mechanism 'magic'.*softmax, linfusion, clear",
    ),
    "unknown-setting": (
        lambda f: edit_config(f, layers={"a": {"name": "clear", "radius": 2, "size": 1}}),
        "clear has no setting size",
    ),
    "bad-setting": (
        lambda f: edit_config(f, layers={"a": {"name": "clear", "radius": -1}}),
        "radius must be positive",
    ),
    "missing-setting": (lambda f: edit_config(f, layers={"a": {"name": "clear"}}), "radius"),
    "unknown-layer": (
        lambda f: edit_config(f, layers={"blocks.99.attn": {"name": "softmax"}}),
        r"blocks\.99\.attn",
    ),
    "other-model": (lambda f: edit_config(f, model="SomeOtherModel"), "saved for a SomeOtherModel, not for a "),
    "empty-file": (lambda f: truncate(f, lambda n: 0), r"model\.safetensors is damaged or incomplete"),
    "cut-header": (lambda f: truncate(f, lambda n: 20), r"model\.safetensors is damaged or incomplete"),
    "cut-body": (lambda f: truncate(f, lambda n: n - 1), r"model\.safetensors is damaged or incomplete"),
    "half-a-body": (lambda f: truncate(f, lambda n: n // 2), r"model\.safetensors is damaged or incomplete"),
    "a-pickle": (
        lambda f: torch.save({"a": torch.ones(1)}, f / "model.safetensors"),
        r"model\.safetensors is damaged or incomplete",
    ),
    "missing-tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop(first(t, "mechanism."))),
        r"1 tensors missing \(first: mechanism\..*q_mlp|1 tensors missing \(first: mechanism\..*k_mlp",
    ),
    "extra-tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"mechanism.x.y": torch.ones(1)})),
        r"1 left over \(first: mechanism\.x\.y\)",
    ),
    "foreign-tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"y": torch.ones(1)})),
        r"1 left over \(first: y\)",
    ),
    "wrong-shape": (
        lambda f: edit_tensors(f, lambda t: t.update({first(t, "mechanism."): torch.ones(3, 5)})),
        r"mechanism\.\S+ is \(3, 5\), the model has \(",
    ),
    "wrong-host-shape": (
        lambda f: edit_tensors(f, lambda t: t.update({first(t, "host."): torch.ones(3, 5)})),
        r"host\.\S+ is \(3, 5\), the model has \(",
    ),
    "unknown-host-parameter": (
        lambda f: edit_tensors(f, lambda t: t.update({"host.no.such.weight": torch.ones(3)})),
        r"has no parameter 'no\.such\.weight'",
    ),
}


SETTINGS = ("layers-", "unknown-mechanism", "unknown-setting", "unknown-layer", "bad-setting", "missing-setting")
DOORS = [("load", d) for d in DAMAGE] + [("apply", d) for d in DAMAGE if not d.startswith(SETTINGS)]  # it has its own


@pytest.mark.parametrize("tiny", [TINY["pixart"], TINY["flux"]], ids=["pixart", "flux"])
@pytest.mark.parametrize(("door", "damage"), DOORS, ids=[f"{a}-{b}" for a, b in DOORS])
def test_damaged_folders(tiny, model, inputs, saved, damage, door):
    """One clear line naming what is wrong; host and whatever was applied before are as they were."""
    change, match = DAMAGE[damage]
    change(saved)
    for earlier in (None, lf.CLEAR(2)):
        if earlier is not None:
            lf.apply(model, earlier)
        before = snapshot(model, inputs)
        with pytest.raises(ValueError, match=match) as caught:
            lf.load(model, saved) if door == "load" else lf.apply(model, lf.LinFusion(mid_dim=4), weights=saved)
        assert "\n" not in str(caught.value)
        assert same(snapshot(model, inputs), before)


def test_settings_that_do_not_fit_the_weights(model, inputs, saved):
    before = snapshot(model, inputs)
    with pytest.raises(ValueError, match=r"mechanism\.\S+ is \(4.*, the model has \("):
        lf.apply(model, lf.LinFusion(), weights=saved)
    with pytest.raises(ValueError, match=r"0 tensors missing, \d+ left over \(first: mechanism"):
        lf.apply(model, lf.CLEAR(2), weights=saved)
    with pytest.raises(ValueError, match=r"\d+ left over"):
        lf.apply(model, lf.LinFusion(mid_dim=4), layers=next(iter(layer_names(model))), weights=saved)
    assert same(snapshot(model, inputs), before)


def layer_names(model):
    return [r.layer for r in lf.describe(model).layers if r.reason == "not chosen"]


def test_an_adapter_for_another_host(tmp_path):
    lf.save(lf.apply(TINY["flux"].build(), lf.CLEAR(2)), tmp_path / "flux")
    lf.save(lf.apply(TINY["unet-sdxl"].build(), lf.CLEAR(2)), tmp_path / "sdxl")
    for name, folder, match in (
        ("pixart", "flux", "saved for a FluxTransformer2DModel, not for a PixArtTransformer2DModel"),
        ("unet-sd15", "sdxl", r"with a layer '.*transformer_blocks\.1\.attn1', which this one lacks"),  # the class fits
    ):
        tiny = TINY[name]
        alone, pipe = tiny.build(), tiny.build_pipeline()
        inside = getattr(pipe, "unet", None) or pipe.transformer
        for host, model in ((alone, alone), (pipe, inside)):
            before = snapshot(model, tiny.inputs(6, 9))
            with pytest.raises(ValueError, match=match):
                lf.load(host, tmp_path / folder)
            assert same(snapshot(model, tiny.inputs(6, 9)), before)


@pytest.mark.parametrize("source", ["somebody/some-adapter", "no-such-folder", "/no/such/folder", "a b", ""])
def test_what_is_no_folder_and_not_on_the_hub(model, inputs, source):
    """The tests run with the Hub switched off; a machine without a network sees the same."""
    before, start = snapshot(model, inputs), time.monotonic()
    for change in (lambda: lf.load(model, source), lambda: lf.apply(model, lf.CLEAR(2), weights=source)):
        with pytest.raises(ValueError, match=r"the Hub does not give it|not an adapter folder") as caught:
            change()
        assert "\n" not in str(caught.value) and str(source) in str(caught.value)
    assert time.monotonic() - start < 5
    assert same(snapshot(model, inputs), before)


def test_a_file_is_no_folder(tmp_path, model):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="not an adapter folder"):
        lf.load(model, tmp_path / "model.safetensors")


def test_a_full_disk(tmp_path, model, monkeypatch):
    """The adapter that stood there before is whole; safetensors tells of the disk by an error of its own."""
    from linfusion import adapter

    lf.save(lf.apply(model, lf.CLEAR(2, pool=2)), tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(adapter, "save_file", full)
    with pytest.raises(OSError, match=r"a could not be written \(No space left.*\); nothing there was changed"):
        lf.save(lf.apply(model, lf.CLEAR(3, pool=2)), tmp_path / "a")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
