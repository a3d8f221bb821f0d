"""The settings of a picture, written into its file, so that it can be drawn again."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

KEY = "linfusion"
MAX_PIXELS = 2**26
"""8192 x 8192: a larger picture is refused by what its header says, before anything is decoded."""

TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "int": (int,), "bool": (bool,), "str | None": (str, type(None)), "int | None": (int, type(None)),
    "float | None": (int, float, type(None)), "dict[str, Any] | None": (dict, type(None)),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """All that a picture depends on but the machine; None is the model's own default.

    `mechanism` is `MechanismConfig.to_dict()`, `adapter` a name, folder or Hub id, `untrained` leaves its weights out.
    """

    prompt: str
    model: str = "emoji-flux"
    mechanism: dict[str, Any] | None = None
    adapter: str | None = None
    untrained: bool = False
    fuse_prologue: bool = True
    size: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    dtype: str = "float32"


def public_name(model: str) -> str:
    """A model's name for a file that may be passed on: of a folder only the last part."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def save(image: Image.Image, path: str | Path, settings: Settings) -> None:
    """Write `image` to `path`; into a PNG with the settings, since other formats have no place for them."""
    if Path(path).suffix.lower() != ".png":
        image.save(path)
        return
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(dataclasses.asdict(settings)))
    image.save(path, pnginfo=info)


def read(path: str | Path) -> Settings:
    """The settings in a PNG that `save` wrote.

    Raises:
        ValueError: not a picture, more than `MAX_PIXELS`, or no settings that this version understands.
        OSError: there is no such file.
    """
    name = Path(path).name
    with open(path, "rb") as file:
        try:
            with Image.open(file) as image:  # reads what stands before the pixels, our text with it
                (width, height), text = image.size, image.info.get(KEY)
        except Image.DecompressionBombError:
            raise ValueError(f"{name} has too many pixels; at most {MAX_PIXELS} are read.") from None
        except (OSError, SyntaxError, ValueError):
            raise ValueError(f"{name} is not a picture.") from None
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name} has {width} x {height} pixels; at most {MAX_PIXELS} are read.")
    if not isinstance(text, str):
        raise ValueError(f"{name} holds no settings; only PNG files that linfusion wrote do.")
    try:
        found = json.loads(text)
        known = {f.name: TYPES[str(f.type)] for f in dataclasses.fields(Settings)}
        if set(found) - set(known):
            raise ValueError(f"unknown: {', '.join(sorted(set(found) - set(known)))}")
        for key, value in found.items():
            if not isinstance(value, known[key]) or (isinstance(value, bool) and bool not in known[key]):
                raise ValueError(f"{key} is {value!r}")
        return Settings(**found)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} holds settings that cannot be read: {error}") from None
