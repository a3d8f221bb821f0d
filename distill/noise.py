"""Noised latents, the time to tell the model, and what it should answer: flow, epsilon, v and x0 prediction."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from .probe import CLOCKS


class Noised(NamedTuple):
    """`sample` `[B, ...]`, `time` `[B]` as the model is told it, `target` `[B, ...]` as the model should answer."""

    sample: Tensor
    time: Tensor
    target: Tensor


class Schedule:
    """How noise is added, from a data set's record of the pipeline's scheduler.

    Args:
        meta: of the data set.
        scheme: density of times of flow models, as diffusers' `weighting_scheme` (Esser et al., arXiv 2403.03206,
            section 3.1); models with discrete times are trained uniformly.
    """

    def __init__(
        self, meta: dict[str, Any], device: torch.device, scheme: str, mean: float, std: float, mode_scale: float
    ) -> None:
        config, convention = meta["schedule"], meta["convention"]
        flow = "Flow" in meta["scheduler"] or config.get("prediction_type") == "flow_prediction"
        self.kind: str = "flow" if flow else config.get("prediction_type", "epsilon")
        self.scheme, self.mean, self.std, self.mode_scale = scheme, mean, std, mode_scale
        self.sign, self.clock = convention["sign"], CLOCKS[convention["clock"]]
        self.time_dtype = getattr(torch, convention["time_dtype"])
        if flow:
            return
        if self.kind not in ("epsilon", "v_prediction", "sample"):
            raise NotImplementedError(f"prediction_type {self.kind!r}: flow, epsilon, v_prediction or sample can be.")
        if scheme != "none":
            raise ValueError(f"weighting_scheme {scheme!r} is for flow models; this one predicts {self.kind}.")
        self.alphas: Tensor = DDPMScheduler.from_config(config).alphas_cumprod.to(device)

    def __call__(self, clean: Tensor, noise: Tensor, quantile: Tensor) -> Noised:
        """All in fp32; `clean` and `noise` `[B, ...]`, `quantile` `[B]` in [0, 1)."""
        if self.kind == "flow":
            sigma = self.density(quantile).to(clean.dtype)
            mix = sigma.view(-1, *[1] * (clean.ndim - 1))
            return self._told(torch.lerp(clean, noise, mix), sigma * 1000, noise - clean)
        steps = (quantile * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)
        alpha = self.alphas[steps].to(clean.dtype).view(-1, *[1] * (clean.ndim - 1))
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        target = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[self.kind]
        return self._told(noisy, steps, target)

    def density(self, quantile: Tensor) -> Tensor:
        """Quantiles to noise levels of flow models."""
        u = quantile.clamp(1e-4, 1 - 1e-4)
        if self.scheme == "logit_normal":
            return torch.sigmoid(self.mean + self.std * math.sqrt(2) * torch.erfinv(2 * u - 1))
        if self.scheme == "mode":
            return 1 - u - self.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        return u

    def _told(self, noisy: Tensor, time: Tensor, target: Tensor) -> Noised:
        return Noised(noisy, self.clock(time).to(self.time_dtype), self.sign * target)
