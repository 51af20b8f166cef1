"""Edges that are known already: all edges that may be cut are cut from the first step to the last.

Only ablation constants are learned, if they are. For controls (random edges), and for circuits that are known.
"""

import torch
from torch import Tensor

from circuit_breaking.training.methods.base import MaskMethod, StepResult


class GivenEdges(MaskMethod):
    """Cuts every allowed edge. Has no state."""

    def step(self, number: int) -> StepResult:
        """Update the ablation constants, if they are learned, on a new batch."""
        with torch.no_grad():
            self.weights.copy_(~self.allowed)
        objective = self.next_objective(self.config.batch_size)(self.weights.detach())
        if objective.requires_grad:
            self.backward(objective)
        return StepResult("given", float(objective.detach()), self.model.mask.n_cut())

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Nothing to restore."""
