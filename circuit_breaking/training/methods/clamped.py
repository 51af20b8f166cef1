"""Clamped weights, the method of the paper (Li, Davies, Nadeau 2023): mask weights in [0, 1] under AdamW.

relax   Weights are continuous. A penalty for each cut edge ramps up, and weights are rounded from time to time.
anneal  The forward pass sees a binary mask that cuts at most the k lowest weights; gradients pass straight through to
        all weights, so that training happens on masks that could be saved. k falls geometrically to the budget, and the
        penalty follows it.

Shapes: E edges.
"""

import torch
from torch import Tensor

from circuit_breaking.engine.mask import lowest_cut
from circuit_breaking.training.gates import next_penalty
from circuit_breaking.training.methods.base import RelaxAndAnneal

ROUND_EVERY = 50  # steps after which the relax phase rounds mask weights to 0 or 1


class ClampedWeights(RelaxAndAnneal):
    """The mask's own weights, clamped to [0, 1] after every step."""

    def setup(self) -> None:
        """Learn the weights of the mask themselves."""
        self.parameter = self.weights
        super().setup()
        self.penalty = self.config.edge_penalty  # in the anneal phase

    @torch.no_grad()
    def start_from(self, cut: Tensor) -> None:
        """Start with the weights of a mask."""
        self.weights.masked_fill_(cut, 0.0)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW without weight decay."""
        return torch.optim.AdamW([self.weights], lr=self.config.lr, weight_decay=0.0)

    def relax(self, number: int, penalty: float) -> tuple[float, int]:
        """A step with continuous weights."""
        objective = self.next_objective(self.config.batch_size)(self.weights)
        self._descend(objective + penalty * (1 - self.weights).sum())
        if (number + 1) % ROUND_EVERY == 0 and number + 1 < self.relax_steps:
            self.model.mask.round_()
        return float(objective.detach()), self.model.mask.n_cut()

    def anneal(self, number: int) -> tuple[float, int]:
        """A step with a binary mask."""
        weights = self.weights
        if number == 0:
            self.optimizer = self.make_optimizer()
        count = self.target(number, self.model.mask.n_cut())
        objective = self.next_objective(self.config.batch_size)
        binary = lowest_cut(weights.detach(), count, threshold=0.5)
        self.penalty = next_penalty(self.penalty, self.model.mask.n_cut(), count)
        value = objective(binary + (weights - weights.detach()))
        self._descend(value + self.penalty * (1 - weights).sum())
        return float(value.detach()), int((binary == 0).sum())

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        self.backward(loss)
        if self.allowed is not None:
            self.weights.grad[~self.allowed] = 0.0
        self.optimizer.step()
        self.model.mask.clamp_()

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state and the penalty."""
        return {**super().state(), "penalty": torch.tensor(self.penalty, dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Continue from what `state` returned."""
        super().restore(state, device)
        self.penalty = float(state["penalty"])
