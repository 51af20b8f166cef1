"""Gates: how the mask weights of candidates in [0, 1] are parametrised while a mask is learned.

Also how the number of masked candidates falls to a budget: a falling target, and a penalty or projection to reach it.

Shapes: C candidates.
"""

import math

import torch
from torch import Tensor, nn

HALVINGS = 40  # of an interval in a bisection, until the result is exact to float32
PENALTY_STEP = 1.1  # factor by which the penalty changes at each step of annealing


def falling_count(first: int, budget: int, number: int, steps: int) -> int:
    """Target at step `number` of `steps`: moves geometrically from `first` to `budget`, which may be the larger one."""
    # the last quarter stays at the budget, to train longest on masks that can be saved
    progress = min(1.0, number / max(1.0, 0.75 * steps))
    return round(first * (budget / first) ** progress)


def next_penalty(penalty: float, count: float, target: float) -> float:
    """The penalty rises if more candidates are masked than the target, else it falls.

    Adam normalises the size of gradients; the penalty decides which effects are too small for the budget.
    """
    return penalty * (PENALTY_STEP if count > target else 1 / PENALTY_STEP)


class Clamped:
    """A weight in [0, 1] for each candidate, clamped after every step."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.parameter = nn.Parameter(torch.ones(count, device=device))

    def sample(self) -> Tensor:
        """Weights for a forward pass: [C], differentiable in the parameter."""
        return self.parameter

    def scores(self) -> Tensor:
        """Scores for rounding: candidates below 0.5 are masked, the lowest scores first: [C]."""
        return self.parameter

    def masked(self) -> Tensor:
        """Expected number of masked candidates."""
        return (1 - self.parameter).sum()

    @torch.no_grad()
    def project_(self) -> None:
        """Clamp the weights to [0, 1]; call it after every step of the optimizer."""
        self.parameter.clamp_(0, 1)


class HardConcrete:
    """Stretched binary concrete variables with learned log odds (Louizos et al. 2018, eq. 10-12)."""

    temperature, low, high = 2 / 3, -0.1, 1.1
    start = -3.0  # default log odds at first; the probability that a gate is below 1 is then 0.2
    scale = 5.0  # log odds per unit of the parameter, so that one learning rate suits both methods

    def __init__(self, count: int, device: torch.device, init_cut_prob: float | None = None) -> None:
        """`init_cut_prob` is the initial probability that a gate is below 1; None: that of `start`."""
        start = self.start if init_cut_prob is None else math.log(init_cut_prob / (1 - init_cut_prob)) + self._shift()
        self.parameter = nn.Parameter(torch.full((count,), start / self.scale, device=device))

    def _shift(self) -> float:
        """Log odds at which a gate is below 1 with probability 1/2."""
        return self.temperature * math.log(-self.low / self.high)

    @property
    def log_odds(self) -> Tensor:
        """Log odds of each candidate to be masked: [C]."""
        return self.parameter * self.scale

    def sample(self) -> Tensor:
        """Weights for a forward pass: [C], a new sample at each call, differentiable in the parameter."""
        noise = torch.empty_like(self.parameter).uniform_(1e-6, 1 - 1e-6).logit()
        gate = torch.sigmoid((noise + self.log_odds) / self.temperature)
        return 1 - (gate * (self.high - self.low) + self.low).clamp(0, 1)

    def scores(self) -> Tensor:
        """Scores for rounding: the probability of each candidate not to be masked: [C]."""
        return 1 - torch.sigmoid(self.log_odds)

    def masked(self) -> Tensor:
        """Expected number of gates below 1."""
        return torch.sigmoid(self.log_odds - self._shift()).sum()

    @torch.no_grad()
    def at_most_(self, count: float) -> float:
        """Lower all log odds by the same amount, the smallest that makes `masked` at most `count`.

        A projection like that of Zhou et al. 2021 ("Effective sparsification of neural networks with global sparsity
        constraint"), which projects probabilities. The amount acts as the penalty per candidate.

        Args:
            count: above 0.

        Returns:
            the amount.
        """
        if count >= len(self.parameter):
            return 0.0
        odds = self.log_odds.cpu().double() - self._shift()  # not every device has float64
        # with the largest shift, no gate has a probability above count / C
        low = odds.new_zeros(())
        high = (odds.max() - math.log(count / (len(odds) - count))).clamp(min=0)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            enough = torch.sigmoid(odds - middle).sum() <= count
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        by = 0.0 if torch.sigmoid(odds).sum() <= count else float(high)
        self.parameter.sub_(by / self.scale)
        return by

    def project_(self) -> None:
        """Log odds are not bounded: nothing to project."""


METHODS = {"clamped": Clamped, "hard-concrete": HardConcrete}
