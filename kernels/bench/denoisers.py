"""FLUX.1, Stable Diffusion XL and 1.5, and Wan 2.1 at full size, as `models.py` measures them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import peers
from .models import Model, random_model
from .op import Case
from .table import Shape


def _case(op: str, heads: int, tokens: int, dim: int, px: int, batch: int = 1) -> Case:
    return Case(op, Shape(batch, heads, tokens, dim, (("px", px),)), directions=("forward",))


class Flux(Model):
    """FLUX.1-dev, 11.9 billion parameters."""

    name = "model-flux"
    stock = ("sdpa-cudnn", "_native_cudnn")
    cases = tuple(_case("model-flux", 24, 512 + (px // 16) ** 2, 128, px) for px in (1024, 2048))

    def build(self, device: torch.device, few: bool = False) -> nn.Module:
        from diffusers import FluxTransformer2DModel

        blocks = {"num_layers": 1, "num_single_layers": 1} if few else {}
        return random_model(FluxTransformer2DModel, device, guidance_embeds=True, **blocks)

    def inputs(self, px: int, device: torch.device) -> dict[str, Any]:
        side = px // 16
        new: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        places = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).flatten(0, 1)
        return {
            "hidden_states": torch.randn(1, side * side, 64, **new),
            "encoder_hidden_states": torch.randn(1, 512, 4096, **new),
            "pooled_projections": torch.randn(1, 768, **new),
            "timestep": torch.tensor([0.5], **new),
            "guidance": torch.tensor([4.0], device=device),  # 4000 is a number in bf16, 3500 is none
            "img_ids": places.to(**new),
            "txt_ids": torch.zeros(512, 3, **new),
        }

    def mechanisms(self) -> dict[str, Any]:
        import linfusion as lf

        return {"softmax": lf.Softmax(), "linfusion": lf.LinFusion(mid_dim=192), "lit": lf.LiT()}


class SDXL(Model):
    """The UNet of Stable Diffusion XL, 2.6 billion parameters; shapes are those of its finest attention."""

    name = "model-sdxl"
    stock = ("sdpa", None)
    cases = tuple(_case("model-sdxl", 10, (px // 16) ** 2, 64, px) for px in (1024, 2048, 4096, 8192))

    def build(self, device: torch.device, few: bool = False) -> nn.Module:
        from diffusers import UNet2DConditionModel

        return random_model(
            UNet2DConditionModel, device, sample_size=128, in_channels=4, out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280), transformer_layers_per_block=[1, 1, 1] if few else [1, 2, 10],
            attention_head_dim=[5, 10, 20], cross_attention_dim=2048, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816, use_linear_projection=True,
        )  # fmt: skip

    def inputs(self, px: int, device: torch.device) -> dict[str, Any]:
        new: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        return {
            "sample": torch.randn(1, 4, px // 8, px // 8, **new),
            "timestep": torch.tensor(500, device=device),
            "encoder_hidden_states": torch.randn(1, 77, 2048, **new),
            "added_cond_kwargs": {"text_embeds": torch.randn(1, 1280, **new), "time_ids": torch.zeros(1, 6, **new)},
        }

    def mechanisms(self) -> dict[str, Any]:
        import linfusion as lf

        # the MLPs are a sixteenth of the layer's width, as in the published weights
        narrow, wide = lf.LinFusion(mid_dim=40), lf.LinFusion(mid_dim=80)
        return {"linfusion": {"down_blocks.1.*": narrow, "up_blocks.1.*": narrow, "*": wide}}


class SD15(Model):
    """The UNet of Stable Diffusion 1.5, .86 billion parameters, with guidance: a step is a batch of two.

    An early step of AgentSD, with agents, and a late one, which is token merging (ToMe) alone.
    """

    name = "model-sd15"
    stock = ("sdpa", None)
    cases = tuple(_case("model-sd15", 8, (px // 8) ** 2, 40, px, batch=2) for px in (512, 1024, 2048))

    def build(self, device: torch.device, few: bool = False) -> nn.Module:
        from diffusers import UNet2DConditionModel

        return random_model(
            UNet2DConditionModel, device, sample_size=64, in_channels=4, out_channels=4, cross_attention_dim=768,
            block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8, layers_per_block=1 if few else 2,
        )  # fmt: skip

    def inputs(self, px: int, device: torch.device) -> dict[str, Any]:
        new: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        return {
            "sample": torch.randn(2, 4, px // 8, px // 8, **new),
            "timestep": torch.tensor(500, device=device),
            "encoder_hidden_states": torch.randn(2, 77, 768, **new),
        }

    def mechanisms(self) -> dict[str, Any]:
        import linfusion as lf

        return {"agent-sd": lf.AgentSD(early=1.0), "tome": lf.AgentSD(early=0.0)}


class Wan(Model):
    """Wan 2.1 1.3B, 81 frames; pixels are those of the shorter side, 832 x 480 and 1280 x 720."""

    name = "model-wan"
    stock = ("sdpa-cudnn", "_native_cudnn")
    cases = tuple(_case("model-wan", 12, tokens, 128, px) for px, tokens in ((480, 32760), (720, 75600)))

    def build(self, device: torch.device, few: bool = False) -> nn.Module:
        from diffusers import WanTransformer3DModel

        layers = 2 if few else 30
        return random_model(
            WanTransformer3DModel, device, num_attention_heads=12, attention_head_dim=128, num_layers=layers,
            ffn_dim=8960,
        )  # fmt: skip

    def inputs(self, px: int, device: torch.device) -> dict[str, Any]:
        new: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        wide = 832 if px == 480 else px * 16 // 9 // 16 * 16
        return {
            "hidden_states": torch.randn(1, 16, 21, px // 8, wide // 8, **new),
            "timestep": torch.tensor([500], device=device),
            "encoder_hidden_states": torch.randn(1, 512, 4096, **new),
        }

    def mechanisms(self) -> dict[str, Any]:
        import linfusion as lf

        return {"softmax": lf.Softmax(), "sla": lf.SLA(topk=0.05)}

    def checked(self, config: Any) -> Any:
        """SLA with a share of the blocks of which one more or less is lost in rounding, as bf16 may choose another."""
        return replace(config, topk=0.9) if config.name == "sla" else config

    def cores(self) -> dict[str, Callable[[], AbstractContextManager[None]]]:
        """What is called no attention hands the values on: all the rest of the model."""
        return {
            "no-attention": partial(self_attention_by, lambda: lambda q, k, v: v),
            "official-sla": partial(self_attention_by, _official_sla),
        }


def _official_sla() -> Callable[..., Tensor]:
    call: Callable[..., Any] = peers.official_sla(128, 0.05, 128).call
    weight, bias = torch.zeros(128, 128, device="cuda"), torch.zeros(128, device="cuda")

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return call(q, k, v, weight, bias).transpose(1, 2)

    return core


@contextmanager
def self_attention_by(make: Callable[[], Callable[..., Tensor]]) -> Iterator[None]:
    """Wan's attention among `[B, S, H, D]` of one length, which its cross-attention never has here."""
    from diffusers.models.transformers import transformer_wan

    host: Any = transformer_wan
    core, stock = make(), host.dispatch_attention_fn

    def dispatch(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        return core(q, k, v) if q.shape[1] == k.shape[1] else stock(q, k, v, **settings)

    host.dispatch_attention_fn = dispatch
    try:
        yield
    finally:
        host.dispatch_attention_fn = stock
