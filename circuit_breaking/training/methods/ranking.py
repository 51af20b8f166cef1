"""A ranking of the edges, learned for all budgets at once: one score per edge, and other budgets in every step.

A step takes a small and a large budget, between 1 and K. For each budget k it cuts edge e to the degree

    1 - m_e = σ((s_e - t) / τ),   with the threshold t at which the degrees add up to k

(`training.soft_top_k`). An edge with a high score is cut at every budget, one with a lower score at large budgets only;
so the scores put edges in the order in which they are worth cutting. The two budgets share the texts of the step: each
sees half of them, which costs no more than one mask that sees all. With one budget per step, Adam would follow small
and large budgets in turn, which prefer different edges, and seeds differ much more. Matryoshka representation learning
(Kusupati et al. 2022) trains for many sizes at once in the same way.

Scores are measured in units of the first learning rate, and the temperature follows from the number of steps. Before a
mask of k among C candidates is nearly binary, the scores of those k must lead the threshold by about τ log(C / k). A
step of Adam moves a score by at most one unit, so n steps are enough to lead if τ log(C) is a small share of n. The
temperature falls geometrically from one of these shares to a tenth of it, and in the last quarter of the steps, in
which masks become binary, to a sixtieth. The learning rate falls linearly.

Shapes: E edges, C edges that may be cut (candidates).
"""

import math

import torch

from circuit_breaking.training.config import keeps_predictions
from circuit_breaking.training.methods.base import LearnedScores, StepResult, shares_of
from circuit_breaking.training.soft_top_k import soft_top_k

# (share of the steps that are done, τ log(C) as a share of the number of steps); geometric in between
TEMPERATURES = (0.0, 0.12), (0.75, 0.012), (1.0, 0.002)
FIRST_WITH_LOSS = 0.35  # in place of the first share, if `keep_loss` is the task's own loss
BUDGETS = 2  # of a step
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
        self.steps = self.config.steps

    def step(self, number: int) -> StepResult:
        """A step at a few budgets, which share a new batch of each task."""
        texts = self.config.batch_size
        if not len(self.candidates):  # nothing may be cut
            return StepResult("rank", float(self.next_objective(texts)(self.weights).detach()), 0)
        progress, shares = number / self.steps, shares_of(texts, BUDGETS)
        budgets, values = self.budgets(number, len(shares)), []
        for share, budget in zip(shares, budgets, strict=True):
            degrees = soft_top_k(self.parameter, budget, self.temperature(progress))
            values.append(share / texts * self.next_objective(share)(self.whole_mask(1 - degrees)))
        value = torch.stack(values).sum()
        self.optimizer.param_groups[0]["lr"] = learning_rate(progress)
        self.optimizer.zero_grad()
        self.backward(value)
        self.optimizer.step()
        self.answer()
        return StepResult("rank", float(value.detach()), round(budgets[-1]))

    def head_start(self) -> float:
        """τ log(C) at the first temperature: such a lead makes the mask nearly binary."""
        return self.first_share() * self.steps

    def first_share(self) -> float:
        """τ log(C) at the first step, as a share of the number of steps."""
        return TEMPERATURES[0][1] if keeps_predictions(self.config) else FIRST_WITH_LOSS

    def temperature(self, progress: float) -> float:
        """τ after a share `progress` of all steps."""
        return temperature(progress, self.steps, len(self.candidates), self.first_share())

    def budgets(self, number: int, count: int) -> list[float]:
        """The budgets of a step, in the open interval from 0 to C, the smallest first."""
        wanted = max(self.config.max_edges, *self.config.budgets, 1)
        return drawn_budgets(number, count, min(BEYOND * wanted, len(self.candidates) - 0.5))


def drawn_budgets(number: int, count: int, most: float) -> list[float]:
    """`count` budgets between 1 and `most` for step `number`, the smallest first.

    The logarithms are one in each of `count` equal intervals from 0 to log(most), at the same place in each. Over the
    steps, multiples of the golden ratio spread them evenly.
    """
    place = (number + 0.5) * GOLDEN % 1
    return [most ** ((interval + place) / count) if most > 1 else most for interval in range(count)]


def temperature(progress: float, steps: int, candidates: int, first_share: float = TEMPERATURES[0][1]) -> float:
    """τ after a share `progress` of all steps; `first_share` is τ log(C) at the first, as a share of their number."""
    stages = (0.0, first_share), *TEMPERATURES[1:]
    (start, first), (end, last) = stages[:2] if progress < stages[1][0] else stages[1:]
    share = first * (last / first) ** ((progress - start) / (end - start))
    return share * steps / math.log(max(candidates, 2))


def learning_rate(progress: float) -> float:
    """The learning rate after a share `progress` of all steps."""
    return 1 - progress * (1 - LAST_RATE)
