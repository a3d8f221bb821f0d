"""The embedded model above its own size: by stages, at once, and by plain upscaling, measured and side by side.

    python -m linfusion.demos.large_pictures --data lobehub-fluent-emoji-3d-1.1.0.tgz --size 512 --captions 24

Writes `large-SIZE.png` (middles of the first pictures) and `large-SIZE.json`: for each way the share of pictures whose
nearest training picture, at 32 x 32 pixels, has the caption that was asked for, and how sharp edges are (the 99th
percentile of the gradient's length, in 8-bit levels a pixel).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from linfusion.demos.embedded import demo_pipeline
from linfusion.demos.emoji.data import load_data
from linfusion.demos.emoji.evaluate import choose_captions, data_thumbnails, retrieved, thumbnails
from linfusion.pipelines.cascade import cascade
from linfusion.pipelines.generate import generate
from linfusion.pipelines.stages import Stage, sizes_up_to

NATIVE = 256
WAYS = ("plain upscaling", "by stages", "at once")
SHOWN = 6


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="the npm package's tgz, or a folder")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--captions", type=int, default=24, help="how many, drawn at random")
    parser.add_argument("--output", type=Path, default=Path("runs"))
    args = parser.parse_args(argv)
    data = load_data(args.data)
    captions = choose_captions(data, args.captions)
    pipe = demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    plan = [Stage(NATIVE), *(Stage(s, **pipe.cascade_settings) for s in sizes_up_to(NATIVE, args.size, 16))]
    pictures: dict[str, list[Image.Image]] = {way: [] for way in WAYS}
    for caption in captions:
        small = generate(pipe, caption, size=NATIVE).image
        pictures[WAYS[0]].append(small.resize((args.size, args.size), Image.Resampling.LANCZOS))
        pictures[WAYS[1]].append(cascade(pipe, caption, plan).image)
        pictures[WAYS[2]].append(generate(pipe, caption, size=args.size).image)
    reference, figures = data_thumbnails(data), {}
    for way, drawn in pictures.items():
        found = retrieved(torch.cat([thumbnails(_pixels(p)) for p in drawn]), captions, reference, data.captions)
        figures[way] = {"retrieval": float(np.mean(found)), "edges": float(np.mean([edges(p) for p in drawn]))}
    result = {"size": args.size, "captions": len(captions), "settings": pipe.cascade_settings, "ways": figures}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"large-{args.size}.json").write_text(json.dumps(result, indent=1) + "\n")
    sheet(pictures, captions[:SHOWN]).save(args.output / f"large-{args.size}.png", optimize=True)
    return result


def edges(picture: Image.Image) -> float:
    """The 99th percentile of the gradient's length, in levels a pixel."""
    grey = np.asarray(picture.convert("L"), dtype=np.float64)
    return float(np.percentile(np.hypot(np.diff(grey, axis=0)[:, :-1], np.diff(grey, axis=1)[:-1]), 99))


def sheet(pictures: dict[str, list[Image.Image]], captions: list[str], side: int = 256) -> Image.Image:
    """A row for each way, with the middle `side` pixels of the pictures of `captions`."""
    font, line = ImageFont.load_default(size=14), 20
    canvas = Image.new("RGB", (side * len(captions), (side + line) * len(pictures) + line), "white")
    pen = ImageDraw.Draw(canvas)
    for row, (way, drawn) in enumerate(pictures.items()):
        top = row * (side + line)
        pen.text((4, top + 2), way, fill="black", font=font)
        for column in range(len(captions)):
            edge = (drawn[column].width - side) // 2
            canvas.paste(drawn[column].crop((edge, edge, edge + side, edge + side)), (column * side, top + line))
    for column, caption in enumerate(captions):
        pen.text((column * side + 4, canvas.height - line + 2), caption[:34], fill="black", font=font)
    return canvas


def _pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1


if __name__ == "__main__":
    main()
