"""Train an embedded model on one GPU: `python -m linfusion.demos.train_teacher --data FOLDER_OR_TGZ --output DIR`."""

import argparse
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

from linfusion.demos.embedded import CLASSES, HOME, MODELS, open_folder, shared_parts
from linfusion.demos.emoji import evaluate
from linfusion.demos.emoji.data import EmojiData, load_data
from linfusion.demos.emoji.export import build_flux, build_stable_diffusion, export
from linfusion.demos.emoji.flow import Examples, train_flow
from linfusion.demos.emoji.guidance import train_guidance
from linfusion.demos.emoji.loop import Length, write_json
from linfusion.demos.emoji.models import TINY, Denoiser, Sizes, pack
from linfusion.demos.emoji.sheets import UNSEEN, sheet
from linfusion.demos.emoji.text import build_tokenizer
from linfusion.demos.emoji.unet import draw_steps, latents_of, train_unet, whiten_text
from linfusion.demos.emoji.vae import encode_all, normalise_latents, set_normalisation, train_vae

logger = logging.getLogger(__name__)

STAGES = {
    "emoji-flux": ("vae", "flow", "guidance", "export", "evaluate"),
    "emoji-unet": ("unet", "export", "evaluate"),
}
# optimiser steps and pictures a step
LENGTHS = {"vae": (1800, 32), "flow": (12500, 256), "guidance": (1500, 256), "unet": (10000, 256)}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        return _run(args)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m linfusion.demos.train_teacher",
        description="Train an embedded model. Stop it at any time; the same command goes on from the last checkpoint.",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder or .tgz of the pictures (demos/README.md)")
    parser.add_argument("--output", type=Path, required=True, help="checkpoints, the exported model, figures, sheets")
    parser.add_argument("--teacher", choices=tuple(STAGES), default=HOME, help="(default %(default)s)")
    names = dict.fromkeys(stage for stages in STAGES.values() for stage in stages)
    parser.add_argument("--stage", choices=("all", *names), default="all", help="stop after this one")
    for stage, (steps, batch) in LENGTHS.items():
        parser.add_argument(f"--steps-{stage}", type=int, default=steps, help="(default %(default)s)")
        parser.add_argument(
            f"--minutes-{stage}", type=float, help="as many steps as fit, by the speed of the first ones"
        )
        parser.add_argument(f"--batch-{stage}", type=int, default=batch, help="(default %(default)s)")
    parser.add_argument("--model", type=Path, help="the folder that evaluate measures (default OUTPUT/TEACHER)")
    parser.add_argument(
        "--shared", type=Path, default=MODELS / HOME,
        help="the emoji-flux whose autoencoder, CLIP and tokenizer emoji-unet takes (default the shipped one)",
    )  # fmt: skip
    parser.add_argument("--captions", type=int, default=512, help="for the final retrieval (default %(default)s)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0], help="for that too (default 3)")
    parser.add_argument(
        "--stop-after", type=float, metavar="SECONDS", help="write a checkpoint (emoji-unet: export it too) and leave"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile (always so on a CPU)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="of activations (bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--tiny", action="store_true", help="a toy model on 64 x 64 pixels: seconds on a CPU")
    return parser.parse_args(argv)


def _run(args: argparse.Namespace) -> int:
    if args.device.startswith("cuda"):
        # torch 2.11 on an H100: the cuDNN backend of attention crashes in the backward pass at 272 tokens
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cudnn.benchmark = True
    wanted = STAGES[args.teacher] if args.stage == "all" else (args.stage,)
    if not set(wanted) <= set(STAGES[args.teacher]):
        raise ValueError(f"{args.teacher} has no stage {args.stage}; its stages: {', '.join(STAGES[args.teacher])}")
    sizes = TINY if args.tiny else Sizes()
    deadline = time.monotonic() + args.stop_after if args.stop_after is not None else None
    data = load_data(args.data, sizes.image).to(args.device)
    logger.info("%d pictures, %d captions", len(data), len(set(data.captions)))
    args.output.mkdir(parents=True, exist_ok=True)
    train = {"emoji-flux": _train_flux, "emoji-unet": _train_unet}[args.teacher]
    if wanted != ("evaluate",) and not train(args, data, sizes, wanted, deadline):
        logger.info("stopped early; the same command goes on from here")
        return 0
    if "evaluate" in wanted:
        _evaluate(args, data)
    return 0


def _settings(args: argparse.Namespace, stage: str, decay: float, deadline: float | None) -> dict:
    """What every stage is told: length, batch, and how to compute."""
    values, gpu = vars(args), args.device.startswith("cuda")
    minutes = values[f"minutes_{stage}"]
    steps = None if minutes else values[f"steps_{stage}"]
    return {
        "folder": args.output,
        "length": Length(steps, minutes, warmup=min(200, 1 + (steps or 1000) // 5), decay=decay),
        "batch": values[f"batch_{stage}"],
        "compile": gpu and not args.no_compile,
        "bf16": _bf16(args),
        "deadline": deadline,
    }


def _bf16(args: argparse.Namespace) -> bool:
    return args.precision == "bf16" or (args.precision is None and args.device.startswith("cuda"))


def _train_flux(
    args: argparse.Namespace, data: EmojiData, sizes: Sizes, wanted: tuple[str, ...], deadline: float | None
) -> bool:
    """Every stage up to the last one wanted; a finished stage only loads its result. False if stopped early."""
    torch.manual_seed(0)  # initial weights; the steps draw from their own generators
    vae = train_vae(data, sizes, **_settings(args, "vae", 0.6, deadline))
    if vae is None:
        return False
    latents = encode_all(vae, data)
    set_normalisation(vae, latents)
    if wanted == ("vae",):
        return True

    tokenizer = build_tokenizer(data.captions)
    denoiser = Denoiser(sizes, len(tokenizer)).to(args.device)
    examples = Examples(data, pack(normalise_latents(vae, latents)), tokenizer)
    report = evaluate.training_report(denoiser, vae, data, examples, distilled=False, bf16=_bf16(args))
    if not train_flow(denoiser, examples, report=report, **_settings(args, "flow", 0.4, deadline)):
        return False
    if wanted == ("flow",):
        return True

    report = evaluate.training_report(denoiser, vae, data, examples, distilled=True, bf16=_bf16(args))
    if not train_guidance(denoiser, examples, report=report, **_settings(args, "guidance", 0.8, deadline)):
        return False
    if "export" in wanted:
        logger.info("wrote %s", export(build_flux(denoiser, vae, tokenizer), args.output / args.teacher))
    return True


def _train_unet(
    args: argparse.Namespace, data: EmojiData, sizes: Sizes, wanted: tuple[str, ...], deadline: float | None
) -> bool:
    """The same for the UNet, which has one stage."""
    torch.manual_seed(0)
    pipe = build_stable_diffusion(sizes, **shared_parts(args.shared)).to(args.device)
    examples = Examples(data, latents_of(pipe.vae, data), pipe.tokenizer, draw_steps)
    with torch.no_grad():
        whiten_text(pipe.unet, pipe.text_encoder(examples.ids)[0].flatten(0, 1))
    report = evaluate.pipeline_report(pipe, data, bf16=_bf16(args))
    done = train_unet(pipe, examples, report=report, **_settings(args, "unet", 0.4, deadline))
    if "export" in wanted:  # of a run that was stopped too: its average is what there is
        logger.info("wrote %s%s", export(pipe, args.output / args.teacher), "" if done else ", unfinished")
    return done


def _evaluate(args: argparse.Namespace, data: EmojiData) -> None:
    """Figures and sheets of the exported folder, as shipped: bf16 weights, fp32 arithmetic."""
    folder = args.model or args.output / args.teacher
    if not folder.is_dir():
        raise ValueError(f"no exported model in {folder}; run --stage export first, or name one with --model")
    pipe = open_folder(CLASSES[args.teacher], folder).to(args.device)
    captions = evaluate.choose_captions(data, args.captions)
    copies, vae_psnr = _copies(pipe.vae, data)
    copied = evaluate.retrieved(copies, data.captions, evaluate.data_thumbnails(data), data.captions)
    logger.info("PSNR of the autoencoder's copies %.2f dB", vae_psnr)
    figures: dict[str, Any] = {
        "pictures": len(data),
        "vae_psnr_db": vae_psnr,
        "retrieval_of_vae_copies": sum(copied) / len(copied),
        "captions": len(captions),
        "retrieval": {},
        "parameters": {
            name: sum(p.numel() for p in module.parameters())
            for name, module in pipe.components.items()
            if isinstance(module, torch.nn.Module)
        },
        "bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
    }
    for scale in args.guidance:
        figures["retrieval"][f"guidance {scale:g}"] = evaluate.retrieval(pipe, data, captions, guidance=scale)
        write_json(args.output / "figures.json", figures)  # who stops it keeps what was measured so far
        logger.info("%s", figures)
    shown = captions[:32]
    originals = data.pixels(torch.tensor([data.captions.index(caption) for caption in shown]))
    sheet([originals, evaluate.draw(pipe, shown)], shown, args.output / "emoji-dataset.png")
    sheet([evaluate.draw(pipe, UNSEEN)], UNSEEN, args.output / "emoji-unseen.png", side=128)


def _copies(vae: AutoencoderKL, data: EmojiData, batch: int = 64) -> tuple[torch.Tensor, float]:
    """Thumbnails of the autoencoder's copies of all pictures, their PSNR in dB (of the mean squared error)."""
    small, total = [], 0.0
    with torch.no_grad():
        for start in tqdm(range(0, len(data), batch), desc="copies", unit="batch"):
            pixels = data.pixels(slice(start, start + batch))
            copies = vae.decode(vae.encode(pixels).latent_dist.mean).sample
            total += F.mse_loss(copies, pixels, reduction="sum").item()
            small.append(evaluate.thumbnails(copies))
    return torch.cat(small), 10 * math.log10(4 * data.images.numel() / total)


if __name__ == "__main__":
    sys.exit(main())
