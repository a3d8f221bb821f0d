"""Stage B: the whole student against the data, the teacher's answer and the teacher's attention.

    loss = task + 0.5 output + 0.5 attention (+ 0.05 variance)

as LinFusion (arXiv 2409.02097, eq. 8) and CLEAR (arXiv 2412.16112, eq. 8) have it; the last term is LiT's (arXiv
2501.12976) for models that predict a variance. SLA's fine-tuning is the task alone. Weights of zero cost nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..losses import layer_loss, mean_square, split_variance
from .base import Stage


class EndToEnd(Stage):
    """Student and teacher each run on their own activations."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        c, learned = self.config, self.inputs.convention["variance"]
        arguments, noised = self.inputs(batch)
        wanted, features = self._teach(arguments)
        answer = self.answer(arguments)
        prediction, variance = split_variance(answer, learned)
        terms = {"task": mean_square(prediction, noised.target)}
        weights = {"task": c.task_weight}
        if wanted is not None:
            theirs, their_variance = split_variance(wanted, learned)
            terms["output"], weights["output"] = mean_square(prediction, theirs), c.output_weight
            if variance is not None and their_variance is not None:
                terms["variance"], weights["variance"] = mean_square(variance, their_variance), c.variance_weight
        outputs = [self.seen[name] for name in self.layers]
        result = {"finite": self.all_finite(outputs, answer)}
        if features:
            relative = c.attention_loss == "relative"
            losses = [layer_loss(self.seen[n], features[n], relative) for n in self.layers]
            result["layers"] = torch.stack(losses).detach()
            terms["attention"], weights["attention"] = torch.stack(losses).mean(), c.attention_weight
        self.seen = {}  # or it would live until the next forward
        loss = torch.stack([weights[name] * term for name, term in terms.items() if weights[name]]).sum()
        return result | {"loss": loss} | {name: term.detach() for name, term in terms.items()}

    def on_layer(self, name: str, args: tuple, kwargs: dict[str, Any], output: Any) -> tuple[Any, Any]:
        return output, None

    @torch.no_grad()
    def _teach(self, arguments: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
        """The teacher's answer and attention outputs, as far as some loss asks for them."""
        c = self.config
        learned = self.inputs.convention["variance"] and c.variance_weight
        if not (c.output_weight or c.attention_weight or learned):
            return None, {}
        features: dict[str, Any] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, args: tuple, output: Any) -> None:
                features[name] = output

            return hook

        names = self.layers if c.attention_weight else []
        hooks = [self.teacher.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        try:
            return self.teacher(**arguments)[0], features
        finally:
            for hook in hooks:
                hook.remove()
