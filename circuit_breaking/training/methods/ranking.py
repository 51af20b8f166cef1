"""A ranking of the edges, learned for all budgets at once: one score per edge, and a random budget in every step.

Step n draws a budget k, log-uniform between 1 and K, and cuts edge e to the degree

    1 - m_e = σ((s_e - t) / τ),   with the threshold t at which the degrees add up to k

(`training.soft_top_k`). An edge with a high score is cut at every budget, one with a lower score at large budgets only;
so the scores put edges in the order in which they are worth cutting. Matryoshka representation learning (Kusupati et
al. 2022) trains for many sizes at once in the same way.

Scores are measured in units of the first learning rate, and the temperature follows from the number of steps. Before a
mask of k among C candidates is nearly binary, the scores of those k must lead the threshold by about τ log(C / k). A
step of Adam moves a score by at most one unit, so n steps are enough to lead if τ log(C) is a small share of n. The
temperature falls geometrically between two of these shares, and the learning rate falls linearly.

Shapes: E edges, C edges that may be cut (candidates).
"""

import math

import torch
from torch import Tensor

from circuit_breaking.engine.mask import lowest_cut
from circuit_breaking.runs.checkpoints import optimizer_state, part_of, restore_optimizer
from circuit_breaking.training.methods.base import MaskMethod, StepResult
from circuit_breaking.training.soft_top_k import soft_top_k

FIRST_SHARE, LAST_SHARE = 0.12, 0.004  # τ log(C) at the beginning and at the end, as a share of the number of steps
LAST_RATE = 0.02  # learning rate of the last step; that of the first is 1
BETAS = 0.9, 0.99  # of Adam
GOLDEN = (5**0.5 - 1) / 2


class EdgeScores(MaskMethod):
    """One score per edge that may be cut. The mask cuts the `max_edges` edges with the highest scores."""

    def setup(self) -> None:
        """Start with equal scores."""
        every = torch.ones_like(self.weights, dtype=torch.bool)
        self.candidates = (every if self.allowed is None else self.allowed).nonzero()[:, 0]  # [C]
        self.parameter = torch.zeros_like(self.weights[self.candidates]).requires_grad_()
        self.optimizer = torch.optim.Adam([self.parameter], lr=1.0, betas=BETAS)
        self.steps = self.config.relax_steps + self.config.anneal_steps

    def step(self, number: int) -> StepResult:
        """A step at one budget, on a new batch of each task."""
        objective = self.next_objective(self.config.batch_size)
        if not len(self.candidates):  # nothing may be cut
            return StepResult("rank", float(objective(self.weights).detach()), 0)
        progress, budget = number / self.steps, self.budget(number)
        degrees = soft_top_k(self.parameter, budget, self.temperature(progress))
        value = objective(torch.ones_like(self.weights).index_put((self.candidates,), 1 - degrees))
        self.optimizer.param_groups[0]["lr"] = 1 - progress * (1 - LAST_RATE)
        self.optimizer.zero_grad()
        self.backward(value)
        self.optimizer.step()
        with torch.no_grad():
            self.weights.copy_(lowest_cut(-self.scores(), self.config.max_edges))
        return StepResult("rank", float(value.detach()), round(budget))

    def budget(self, number: int) -> float:
        """The budget of a step, in the open interval from 0 to C.

        The logarithms of the budgets are spread evenly by multiples of the golden ratio, instead of at random: every
        few steps in succession then see small and large budgets.
        """
        most = min(max(4 * self.config.max_edges, 60), len(self.candidates) - 0.5)
        return most ** ((number + 0.5) * GOLDEN % 1) if most > 1 else most

    def temperature(self, progress: float) -> float:
        """τ after a share `progress` of all steps."""
        share = FIRST_SHARE * (LAST_SHARE / FIRST_SHARE) ** progress
        return share * self.steps / math.log(max(len(self.candidates), 2))

    def scores(self) -> Tensor:
        """The scores of all edges [E]; minus infinity for edges that may not be cut."""
        lowest = torch.full_like(self.weights, float("-inf"))
        return lowest.index_put_((self.candidates,), self.parameter.detach())

    def state(self) -> dict[str, Tensor]:
        """The scores and the state of their optimizer."""
        kept = optimizer_state(self.optimizer, self.parameter)
        return {"parameter": self.parameter.detach(), **{f"optimizer.{name}": value for name, value in kept.items()}}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Continue from what `state` returned."""
        with torch.no_grad():
            self.parameter.copy_(state["parameter"])
        restore_optimizer(self.optimizer, self.parameter, part_of(state, "optimizer"))
