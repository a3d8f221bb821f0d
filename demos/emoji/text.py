"""Captions and the word-level tokenizer that both text encoders use."""

import re
import unicodedata

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

MAX_TOKENS = 16  # the longest caption has 11 words, and one token ends it
PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
# CLIPTextModel pools at the end token, except that the id 2 switches it to an older rule (the highest id)
PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2


def normalise(text: str) -> str:
    """Lower case, no accents, only letters and digits, one space between words: what the tokenizer sees."""
    plain = "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
    return " ".join(re.findall(r"[a-z0-9]+", plain.lower()))


def build_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a word of `captions`; every text ends in `</s>` and is padded to 16 tokens."""
    words = sorted({word for caption in captions for word in normalise(caption).split()})
    vocabulary = {PAD: PAD_ID, EOS: EOS_ID, UNKNOWN: UNKNOWN_ID}
    vocabulary |= {word: index for index, word in enumerate(words, start=len(vocabulary))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[^a-z0-9]+"), behavior="removed")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, EOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """Token ids `[N, 16]`, as FluxPipeline makes them."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
