"""How near two sets of pictures are: PSNR, SSIM, LPIPS, FID, KID. Pictures are `[N, 3, H, W]` in [0, 1]."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def psnr(a: Tensor, b: Tensor) -> list[float]:
    """Of each pair, in dB; infinite where they are equal."""
    errors = (a.double() - b.double()).square().flatten(1).mean(1).tolist()
    return [math.inf if e == 0 else -10 * math.log10(e) for e in errors]


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian windows of 11 pixels, sigma 1.5, over all colours."""
    offsets = torch.arange(11, dtype=torch.float64, device=a.device) - 5
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    line = line / line.sum()

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x.reshape(-1, 1, *x.shape[-2:]), line.view(1, 1, -1, 1))
        return F.conv2d(x, line.view(1, 1, 1, -1))

    x, y = a.double(), b.double()
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    shared = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean_x * mean_y + c1) * (2 * shared + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(value.mean())


def lpips(a: Tensor, b: Tensor) -> float | None:
    """Learned distance by torchmetrics; None where it or its weights are not to be had."""
    try:
        from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity as measure

        return float(measure(a.float(), b.float(), net_type="alex", normalize=True))
    except Exception:  # no torchvision, no network, no weights: as many kinds of error
        return None


class AutoencoderFeatures(nn.Module):
    """The pipeline's own autoencoder as a feature network that needs no download: its latent, averaged to 4 x 4.

    FID and KID by it can be compared with each other, not with published ones.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self._vae = (vae,)
        self.num_features = 16 * vae.config.latent_channels

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        vae = self._vae[0]
        latents = vae.encode((pictures * 2 - 1).to(vae.device, vae.dtype)).latent_dist.mean
        return F.adaptive_avg_pool2d(latents.float(), 4).flatten(1).cpu()


def feature_network(name: str, vae: Any) -> nn.Module | int | None:
    """For `distances`: "vae", "inception" (torchmetrics' own, 2048 features), "clip" or "none".

    Raises:
        ValueError: an unknown name.
        ImportError: it is not to be had here.
    """
    if name == "none":
        return None
    if name == "vae":
        return AutoencoderFeatures(vae)
    if name == "inception":
        return 2048
    if name == "clip":
        return ClipFeatures()
    raise ValueError(f"features must be vae, inception, clip or none, got {name!r}.")


class ClipFeatures(nn.Module):
    """CLIP's picture embedding (ViT-B/32), from the Hub."""

    num_features = 512

    def __init__(self) -> None:
        super().__init__()
        from transformers import CLIPVisionModelWithProjection

        try:
            self.model = CLIPVisionModelWithProjection.from_pretrained("openai/clip-vit-base-patch32").eval()
        except OSError as error:
            raise ImportError(f"features clip: {str(error).splitlines()[0]}") from None

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        mean, std = torch.tensor([0.481, 0.458, 0.408]), torch.tensor([0.269, 0.261, 0.276])
        small = F.interpolate(pictures, (224, 224), mode="bicubic", antialias=True)
        return self.model((small - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).image_embeds


def distances(real: Tensor, drawn: Tensor, features: nn.Module | int) -> dict[str, float]:
    """FID and KID of `drawn` against `real`, by torchmetrics.

    Raises:
        ImportError: torchmetrics, or what it needs for that network, is missing.
        ValueError: fewer than two pictures.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError:
        raise ImportError("FID and KID need torchmetrics: pip install linfusion[train]") from None
    if min(len(real), len(drawn)) < 2:
        raise ValueError("FID and KID need at least two pictures.")
    try:
        fid = FrechetInceptionDistance(features, normalize=True).set_dtype(torch.float64)
        kid = KernelInceptionDistance(
            features, normalize=True, subsets=20, subset_size=min(len(real), len(drawn)) // 2 + 1
        )
    except ModuleNotFoundError as error:
        raise ImportError(f"this feature network needs more: {error}") from None
    for metric in (fid, kid):
        for is_real, pictures in ((True, real), (False, drawn)):
            for part in pictures.float().split(16):
                metric.update(part, real=is_real)
    # KID draws its subsets at random
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"fid": float(fid.compute()), "kid": float(kid.compute()[0])}
