"""Time a picture of up to 16384 x 16384 pixels with the SDXL architecture and random weights.

    python -m linfusion.demos.high_resolution --size 16384 --out 16k.tif

The schedule is fixed, so that figures compare: 30 guided steps at 1024 pixels, then 10, 6 and 4 at 2048, 4096 and 8192,
and 3 without guidance at 16384. Prints one line a stage, then one of JSON: seconds of every stage, of decoding and
writing, and the peak of memory. `--few` makes a small model of the same architecture, for a try without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline

import linfusion as lf
from linfusion.kernels.bench.denoisers import SDXL
from linfusion.pipelines.cascade import cascade
from linfusion.pipelines.stages import Stage

STAGES = [  # SDXL super-resolution strengths as LinFusion publishes them
    Stage(1024, steps=30, guidance=5.0),
    Stage(2048, steps=10, strength=0.32, guidance=5.0),
    Stage(4096, steps=6, strength=0.24, guidance=5.0),
    Stage(8192, steps=4, strength=0.16, guidance=5.0),
    Stage(16384, steps=3, strength=0.08, guidance=1.0),
]


def build(device: str, few: bool = False) -> StableDiffusionXLPipeline:
    """SDXL's pipeline in bf16 (fp32 on a CPU) without text encoders; all weights are random."""
    target = torch.device(device)
    dtype = torch.bfloat16 if target.type == "cuda" else torch.float32
    unet = SDXL().build(target, few)
    widths = (8, 16, 16, 16) if few else (128, 256, 512, 512)
    with torch.device(target):
        vae = AutoencoderKL(
            block_out_channels=widths, layers_per_block=2, latent_channels=4, scaling_factor=0.13025, sample_size=1024,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=8 if few else 32, force_upcast=False,
        )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae.to(dtype).to(memory_format=torch.channels_last).eval(), unet=unet.to(dtype), scheduler=scheduler,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=16384, choices=[s.size for s in STAGES])
    parser.add_argument("--out", type=Path, default=Path("high-resolution.tif"), help=".tif is written fastest")
    parser.add_argument("--memory", help="a cap, such as 24GiB")
    parser.add_argument("--mechanism", choices=["linfusion", "stock"], default="linfusion")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divide all sizes by this")
    parser.add_argument("--few", action="store_true", help="a small model, for a try")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    pipe = build(args.device, args.few)
    if args.mechanism == "linfusion":
        lf.apply(pipe, SDXL().mechanisms()["linfusion"])
    place = {"device": pipe.device, "dtype": pipe.dtype}
    text = {
        "prompt_embeds": torch.randn(1, 77, 2048, **place), "negative_prompt_embeds": torch.randn(1, 77, 2048, **place),
        "pooled_prompt_embeds": torch.randn(1, 1280, **place),
        "negative_pooled_prompt_embeds": torch.randn(1, 1280, **place),
    }  # fmt: skip
    plan = [s for s in STAGES if s.shape[0] <= args.size]
    plan = [Stage(s.shape[0] // args.scale, s.steps, s.strength, s.guidance, upscale="latent") for s in plan]
    peaks: list[float] = []

    def peak() -> None:
        if pipe.device.type == "cuda":
            peaks.append(torch.cuda.max_memory_allocated() / 2**30)
            torch.cuda.reset_peak_memory_stats()

    def tell(report: Any, preview: Any) -> None:
        peak()
        say(f"{report.stage.size} px: {report.steps} steps, {report.seconds:.2f} s {' '.join(report.remarks)}")

    # the first call of a kernel compiles it, and chooses convolutions
    cascade(pipe, None, plan[:1], arguments=text, steps=2, guidance=5.0)
    started = time.perf_counter()
    done = cascade(pipe, None, plan, arguments=text, memory=args.memory, out=args.out, on_stage=tell)
    seconds = time.perf_counter() - started
    peak()
    result = {
        "size": plan[-1].size, "mechanism": args.mechanism, "seconds": round(seconds, 2),
        "stages": [round(s.seconds, 2) for s in done.stages], "decode_and_write": round(done.decode_seconds, 2),
        "peak_gib": [round(p, 2) for p in peaks], "memory": args.memory, "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if pipe.device.type == "cuda" else "cpu",
    }  # fmt: skip
    say(json.dumps(result))
    return result


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
