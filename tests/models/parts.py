"""What a whole pipeline needs besides its denoiser: tokenizer, text encoder, autoencoder, all tiny."""

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from .base import ddim
from .unet import HOSTS


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "red", "green", "apple"])}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, model_max_length=8, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def clip(width: int) -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=6, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, pad_token_id=0, bos_token_id=1, eos_token_id=1, initializer_range=1.0,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def vae() -> AutoencoderKL:
    """Factor 8, as the real ones."""
    torch.manual_seed(0)
    return AutoencoderKL(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        mid_block_add_attention=False, scaling_factor=1.0, shift_factor=0.0,
    ).eval()  # fmt: skip


def stable_diffusion() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 in small, from prompt to picture."""
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=clip(16), tokenizer=tokenizer(), unet=HOSTS["unet-sd15"].build(), scheduler=ddim(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
