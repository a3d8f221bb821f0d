"""Stage A: every replaced layer learns the teacher's attention on the teacher's own inputs (LoLCATs, arXiv 2410.10254).

The layers run in one forward of one model. Each computes both attentions on the same input; the teacher's output goes
on, so that no layer sees another's mistakes, and each layer's gradient stays in the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..losses import finite, layer_loss
from .base import Stage


class Transfer(Stage):
    """Loss: the mean over layers of the relative mean square difference of attention outputs."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        arguments, _ = self.inputs(batch)
        answer = self.answer(arguments)
        losses = torch.stack([self.seen[name][0] for name in self.layers])
        sound = torch.stack([*(self.seen[name][1] for name in self.layers), finite(answer)])
        self.seen = {}  # or it would live until the next forward
        return {"loss": losses.mean(), "layers": losses.detach(), "finite": sound}

    def on_layer(self, name: str, args: tuple, kwargs: dict[str, Any], output: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            wanted = self.teacher.get_submodule(name)(*args, **kwargs)
        return (layer_loss(output, wanted, relative=True), finite(output)), wanted
