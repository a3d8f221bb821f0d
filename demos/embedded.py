"""The text-to-image models that ship inside the package: 256 x 256 3D emoji from their names, no network."""

import inspect
import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionPipeline
from diffusers.utils import deprecation_utils

from linfusion.demos.emoji.text import MAX_TOKENS
from linfusion.pipelines.facts import unknown_words

MODELS, ADAPTERS = (Path(__file__).parent / name for name in ("models", "adapters"))
# what diffusers calls the dtype: newer releases warn about the old name, older ones ignore the new one
_DTYPE = "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"


class _Embedded(DiffusionPipeline):
    """What both have in common: defaults of the call, words they know, folders that the stock class opens."""

    stock: type[DiffusionPipeline]
    defaults: dict[str, Any]
    size_limits = (256, 1024)  # pixels; what `linfusion generate` draws, 256 being what they were trained at

    def __call__(self, prompt: str | list[str] | None = None, **kwargs: Any) -> Any:
        """Draw. Takes every argument of the stock pipeline's call, by name; see the class for the defaults."""
        given = {name: value for name, value in kwargs.items() if value is not None}
        return super().__call__(prompt, **{**self.defaults, **given})

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of `prompt` that the model never saw; it draws as if anything could stand in their place."""
        return unknown_words(self.tokenizer, prompt)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the whole pipeline, as a folder of the stock class, which needs nothing of this package."""
        super().save_pretrained(save_directory, **kwargs)
        index = Path(save_directory) / "model_index.json"
        content = json.loads(index.read_text()) | {"_class_name": self.stock.__name__}
        index.write_text(json.dumps(content, indent=2) + "\n")


class EmojiFluxPipeline(_Embedded, FluxPipeline):
    """FluxPipeline with the defaults of this model: 256 x 256 pixels, 28 steps, guidance 3, 16 text tokens.

    Guidance between 1 and 5 is distilled into the model: one forward pass a step, whatever `guidance_scale`.
    """

    stock = FluxPipeline
    guidance_range = (1.0, 5.0)
    # rotary positions and noise of larger stages that keep it to the picture it drew at 256: it was trained at no other
    cascade_settings = {"steps": 4, "strength": 0.15, "low": 1.0, "ntk": 100.0}
    defaults = {
        "height": 256,
        "width": 256,
        "num_inference_steps": 28,
        "guidance_scale": 3.0,
        "max_sequence_length": MAX_TOKENS,
    }


class EmojiUnetPipeline(_Embedded, StableDiffusionPipeline):
    """StableDiffusionPipeline with the defaults of this model: 28 steps, guidance 3 (two forward passes a step)."""

    stock = StableDiffusionPipeline
    defaults = {"num_inference_steps": 28, "guidance_scale": 3.0}


CLASSES: dict[str, type[_Embedded]] = {"emoji-flux": EmojiFluxPipeline, "emoji-unet": EmojiUnetPipeline}
PIPELINES = {name: cls for name, cls in CLASSES.items() if (MODELS / name).is_dir()}
"""Those whose weights are here, by name."""
# parts that all of them have in common, and that are stored once
SHARED, HOME = ("vae", "text_encoder", "tokenizer"), "emoji-flux"


def captions() -> list[str]:
    """The names of the pictures that the embedded models were trained on, each once, in alphabetical order."""
    return (Path(__file__).parent / "emoji" / "captions.txt").read_text().splitlines()


def adapters(model: str) -> dict[str, Path]:
    """The trained students that ship for an embedded model: name to folder, for `linfusion.load`."""
    if model not in PIPELINES:
        return {}
    return {path.parent.name: path.parent for path in sorted((ADAPTERS / model).glob("*/config.json"))}


def demo_pipeline(name: str = "emoji-flux", **kwargs: Any) -> DiffusionPipeline:
    """Open an embedded model, in fp32 on the CPU unless told otherwise.

    Args:
        name: `emoji-flux`, or where its weights are, `emoji-unet`, which takes what both share from the other.
        **kwargs: for `from_pretrained`. `dtype` and its older name `torch_dtype` are both taken.

    Raises:
        ValueError: there is no such model.
    """
    if name not in PIPELINES:
        raise ValueError(f"unknown embedded model {name!r}; available: {', '.join(sorted(PIPELINES))}")
    return open_folder(PIPELINES[name], MODELS / name, **kwargs)


def open_folder(cls: type[DiffusionPipeline], folder: Path, **kwargs: Any) -> DiffusionPipeline:
    """`cls.from_pretrained(folder)`, with what the folder lacks of `SHARED` from emoji-flux's."""
    dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", None))
    if dtype is not None:
        kwargs[_DTYPE] = dtype
    lacking = [name for name in SHARED if name not in kwargs and not (folder / name).is_dir()]
    if lacking:
        own = inspect.signature(cls.__init__).parameters
        settings = {name: value for name, value in kwargs.items() if name not in own}
        home = shared_parts(MODELS / HOME, **settings)
        kwargs |= {name: home[name] for name in lacking}
    return cls.from_pretrained(folder, local_files_only=True, **kwargs)


def shared_parts(folder: Path, **kwargs: Any) -> dict[str, Any]:
    """The parts named in `SHARED` of an emoji-flux folder, without its denoiser."""
    rest = {"transformer": None, "text_encoder_2": None, "tokenizer_2": None}
    pipe = EmojiFluxPipeline.from_pretrained(folder, local_files_only=True, **rest, **kwargs)
    return {name: pipe.components[name] for name in SHARED}
