"""Optimisers of the training stages: Muon for the matrices inside blocks, AdamW for the rest."""

import re

import torch
from torch import nn

_BLOCK = re.compile(r"(transformer|down|mid|up)_block")
_MODULATION = re.compile(r"\.norm|\.time_emb_proj")


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), scaled to the step size of AdamW (Liu et al., arXiv:2502.16982).

    Matrices of one shape are orthogonalised in one batch: the whole step is a few dozen kernels.

    Args:
        params: matrices, or convolutions, which are matrices from all inputs of a place to its outputs.
        lr: comparable to AdamW's.
    """

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0):
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)
        super().__init__(
            [{"params": group} for group in by_shape.values()],
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay},
        )

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum"] for p in params]
            grads = [p.grad for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            matrices = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"])).flatten(2)
            updates = orthogonalise(matrices).view(-1, *params[0].shape)
            scale = 0.2 * max(matrices.shape[1:]) ** 0.5
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(updates.to(params[0].dtype).unbind()), alpha=-group["lr"] * scale)


def orthogonalise(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Nearest semi-orthogonal matrices of `[N, rows, columns]`, roughly: singular values end between 0.7 and 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).to(torch.bfloat16 if matrices.is_cuda else matrices.dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices for Muon (inside the denoiser's blocks, modulations left out), and everything else."""
    matrices, rest = [], []
    for name, p in module.named_parameters():
        inside = _BLOCK.search(name) and not _MODULATION.search(name)
        (matrices if inside and p.ndim >= 2 else rest).append(p)
    return matrices, rest


def build_optimizers(module: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon and AdamW over the trainable parameters of a denoiser."""
    matrices, rest = split_parameters(module)
    return [
        Muon([p for p in matrices if p.requires_grad], lr=muon_lr, weight_decay=0.01),
        adamw([p for p in rest if p.requires_grad], adam_lr),
    ]


def adamw(params: list[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW with the settings that every stage shares."""
    return torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
