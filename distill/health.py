"""Whether a run is still sound, told without waiting for the device at every step."""

from __future__ import annotations

import torch
from torch import Tensor


class Diverged(FloatingPointError):
    """A loss or gradient that is not a number, or infinite."""


class Health:
    """Keeps, on the device, what was not finite at the first step where anything was not.

    Args:
        layers: of a stage.
        fp16: gradients may overflow now and then, which the scaler answers by skipping the step.
    """

    def __init__(self, layers: list[str], device: torch.device, fp16: bool) -> None:
        self.layers, self.others = layers, ["the model's answer", "the loss", *([] if fp16 else ["the gradients"])]
        self.sound = torch.ones(len(layers) + len(self.others), dtype=torch.bool, device=device)

    def update(self, layers: Tensor, loss: Tensor, norm: Tensor | float | None) -> None:
        """`layers` `[L + 1]` bool as a stage reports them."""
        # `as_tensor` of a number would wait for the device
        gradient = norm.to(loss.device) if isinstance(norm, Tensor) else torch.zeros_like(loss)
        now = torch.cat([layers, torch.stack([loss, gradient]).isfinite()])[: len(self.sound)]
        self.sound = torch.where(self.sound.all(), now, self.sound)

    def check(self, step: int, last: str) -> None:
        """Waits for the device.

        Raises:
            Diverged: with the first thing that was not finite, and the checkpoint to go back to.
        """
        sound = self.sound.tolist()
        if all(sound):
            return
        first = [*self.layers, *self.others][sound.index(False)]
        raise Diverged(
            f"Not finite by step {step}, first in {first}. {last} Try a lower learning_rate or max_grad_norm, or "
            "mixed_precision bf16 or no."
        )
