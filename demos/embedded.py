"""The text-to-image model that ships inside the package: 256 x 256 3D emoji from their names, no network."""

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, FluxPipeline
from diffusers.utils import deprecation_utils

from linfusion.demos.emoji.text import MAX_TOKENS
from linfusion.pipelines.facts import unknown_words

_MODELS = Path(__file__).parent / "models"
# what diffusers calls the dtype: newer releases warn about the old name, older ones ignore the new one
_DTYPE = "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"
_DEFAULTS = {
    "height": 256,
    "width": 256,
    "num_inference_steps": 28,
    "guidance_scale": 3.0,
    "max_sequence_length": MAX_TOKENS,
}


class EmojiFluxPipeline(FluxPipeline):
    """FluxPipeline with the defaults of this model: 256 x 256 pixels, 28 steps, guidance 3, 16 text tokens.

    Guidance between 1 and 5 is distilled into the model: one forward pass a step, whatever `guidance_scale`.
    """

    defaults = _DEFAULTS
    guidance_range = (1.0, 5.0)
    size_limits = (256, 1024)  # pixels; what `linfusion generate` draws, 256 being what it was trained at

    def __call__(self, prompt: str | list[str] | None = None, **kwargs: Any) -> Any:
        """Draw. Takes every argument of `FluxPipeline.__call__`, by name; see the class for the defaults."""
        given = {name: value for name, value in kwargs.items() if value is not None}
        return super().__call__(prompt, **{**_DEFAULTS, **given})

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of `prompt` that the model never saw; it draws as if anything could stand in their place."""
        return unknown_words(self.tokenizer, prompt)


PIPELINES: dict[str, type[DiffusionPipeline]] = {"emoji-flux": EmojiFluxPipeline}


def captions() -> list[str]:
    """The names of the pictures that the embedded models were trained on, each once, in alphabetical order."""
    return (Path(__file__).parent / "emoji" / "captions.txt").read_text().splitlines()


def demo_pipeline(name: str = "emoji-flux", **kwargs: Any) -> DiffusionPipeline:
    """Open an embedded model, in fp32 on the CPU unless told otherwise.

    Args:
        name: which one; `emoji-flux` so far.
        **kwargs: for `from_pretrained`. `dtype` and its older name `torch_dtype` are both taken.

    Raises:
        ValueError: there is no such model.
    """
    if name not in PIPELINES:
        raise ValueError(f"unknown embedded model {name!r}; available: {', '.join(sorted(PIPELINES))}")
    dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", None))
    if dtype is not None:
        kwargs[_DTYPE] = dtype
    return PIPELINES[name].from_pretrained(_MODELS / name, local_files_only=True, **kwargs)
