"""Published weights: official names and formula on one side, the converted adapter on the other."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import linfusion as lf
from linfusion.cli import main
from linfusion.families.video import wan_turn

from .models import HOSTS, forward

SLA = ["--mechanism", "sla", "--topk", "0.3", "--block-q", "32", "--block-k", "16"]
LAYER = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
BLOCK = {f"self_attn.{a}": f"attn1.{b}" for a, b in LAYER.items()}
BLOCK |= {f"cross_attn.{a}": f"attn2.{b}" for a, b in LAYER.items()}
BLOCK |= {"norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
WHOLE = {
    "patch_embedding": "patch_embedding", "head.head": "proj_out",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
}  # fmt: skip
IMAGE = {
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}


def official_names(blocks: int, image: bool) -> dict[str, str]:
    """Names in diffusers by those of the authors' Wan."""
    names = {f"{a}.{end}": f"{b}.{end}" for a, b in (WHOLE | (IMAGE if image else {})).items() for end in WB}
    names["head.modulation"] = "scale_shift_table"
    for n in range(blocks):
        block = BLOCK | (
            {"cross_attn.k_img": "attn2.add_k_proj", "cross_attn.v_img": "attn2.add_v_proj"} if image else {}
        )
        names |= {f"blocks.{n}.{a}.{end}": f"blocks.{n}.{b}.{end}" for a, b in block.items() for end in WB}
        names[f"blocks.{n}.modulation"] = f"blocks.{n}.scale_shift_table"
        for a, b in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            names |= {f"blocks.{n}.{a}.norm_{x}.weight": f"blocks.{n}.{b}.norm_{x}.weight" for x in "qk"}
        if image:
            names[f"blocks.{n}.cross_attn.norm_k_img.weight"] = f"blocks.{n}.attn2.norm_added_k.weight"
    return names


WB = ("weight", "bias")


class Official:
    """The published forward pass (github.com/thu-ml/SLA d973e55) in plain PyTorch, as an attention processor."""

    def __init__(self, weight, bias, topk, block_q, block_k):
        self.projection, self.topk, self.block_q, self.block_k = (weight, bias), topk, block_q, block_k

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k = (
            wan_turn(norm(project(hidden_states)).unflatten(2, (attn.heads, -1)), rotary_emb).transpose(1, 2)
            for norm, project in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k))
        )
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        pooled_q, pooled_k = (
            torch.stack([part.mean(2) for part in x.split(size, 2)], 2)
            for x, size in ((q, self.block_q), (k - k.mean(2, keepdim=True), self.block_k))
        )
        scores = pooled_q @ pooled_k.mT
        chosen = scores.topk(int(self.topk * scores.shape[-1]), dim=-1).indices
        seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)
        seen = seen.repeat_interleave(self.block_q, 2)[:, :, : q.shape[2]]
        seen = seen.repeat_interleave(self.block_k, 3)[..., : k.shape[2]]
        sparse = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        phi_q, phi_k = q.softmax(-1), k.softmax(-1)
        linear = phi_q @ (phi_k.mT @ v) / (1e-5 + (phi_q * phi_k.sum(2, keepdim=True)).sum(-1, keepdim=True))
        out = sparse + F.linear(linear, *self.projection)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@torch.no_grad()
def published(kind: str):
    """A trained model with the official attention, and its weights under official names."""
    model = HOSTS[kind].build()
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))
    state = model.state_dict()
    weights = {a: state[b].clone() for a, b in official_names(2, kind == "wan-i2v").items()}
    assert len(weights) == len(state)
    weights["patch_embedding.weight"] = weights["patch_embedding.weight"].flatten(1)
    for n, block in enumerate(model.blocks):
        projection = torch.randn(24, 24) / 24**0.5, torch.randn(24)
        weights |= {
            f"blocks.{n}.self_attn.attn_op.local_attn.proj_l.{e}": x for e, x in zip(WB, projection, strict=True)
        }
        block.attn1.set_processor(Official(*projection, 0.3, 32, 16))
    return model, weights


@pytest.mark.parametrize(("kind", "suffix"), [("wan", "pth"), ("wan-i2v", "safetensors")])
def test_official_weights_give_the_official_result(kind, suffix, tmp_path, capsys):
    official, weights = published(kind)
    file = tmp_path / f"official.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": {f"net.{name}": x for name, x in weights.items()}}, file)
    else:
        save_file(weights, file)
    assert main(["convert", str(file), str(tmp_path / "adapter"), *SLA]) == 0
    assert "2 layers" in capsys.readouterr().out
    model, inputs = HOSTS[kind].build(), HOSTS[kind].inputs(6, 9)
    before = forward(model, inputs)
    lf.load(model, tmp_path / "adapter", fuse_prologue=False)
    want = forward(official, inputs)
    torch.testing.assert_close(forward(model, inputs), want, rtol=1e-4, atol=1e-5)
    lf.restore(model)
    assert torch.equal(forward(model, inputs), before) and (before - want).abs().max() > 0.1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "convert needs --mechanism"),
        (["--mechanism", "lit"], "No published weights of lit are known"),
        ([*SLA, "--model-class", "Other"], "Other is not supported"),
        (SLA, "no parameter that ends in attn_op.local_attn.proj_l.weight"),
    ],
    ids=["no-mechanism", "unknown", "model", "others"],
)
def test_one_line_for_each_mistake(options, reason, tmp_path, capsys):
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "out"), *options]) == 2
    assert reason in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["missing.pth", "damaged.pth", "damaged.safetensors", "code.pth"])
def test_files_that_hold_no_weights(name, tmp_path, capsys):
    file = tmp_path / name
    if name.startswith("damaged"):
        file.write_bytes(b"no weights")
    if name == "code.pth":
        torch.save({"a": HOSTS["wan"]}, file)  # an object: to read it would be to run code
    assert main(["convert", str(file), str(tmp_path / "out"), *SLA]) == 2
    assert str(file) in capsys.readouterr().err
