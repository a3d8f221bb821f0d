"""A picture as a pyramid of tiles, so that a browser holds only what it shows."""

from __future__ import annotations

import tempfile
from html import escape
from pathlib import Path

from PIL import Image

TILE = 512


def levels(width: int, height: int) -> int:
    """How many sizes there are: the full one, halves of it, down to one that fits one tile."""
    count = 1
    while max(width, height) > TILE:
        width, height, count = -(-width // 2), -(-height // 2), count + 1
    return count


def cut(image: Image.Image, folder: Path) -> Path:
    """Write the tiles of `image` to a new folder below `folder`: `LEVEL-COLUMN-ROW.jpg`, level 0 the smallest."""
    target = Path(tempfile.mkdtemp(prefix="tiles-", dir=folder))
    image = image.convert("RGB")
    for level in reversed(range(levels(*image.size))):
        for top in range(0, image.height, TILE):
            for left in range(0, image.width, TILE):
                box = (left, top, min(left + TILE, image.width), min(top + TILE, image.height))
                name = f"{level}-{left // TILE}-{top // TILE}.jpg"
                image.crop(box).save(target / name, quality=95, subsampling=0)
        image = image.reduce(2) if level else image
    return target


def viewer(image: Image.Image, folder: Path, label: str) -> str:
    """HTML of a viewer (`page.js`) for `image`, whose tiles are written below `folder`."""
    target = cut(image, folder)
    return (
        f'<lf-viewer src="{escape(str(target))}" width="{image.width}" height="{image.height}" tile="{TILE}" '
        f'levels="{levels(*image.size)}" label="{escape(label)}" tabindex="0"></lf-viewer>'
    )
