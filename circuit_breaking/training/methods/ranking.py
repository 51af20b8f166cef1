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

from circuit_breaking.training.methods.base import LearnedScores, StepResult
from circuit_breaking.training.soft_top_k import soft_top_k

FIRST_SHARE, LAST_SHARE = 0.12, 0.004  # τ log(C) at the beginning and at the end, as a share of the number of steps
BEYOND = 1.2  # K, as a multiple of the largest budget that is asked for
LAST_RATE = 0.02  # learning rate of the last step; that of the first is 1
BETAS = 0.9, 0.99  # of Adam
GOLDEN = (5**0.5 - 1) / 2


class EdgeScores(LearnedScores):
    """One score per edge that may be cut."""

    def setup(self) -> None:
        """Start with equal scores."""
        self.learn(0.0)
        self.optimizer = torch.optim.Adam([self.parameter], lr=1.0, betas=BETAS)
        self.steps = self.config.relax_steps + self.config.anneal_steps

    def step(self, number: int) -> StepResult:
        """A step at one budget, on a new batch of each task."""
        objective = self.next_objective(self.config.batch_size)
        if not len(self.candidates):  # nothing may be cut
            return StepResult("rank", float(objective(self.weights).detach()), 0)
        progress, budget = number / self.steps, self.budget(number)
        degrees = soft_top_k(self.parameter, budget, self.temperature(progress))
        value = objective(self.whole_mask(1 - degrees))
        self.optimizer.param_groups[0]["lr"] = 1 - progress * (1 - LAST_RATE)
        self.optimizer.zero_grad()
        self.backward(value)
        self.optimizer.step()
        self.cut_highest()
        return StepResult("rank", float(value.detach()), round(budget))

    def budget(self, number: int) -> float:
        """The budget of a step, in the open interval from 0 to C.

        The logarithms of the budgets are spread evenly by multiples of the golden ratio, instead of at random: every
        few steps in succession then see small and large budgets.
        """
        wanted = max(self.config.max_edges, *self.config.budgets, 1)
        most = min(BEYOND * wanted, len(self.candidates) - 0.5)
        return most ** ((number + 0.5) * GOLDEN % 1) if most > 1 else most

    def temperature(self, progress: float) -> float:
        """τ after a share `progress` of all steps."""
        share = FIRST_SHARE * (LAST_SHARE / FIRST_SHARE) ** progress
        return share * self.steps / math.log(max(len(self.candidates), 2))
