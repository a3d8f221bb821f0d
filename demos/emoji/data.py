"""Images and captions: a folder (or the npm tarball) of emoji pictures whose file names are code points."""

import io
import json
import logging
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from linfusion.demos.emoji.text import normalise

logger = logging.getLogger(__name__)

SUFFIXES = (".webp", ".png")
_SKIN_TONE = re.compile(r" ?(medium light|medium dark|medium|light|dark) skin tone")


@dataclass
class EmojiData:
    """Pictures and their names.

    Args:
        captions: one normalised caption per picture; several pictures may share one.
        images: `[N, 3, size, size]`, uint8, on white.
    """

    captions: list[str]
    images: torch.Tensor

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: str | torch.device) -> "EmojiData":
        """The same data with the pictures on `device`."""
        return EmojiData(self.captions, self.images.to(device))

    def pixels(self, index: torch.Tensor | slice) -> torch.Tensor:
        """Pictures `[B, 3, size, size]` as floats in [-1, 1]."""
        return self.images[index].float() / 127.5 - 1

    def sampling_weights(self) -> torch.Tensor:
        """Probability of each picture `[N]`: by concept rather than by picture.

        Skin-tone variants are over half the pictures and share most of what there is to learn. A picture weighs
        (variants of its concept) ** -0.5, half way between equal pictures and equal concepts.
        """
        concepts = [_SKIN_TONE.sub("", caption) for caption in self.captions]
        count = {concept: concepts.count(concept) for concept in set(concepts)}
        weights = torch.tensor([count[concept] ** -0.5 for concept in concepts], dtype=torch.float64)
        return (weights / weights.sum()).float()


def load_data(source: str | Path, size: int = 256) -> EmojiData:
    """Read every picture that has a name.

    Args:
        source: a folder with pictures (searched with its sub-folders) or a .tgz of one. File names are code points
            (`1f34e.webp`), named by the PyPI package `emoji`; a `captions.json` (`{"file name": "caption"}`) beside
            the pictures is used instead where there is one.
        size: side in pixels.

    Raises:
        ValueError: nothing is there, or no picture has a name.
    """
    source = Path(source)
    files = _read_archive(source) if source.is_file() else _read_folder(source)
    table = files.pop("captions.json", None)
    # without pictures, the reason is that and not a missing package
    captions = json.loads(table) if table is not None else _names_of_code_points(files) if files else {}
    names = sorted(name for name in files if name in captions)
    if not names:
        raise ValueError(
            f"no captioned pictures in {source}; expected the npm package @lobehub/fluent-emoji-3d "
            "(`npm pack @lobehub/fluent-emoji-3d@1.1.0`), as the .tgz or unpacked"
        )
    if len(names) < len(files):
        logger.info("%d of %d pictures have no name and are left out", len(files) - len(names), len(files))
    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(lambda name: _decode(files[name], size), names))
    return EmojiData([normalise(captions[name]) for name in names], torch.stack(pictures))


def _read_folder(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        raise ValueError(f"no such data folder or archive: {folder}; demos/README.md says how to get the data")
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.suffix in SUFFIXES or p.name == "captions.json"}


def _read_archive(path: Path) -> dict[str, bytes]:
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                handle = archive.extractfile(member) if name.endswith((*SUFFIXES, "captions.json")) else None
                if handle is not None:
                    files[name] = handle.read()
    except tarfile.ReadError as error:
        raise ValueError(f"{path} is neither a folder nor a tar archive ({error})") from None
    return files


def _names_of_code_points(files: dict[str, bytes]) -> dict[str, str]:
    try:
        from emoji import EMOJI_DATA
    except ImportError:
        raise ImportError("naming the pictures needs the package emoji: pip install emoji") from None
    names = {}
    for file in files:
        try:
            character = "".join(chr(int(code, 16)) for code in Path(file).stem.split("-"))
        except (ValueError, OverflowError):  # three tag sequences are spelled with underscores
            continue
        # the files leave out the variation selector where it ends the sequence
        entry = EMOJI_DATA.get(character) or EMOJI_DATA.get(character + "\ufe0f")
        if entry is not None:
            names[file] = entry["en"]
    return names


def _decode(data: bytes, size: int) -> torch.Tensor:
    with Image.open(io.BytesIO(data)) as picture:
        picture = picture.convert("RGBA")
        if picture.size != (size, size):
            picture = ImageOps.pad(picture, (size, size), Image.Resampling.LANCZOS, color=(0, 0, 0, 0))
        canvas = Image.new("RGBA", picture.size, "white")
        canvas.alpha_composite(picture)
    return torch.from_numpy(np.array(canvas.convert("RGB"))).permute(2, 0, 1).contiguous()
