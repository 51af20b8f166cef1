"""Edge attribution of the objective, averaged over the batches of all steps: EAP, or integrated mask gradients.

The edges are cut whose cut is predicted to lower the objective most. `training.attribution` defines the scores.

Shapes: E edges, K points of integrated mask gradients.
"""

import torch
from torch import Tensor

from circuit_breaking.engine.mask import lowest_cut
from circuit_breaking.training.attribution import points_between
from circuit_breaking.training.mask_gradient import value_and_gradient
from circuit_breaking.training.methods.base import MaskMethod, StepResult


class Attribution(MaskMethod):
    """After every step, the mask cuts the edges with the highest scores so far."""

    def setup(self) -> None:
        """Choose the points of the line, and start with no gradients."""
        # (position, weight) on the line from all edges cut to all kept; a step takes the gradient at one of them
        steps, ones = self.config.ig_steps, torch.ones_like(self.weights)
        self.points = points_between(self.model, torch.zeros_like(ones), ones, steps) if steps else [(1.0, 1.0)]
        self.gradient_sums = torch.zeros(len(self.points), len(self.weights), device=self.weights.device)  # [K, E]
        self.n_gradients = torch.zeros(len(self.points), dtype=torch.int64)  # [K]

    def step(self, number: int) -> StepResult:
        """Add the gradient at one point of the line, on a new batch."""
        config, point = self.config, number % len(self.points)
        line = torch.full_like(self.weights, self.points[point][0])
        value, gradient = value_and_gradient(self.next_objective(config.batch_size), line)
        self.gradient_sums[point] += gradient
        self.n_gradients[point] += 1
        # an edge's score is what keeping it adds to the objective, so cutting the edge gains the score
        with torch.no_grad():
            self.weights.copy_(lowest_cut(-self.scores(), config.max_edges, threshold=0.0))
        return StepResult("attribute", float(value), self.model.mask.n_cut())

    def scores(self) -> Tensor:
        """Attribution scores of all edges that may be cut; minus infinity for the others: [E]."""
        weights = torch.tensor([weight for _, weight in self.points], dtype=torch.float64)
        weights = weights / self.n_gradients.clamp(min=1)
        scores = weights.to(self.gradient_sums) @ self.gradient_sums
        return scores if self.allowed is None else scores.masked_fill(~self.allowed, float("-inf"))

    def state(self) -> dict[str, Tensor]:
        """The sums of gradients and their counts."""
        return {"gradient_sums": self.gradient_sums, "n_gradients": self.n_gradients}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Continue from what `state` returned."""
        self.gradient_sums, self.n_gradients = state["gradient_sums"].to(device), state["n_gradients"]
