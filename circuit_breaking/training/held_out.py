"""Held-out losses while a mask is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from circuit_breaking.engine.mask import lowest_cut
from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.errors import UserError
from circuit_breaking.tasks.base import Task


@dataclass(frozen=True)
class HeldOut:
    """What is measured, how often, and on how many texts.

    Attributes:
        tasks: tasks by name, of which the held-out loss is measured; none: nothing is.
        every: steps between measurements. The last step is measured too.
        texts: most held-out texts of each task; None for all.
    """

    tasks: Mapping[str, Task]
    every: int = 50
    texts: int | None = None

    def __post_init__(self) -> None:
        if self.tasks and self.every < 1:
            raise UserError(f"eval_every is {self.every}; give 1 or more steps.")

    @torch.no_grad()
    def row(self, model: EdgeMaskedTransformer, max_edges: int, number: int, total: int) -> dict[str, Any]:
        """`held_out`, the losses by task at the binary mask that would be saved after step `number` of `total`; empty
        if none is due. The model's mask is left as it was."""
        if not self.tasks or ((number + 1) % self.every and number + 1 < total):
            return {}
        weights = model.mask.weights
        before = weights.detach().clone()
        weights.copy_(lowest_cut(before, max_edges, threshold=0.5))
        try:
            return {"held_out": {name: task.get_test_loss(model, self.texts) for name, task in self.tasks.items()}}
        finally:
            weights.copy_(before)
