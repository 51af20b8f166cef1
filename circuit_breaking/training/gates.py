"""Gates of candidates: how their weights in [0, 1] are parametrised while a mask is learned (layer 2).

And how the number of those that are masked comes down to a budget: a target that falls, and what holds it there.

Shapes: C candidates.
"""

import math

import torch
from torch import Tensor, nn

HALVINGS = 40  # of an interval, until what is sought in it is exact to float32
PENALTY_STEP = 1.1  # factor by which the penalty of what is masked moves at each step while its number falls


def falling_count(first: int, budget: int, number: int, steps: int) -> int:
    """Target at step `number` of `steps`: geometrically from `first` to `budget`, which may be more."""
    # the budget is reached for the last quarter, so that masks that can be saved are learned longest
    progress = min(1.0, number / max(1.0, 0.75 * steps))
    return round(first * (budget / first) ** progress)


def next_penalty(penalty: float, count: float, target: float) -> float:
    """The penalty goes up where more is masked than there should be, else down.

    It tells which effects are too small for the budget, which Adam, blind to their size, would not.
    """
    return penalty * (PENALTY_STEP if count > target else 1 / PENALTY_STEP)


class Clamped:
    """A weight in [0, 1] for each candidate, brought back there after every step."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.parameter = nn.Parameter(torch.ones(count, device=device))

    def sample(self) -> Tensor:
        """Weights for a forward pass: [C], differentiable in the parameter."""
        return self.parameter

    def scores(self) -> Tensor:
        """What rounding goes by: a candidate below 0.5 is to be masked, the lowest first: [C]."""
        return self.parameter

    def masked(self) -> Tensor:
        """Expected number of masked candidates."""
        return (1 - self.parameter).sum()

    @torch.no_grad()
    def settle_(self) -> None:
        """To be called after a step of the optimizer."""
        self.parameter.clamp_(0, 1)


class HardConcrete:
    """Masked or not by a stretched binary concrete variable with learned log odds (Louizos et al. 2018, eq. 10-12)."""

    temperature, low, high = 2 / 3, -0.1, 1.1
    start = -3.0  # log odds, at which the chance of a candidate to be masked at all is 0.2
    scale = 5.0  # log odds that one unit of the parameter stands for, so that both methods learn at the same rate

    def __init__(self, count: int, device: torch.device, init_cut_prob: float | None = None) -> None:
        """`init_cut_prob` is the initial probability that a gate is below 1; None: that of `start`."""
        start = self.start if init_cut_prob is None else math.log(init_cut_prob / (1 - init_cut_prob)) + self._shift()
        self.parameter = nn.Parameter(torch.full((count,), start / self.scale, device=device))

    def _shift(self) -> float:
        """Log odds at which a candidate is masked at all, be it in part, half of the time."""
        return self.temperature * math.log(-self.low / self.high)

    @property
    def log_odds(self) -> Tensor:
        """Of each candidate to be masked: [C]."""
        return self.parameter * self.scale

    def sample(self) -> Tensor:
        """As `Clamped.sample`, drawn anew at each call."""
        noise = torch.empty_like(self.parameter).uniform_(1e-6, 1 - 1e-6).logit()
        gate = torch.sigmoid((noise + self.log_odds) / self.temperature)
        return 1 - (gate * (self.high - self.low) + self.low).clamp(0, 1)

    def scores(self) -> Tensor:
        """As `Clamped.scores`: the chance not to be masked."""
        return 1 - torch.sigmoid(self.log_odds)

    def masked(self) -> Tensor:
        """Expected number of candidates that are masked at all, be it in part."""
        return torch.sigmoid(self.log_odds - self._shift()).sum()

    @torch.no_grad()
    def at_most_(self, count: float) -> float:
        """Lower all log odds alike, by the least that leaves `count` candidates, or fewer, expected to be masked.

        A projection, as that of Zhou et al. 2021 ("Effective sparsification of neural networks with global sparsity
        constraint"), there of chances. What is subtracted stands for the penalty of a candidate, found at once.

        Args:
            count: above 0.

        Returns:
            by how much they were lowered.
        """
        if count >= len(self.parameter):
            return 0.0
        odds = self.log_odds.cpu().double() - self._shift()  # not every device has float64
        # at the high end none has a chance above its share
        low = odds.new_zeros(())
        high = (odds.max() - math.log(count / (len(odds) - count))).clamp(min=0)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            enough = torch.sigmoid(odds - middle).sum() <= count
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        by = 0.0 if torch.sigmoid(odds).sum() <= count else float(high)
        self.parameter.sub_(by / self.scale)
        return by

    def settle_(self) -> None:
        """Nothing is to be done."""


METHODS = {"clamped": Clamped, "hard-concrete": HardConcrete}
