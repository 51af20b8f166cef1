"""The score by which every baseline chooses: ordinary loss - alpha · toxic loss, on validation texts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from circuit_breaking.tasks.base import TextTask
from circuit_breaking.tasks.losses import trainable_prediction_losses


@dataclass(frozen=True)
class Validation:
    """Measures a model on validation texts.

    Attributes:
        toxic, ordinary: tasks whose `test` texts are used.
        cap: highest loss of a single toxic prediction, nats.
        alpha: weight of the toxic loss in the score.
    """

    toxic: TextTask
    ordinary: TextTask
    cap: float
    alpha: float

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float | None]:
        """`toxic` and `ordinary` loss and the `score`; all None if one is not finite."""
        losses = {}
        for name, task, cap in (("toxic", self.toxic, self.cap), ("ordinary", self.ordinary, math.inf)):
            found = [trainable_prediction_losses(model, batch)[0].clamp(max=cap) for batch in task.test.batches(32)]
            losses[name] = float(torch.cat(found).double().mean())
        # `clamp` lets a NaN through
        score = losses["ordinary"] - self.alpha * losses["toxic"]
        finite = math.isfinite(score)
        return {**(losses if finite else dict.fromkeys(losses)), "score": score if finite else None}


@torch.no_grad()
def load_weights(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into the parameters of the same names."""
    for name, weight in weights.items():
        parameters[name].copy_(weight)
