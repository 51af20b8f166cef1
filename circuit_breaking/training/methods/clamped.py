"""Clamped weights, the method of the paper (Li, Davies, Nadeau 2023): mask weights in [0, 1] under AdamW.

relax   Weights are continuous. A penalty for each cut edge ramps up, and weights are rounded from time to time.
anneal  The forward pass sees a binary mask that cuts at most the k lowest weights; gradients pass straight through to
        all weights, so that training happens on masks that could be saved. k falls geometrically to the budget, and the
        penalty follows it. With `measure_new_cuts`, another edge is cut only if a batch measures a gain.

Shapes: E edges.
"""

import torch
from torch import Tensor

from circuit_breaking.engine.mask import lowest_cut
from circuit_breaking.training.gates import next_penalty
from circuit_breaking.training.mask_gradient import MaskFunction
from circuit_breaking.training.methods.base import RelaxAndAnneal


class ClampedWeights(RelaxAndAnneal):
    """The mask's own weights, clamped to [0, 1] after every step."""

    def setup(self) -> None:
        """Learn the weights of the mask themselves."""
        self.parameter = self.weights
        super().setup()
        self.penalty = self.config.edge_penalty  # in the anneal phase
        self.measured_mask: Tensor | None = None  # [E], of the last step of annealing with `measure_new_cuts`

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW without weight decay."""
        return torch.optim.AdamW([self.weights], lr=self.config.lr, weight_decay=0.0)

    def relax(self, number: int, penalty: float) -> tuple[float, int]:
        """A step with continuous weights."""
        config = self.config
        objective = self.next_objective(config.batch_size)(self.weights)
        self._descend(objective + penalty * (1 - self.weights).sum())
        is_rounding_step = config.round_every and (number + 1) % config.round_every == 0
        if is_rounding_step and number + 1 < config.relax_steps:
            self.model.mask.round_()
        return float(objective.detach()), self.model.mask.n_cut()

    def anneal(self, number: int) -> tuple[float, int]:
        """A step with a binary mask."""
        weights = self.weights
        if number == 0:
            self.optimizer = self.make_optimizer()
        count = self.target(number, self.model.mask.n_cut())
        objective = self.next_objective(self.config.batch_size)
        if self.config.measure_new_cuts:
            binary = self._next_measured_mask(count, objective)
        else:
            binary = lowest_cut(weights.detach(), count, threshold=0.5)
            self.penalty = next_penalty(self.penalty, self.model.mask.n_cut(), count)
        value = objective(binary + (weights - weights.detach()))
        self._descend(value + self.penalty * (1 - weights).sum())
        if self.measured_mask is not None and number + 1 == self.config.anneal_steps:
            weights.data.copy_(self.measured_mask)  # no edge is cut in the end that was not measured
        return float(value.detach()), int((binary == 0).sum())

    @torch.no_grad()
    def _next_measured_mask(self, count: int, objective: MaskFunction) -> Tensor:
        """The binary mask of this step: that of the last step, with at most one more edge cut.

        Edges whose weight has risen are restored. The edge with the lowest weight among the others is cut if the
        objective is no worse with it; if it is worse, the weight of that edge is set to 1.
        """
        weights = self.weights
        if self.measured_mask is None:  # what the relax phase found
            self.measured_mask = lowest_cut(weights, count, threshold=0.5)
            return self.measured_mask
        cut_before = weights.masked_fill(self.measured_mask == 1, torch.inf)
        binary = lowest_cut(cut_before, count, threshold=0.5)
        next_edge = weights.masked_fill(self.measured_mask == 0, torch.inf).argmin()
        cut_before[next_edge] = weights[next_edge]
        proposed = lowest_cut(cut_before, count, threshold=0.5)
        if proposed[next_edge] == 0:
            if objective(proposed) > objective(binary):
                weights[next_edge] = 1.0
            else:
                binary = proposed
        self.measured_mask = binary
        return binary

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        self.backward(loss)
        if self.allowed is not None:
            self.weights.grad[~self.allowed] = 0.0
        self.optimizer.step()
        self.model.mask.clamp_()

    def state(self) -> dict[str, Tensor]:
        """The optimizer's state, the penalty and the last measured mask."""
        kept = {} if self.measured_mask is None else {"measured_mask": self.measured_mask}
        return {**super().state(), **kept, "penalty": torch.tensor(self.penalty, dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Continue from what `state` returned."""
        super().restore(state, device)
        self.penalty = float(state["penalty"])
        self.measured_mask = state["measured_mask"].to(device) if "measured_mask" in state else None
