"""The parts of both models: sizes, constructors, and the forward pass that training uses."""

from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from linfusion.demos.emoji.text import EOS_ID, MAX_TOKENS, PAD_ID

Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Everything that decides the number of parameters. `heads * head_dim` is the transformer's width."""

    image: int = 256
    vae_channels: tuple[int, ...] = (32, 64, 96, 128)
    latent_channels: int = 8
    text_width: int = 128
    clip_layers: int = 2
    t5_layers: int = 2
    double_blocks: int = 1
    single_blocks: int = 7
    heads: int = 4
    head_dim: int = 64
    rope_axes: tuple[int, int, int] = (16, 24, 24)
    unet_channels: tuple[int, int] = (96, 128)
    unet_heads: int = 2

    @property
    def grid(self) -> int:
        """Tokens a side: the autoencoder halves three times, packing once more."""
        return self.image // 2 ** len(self.vae_channels)


TINY = Sizes(
    image=64,
    vae_channels=(8, 8, 16, 16),
    text_width=16,
    clip_layers=1,
    t5_layers=1,
    double_blocks=1,
    single_blocks=1,
    heads=1,
    head_dim=16,
    rope_axes=(4, 6, 6),
    unet_channels=(16, 16),
    unet_heads=1,
)


def build_vae(sizes: Sizes) -> AutoencoderKL:
    """A convolutional autoencoder, 8 times smaller a side. No attention: memory stays linear in the picture."""
    levels = len(sizes.vae_channels)
    return AutoencoderKL(
        block_out_channels=sizes.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=sizes.latent_channels,
        norm_num_groups=8,
        sample_size=sizes.image,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The settings of FLUX.1-dev."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
    )


def build_unet(sizes: Sizes) -> UNet2DConditionModel:
    """Two levels, 32 x 32 and 16 x 16 latents, with self-attention and cross-attention in every block of both.

    Few parameters for 3,388 pictures, so the text reaches every convolution too: pooled by attention and added to the
    time, it scales and shifts what the group norms leave (`addition_embed_type`, as in DeepFloyd IF).
    """
    levels = len(sizes.unet_channels)
    unet = UNet2DConditionModel(
        sample_size=sizes.image // 8,
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        block_out_channels=sizes.unet_channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        layers_per_block=1,
        attention_head_dim=sizes.unet_heads,  # which this class means as their number
        use_linear_projection=True,
        norm_num_groups=16,
        cross_attention_dim=sizes.text_width,
        encoder_hid_dim=sizes.text_width,
        encoder_hid_dim_type="text_proj",
        time_embedding_dim=2 * sizes.unet_channels[0],
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=max(1, sizes.text_width // 64),
    )
    # every block starts as the identity and the output as zero, as in the transformer
    last = ("conv2", "proj_out", "conv_out")
    for name, layer in unet.named_modules():
        if name.endswith(last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return unet


def build_ddim() -> DDIMScheduler:
    """Stable Diffusion's noise levels, rescaled so that the last one is noise alone (arXiv:2305.08891).

    There epsilon says nothing about the picture, so the model predicts v, and sampling starts at just that step.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # not used by this spacing, but StableDiffusionPipeline complains about any other
    )


class Denoiser(nn.Module):
    """Transformer and text encoders as one module: token ids and noisy latents in, velocity out."""

    def __init__(self, sizes: Sizes, vocabulary: int):
        super().__init__()
        width = sizes.text_width
        shared = {"vocab_size": vocabulary, "pad_token_id": PAD_ID, "eos_token_id": EOS_ID}
        self.sizes = sizes
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=width,
                intermediate_size=2 * width,
                projection_dim=width,
                num_hidden_layers=sizes.clip_layers,
                num_attention_heads=max(1, width // 64),
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=EOS_ID,
                **shared,
            )
        )
        self.text_encoder_2 = T5EncoderModel(
            T5Config(
                d_model=width,
                d_ff=2 * width,
                d_kv=min(64, width),
                num_layers=sizes.t5_layers,
                num_heads=max(1, width // 64),
                relative_attention_num_buckets=MAX_TOKENS,
                relative_attention_max_distance=MAX_TOKENS,
                dropout_rate=0.0,
                feed_forward_proj="relu",
                decoder_start_token_id=PAD_ID,
                **shared,
            )
        )
        self.transformer = FluxTransformer2DModel(
            in_channels=4 * sizes.latent_channels,
            num_layers=sizes.double_blocks,
            num_single_layers=sizes.single_blocks,
            attention_head_dim=sizes.head_dim,
            num_attention_heads=sizes.heads,
            joint_attention_dim=width,
            pooled_projection_dim=width,
            guidance_embeds=True,
            axes_dims_rope=sizes.rope_axes,
        )
        _zero_gates(self.transformer)

    def encode(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids `[B, 16]` to text features `[B, 16, width]` and pooled `[B, width]`, without a mask like FluxPipeline."""
        return self.text_encoder_2(input_ids=ids)[0], self.text_encoder(input_ids=ids).pooler_output

    def rotary(self, device: str | torch.device) -> Rotary:
        """The rotary tables of a whole picture, text first."""
        grid = self.sizes.grid
        ids = torch.zeros(grid, grid, 3, device=device)
        ids[..., 1] += torch.arange(grid, device=device)[:, None]
        ids[..., 2] += torch.arange(grid, device=device)[None]
        return self.transformer.pos_embed(torch.cat([torch.zeros(MAX_TOKENS, 3, device=device), ids.view(-1, 3)]))

    def velocity(
        self,
        latents: torch.Tensor,
        time: torch.Tensor,
        guidance: torch.Tensor,
        text: torch.Tensor,
        pooled: torch.Tensor,
        rotary: Rotary,
    ) -> torch.Tensor:
        """What `self.transformer(...)` computes, with the time kept in fp32.

        The stock forward casts the time to the dtype of the activations: under autocast that is bf16, whose spacing
        near 1 is 4 of the 1000 time steps, and a model trained so is lost between those points in fp32.

        Args:
            latents: packed, `[B, N, C]`.
            time: `[B]` in [0, 1], 1 is noise.
            guidance: `[B]`.

        Returns:
            Velocity `[B, N, C]`, from picture to noise.
        """
        model = self.transformer
        temb = model.time_text_embed(time * 1000, guidance * 1000, pooled)
        hidden, text = model.x_embedder(latents), model.context_embedder(text)
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            text, hidden = block(hidden_states=hidden, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary)
        return model.proj_out(model.norm_out(hidden, temb))

    def forward(
        self, latents: torch.Tensor, time: torch.Tensor, guidance: torch.Tensor, ids: torch.Tensor, rotary: Rotary
    ) -> torch.Tensor:
        """Velocity `[B, N, C]` for token ids `[B, 16]`."""
        return self.velocity(latents, time, guidance, *self.encode(ids), rotary)


def _zero_gates(transformer: FluxTransformer2DModel) -> None:
    # every block starts as the identity and the output as zero (adaLN-Zero of the DiT paper)
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    modulations = [m for b in blocks for n, m in b.named_modules() if n.startswith("norm") and n.endswith("linear")]
    for layer in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """`[B, C, H, W]` to tokens `[B, H/2 * W/2, 4C]`, in FluxPipeline's order."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: torch.Tensor, grid: int) -> torch.Tensor:
    """Tokens of a square picture, `grid` a side, back to `[B, C, H, W]`."""
    b, _, c = tokens.shape
    return tokens.view(b, grid, grid, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * grid, 2 * grid)
