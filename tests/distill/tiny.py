"""Tiny pipelines from prompt to picture, data sets of them, and children that can be killed."""

import multiprocessing
import os
import socket

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, PixArtSigmaPipeline

import linfusion as lf
from linfusion.distill.config import SampleConfig

from ..models import flux as make_flux
from ..models import pixart as make_pixart
from ..models.base import ddim, lively
from ..models.base import vae as small_vae
from ..models.parts import stable_diffusion

PROMPTS = ["red apple", "green apple", "apple", "red", "green"]


def forget():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def build(name):
    # the embedded model's tokenizers and text encoders around a tiny transformer and autoencoder
    parts = {} if name == "sd" else lf.demo_pipeline("emoji-flux", transformer=None, vae=None).components
    if name == "sd":
        pipe = stable_diffusion()
    elif name == "pixart":
        torch.manual_seed(0)
        model = make_pixart()
        model = type(model)(**dict(model.config) | {"caption_channels": 128})
        pipe = PixArtSigmaPipeline(
            tokenizer=parts["tokenizer_2"], text_encoder=parts["text_encoder_2"], transformer=lively(model).eval(),
            vae=small_vae(), scheduler=ddim(),
        )  # fmt: skip
    else:
        torch.manual_seed(0)
        model = make_flux()
        model = type(model)(**dict(model.config) | {"joint_attention_dim": 128, "pooled_projection_dim": 128})
        pipe = FluxPipeline(**parts | {
            "transformer": lively(model).eval(), "vae": small_vae(), "scheduler": FlowMatchEulerDiscreteScheduler(),
        })  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


SIZES = {"sd": 64, "flux": 24, "pixart": 16}
"""Pixels: 8 x 8 latents of the UNet, 6 x 6 tokens of FLUX, 4 x 4 of PixArt."""


def settings(name, folder, **changes):
    given = {"output_dir": str(folder), "num_samples": 10, "shard_size": 4, "sample_batch_size": 2}
    return SampleConfig(**given | {"resolution": SIZES[name], "num_inference_steps": 2} | changes)


def start(function, *arguments, world=1):
    """Run `function` in forked children, one a rank of a gloo group; they know all that is imported here."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    children = [context.Process(target=_child, args=(rank, world, port, function, arguments)) for rank in range(world)]
    for child in children:
        child.start()
    return children


def _child(rank, world, port, function, arguments):
    forget()
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    function(*arguments)
    os._exit(0)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
