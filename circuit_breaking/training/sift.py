"""Sift the edges of a model for those worth cutting, from gradients alone (layer 3).

The gain of cutting an edge is the integral of the objective's slope between keeping and cutting. Attribution takes the
slope at the keeping end, which in a deep model is often far off: edges that it praises most ruin the model. Sifting
tries edges a few at a time in a binary mask, so that the slope at the other end is seen too, and takes the mean of
both, the trapezoid rule, exact where the objective is quadratic in the edge's weight. Each step is one backward on a
fresh batch and tells the slope of every edge at its present end; running means over steps remove the noise of single
batches, which choosing by one batch's measurement would only select.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from circuit_breaking.training.refine import Objective, differentiate

RUIN = 0.2  # share of its typical value by which the objective may rise before one of the edges cut is blamed


@dataclass
class Sift:
    """Running estimates of what cutting each edge gains.

    Attributes:
        max_edges: the budget: most edges that the mask of `best` cuts. While sifting, those tried come on top.
        allowed: bool [E], edges that may be cut; all when None.
        price: what a cut edge must win at least, in the objective's units.
        explore: edges tried at each step.
        window: steps over which slopes are averaged.
        slopes: [2, E], mean slope of the objective with the edge cut and with it kept.
        seen: [2, E], steps that each mean has seen.
    """

    max_edges: int
    allowed: Tensor | None = None
    price: float = 0.0
    explore: int = 6
    window: int = 20
    slopes: Tensor | None = None
    seen: Tensor | None = None
    typical: float | None = field(default=None)  # running mean of the objective

    def step(self, mask: Tensor, objective: Objective, budget: int | None = None) -> tuple[Tensor, float]:
        """Learn from one batch at a binary `mask` [E].

        `budget` is for the next mask, `max_edges` by default. One that grows over the steps lets each cut be judged
        in the company of those before it.

        Returns:
            the next mask to learn from; the objective at this one.
        """
        value, slope = differentiate(mask, objective)
        if self.slopes is None:
            self.slopes, self.seen = slope.new_zeros(2, len(slope)), slope.new_zeros(2, len(slope))
        ruined = self.typical is not None and value > self.typical + RUIN * abs(self.typical)
        if ruined and bool((mask == 0).any()):
            # slopes in a ruined model say nothing but which of the edges ruins it most
            worst = int(slope.masked_fill(mask == 1, float("inf")).argmin())
            self.slopes[0, worst] = torch.minimum(slope[worst], -self.slopes[1, worst].abs())
            self.seen[0, worst] = 1.0
        else:
            self.typical = value if self.typical is None else 0.9 * self.typical + 0.1 * value
            for end, here in enumerate((mask == 0, mask == 1)):
                self.seen[end] += here
                rate = here / self.seen[end].clamp(1, self.window)
                self.slopes[end] += rate * (slope - self.slopes[end])
        following = self.best(budget)
        untried = self.slopes[1].masked_fill(self.seen[0] > 0, float("-inf"))
        following[_top(self._allow(untried), self.explore, self.price)] = 0.0
        return following, value

    def gains(self) -> Tensor:
        """What cutting each edge is expected to gain [E]; -inf for those not tried or not allowed."""
        gains = self.slopes.mean(0) - self.price
        return self._allow(gains.masked_fill(self.seen[0] == 0, float("-inf")))

    def best(self, budget: int | None = None) -> Tensor:
        """The binary mask [E] that cuts the edges with the highest expected gains, at most `budget` or `max_edges`."""
        gains = self.gains()
        mask = torch.ones_like(gains)
        mask[_top(gains, self.max_edges if budget is None else budget, 0.0)] = 0.0
        return mask

    def _allow(self, scores: Tensor) -> Tensor:
        return scores if self.allowed is None else scores.masked_fill(~self.allowed, float("-inf"))

    def state(self) -> dict[str, Tensor]:
        """What the next steps depend on, as tensors."""
        if self.slopes is None:
            return {}
        return {
            "slopes": self.slopes,
            "seen": self.seen,
            "typical": torch.tensor(self.typical, dtype=torch.float64),
        }

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Go on from what `state` gave."""
        if state:
            self.slopes, self.seen = state["slopes"].to(device), state["seen"].to(device)
            self.typical = float(state["typical"])


def _top(scores: Tensor, count: int, above: float) -> Tensor:
    """Indices of the `count` highest scores, of those above a value; ties by edge order."""
    order = scores.sort(descending=True, stable=True).indices[:count]
    return order[scores[order] > above]
