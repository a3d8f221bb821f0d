"""How far block-sparse attention is from exact attention, on what the embedded model attends to while it draws.

`python -m linfusion.demos.sla_error` prints a table: by share of key blocks and way of choosing them, the relative L2
error of the picture's attention outputs, of all layers and heads at several steps. Text is exact everywhere, and the
linear part is left out: its projection is zero until it is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import linfusion as lf
from linfusion.call import AttnCall, sdpa
from linfusion.kernels import block_map

TOPKS = (0.02, 0.05, 0.1, 0.2)
BLOCKS = ((128, 64), (64, 64))
Map = Callable[..., Tensor]


def official_map(q: Tensor, k: Tensor, *, topk: float, block_q: int, block_k: int) -> Tensor:
    """The published choice (github.com/thu-ml/SLA d973e55): means and scores in bf16, ties as `topk` has them."""
    q, k = (x.transpose(1, 2).bfloat16() for x in (q, k))
    k = k - k.mean(dim=2, keepdim=True)

    def means(x: Tensor, size: int) -> Tensor:
        return torch.stack([part.float().mean(2).bfloat16() for part in x.split(size, 2)], 2)

    scores = means(q, block_q) @ means(k, block_k).mT
    index = scores.topk(max(1, int(topk * scores.shape[-1])), dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)


def error(call: AttnCall, exact: Tensor, choose: Map, topk: float, block_q: int, block_k: int) -> float:
    """Relative L2 error of the picture's outputs `[B, N, H, D]` of one layer."""
    q, k = call.rotated()
    image_q, image_k = call.split(q)[1], call.split(k)[1]
    chosen = choose(image_q, image_k, topk=topk, block_q=block_q, block_k=block_k)
    seen = chosen.repeat_interleave(block_q, 2)[:, :, : image_q.shape[1]]
    seen = seen.repeat_interleave(block_k, 3)[..., : image_k.shape[1]]
    seen = F.pad(seen, (call.text, 0) if call.text_first else (0, call.text), value=True)
    return ((sdpa(image_q, k, call.v, seen) - exact).norm() / exact.norm()).item()


@torch.no_grad()
def measure(prompt: str, size: int, steps: int, every: int) -> dict[tuple[Any, ...], list[float]]:
    """Errors by (share, official or not, queries of a block, keys), one for each layer at each `every`-th step."""
    pipe: Any = lf.demo_pipeline("emoji-flux").to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    lf.apply(pipe, lf.Softmax())
    found: dict[tuple[Any, ...], list[float]] = {}
    step = 0

    def look(_: Any, arguments: tuple[AttnCall]) -> None:
        if step % every:
            return
        (call,) = arguments
        q, k = call.rotated()
        exact = sdpa(call.split(q)[1], k, call.v)
        for blocks in BLOCKS:
            for topk in TOPKS:
                for official, choose in ((False, block_map), (True, official_map)):
                    errors = found.setdefault((topk, official, *blocks), [])
                    errors.append(error(call, exact, choose, topk, *blocks))

    def count(_pipe: Any, i: int, _time: Any, values: dict) -> dict:
        nonlocal step
        step = i + 1
        return values

    for module in pipe.transformer.modules():
        if hasattr(module, "linfusion"):
            module.linfusion.register_forward_pre_hook(look)
    pipe(
        prompt, height=size, width=size, num_inference_steps=steps, output_type="latent", callback_on_step_end=count,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return found


def main() -> None:
    """Print the table as Markdown."""
    from rich.console import Console

    parser = argparse.ArgumentParser(prog="python -m linfusion.demos.sla_error", description=__doc__)
    parser.add_argument("--prompt", default="red apple")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--every", type=int, default=3, help="look at each such step; default %(default)s")
    args = parser.parse_args()
    found, say = measure(args.prompt, args.size, args.steps, args.every), Console(soft_wrap=True).out
    kinds = [(official, *blocks) for blocks in BLOCKS for official in (False, True)]
    say("| topk | " + " | ".join(f"{'official' if o else 'this package'}, {q} x {k}" for o, q, k in kinds) + " |")
    say("|---" * (len(kinds) + 1) + "|")
    for topk in TOPKS:
        errors = [mean(found[(topk, *kind)]) for kind in kinds]
        say(f"| {topk:.0%} | " + " | ".join(f"{e:.4f}" for e in errors) + " |")


if __name__ == "__main__":
    main()
