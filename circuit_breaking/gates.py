"""Gates of candidates: how their weights in [0, 1] are parametrised while a mask is learned (layer 2).

Shapes: C candidates.
"""

import math

import torch
from torch import Tensor, nn


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

    def __init__(self, count: int, device: torch.device) -> None:
        self.parameter = nn.Parameter(torch.full((count,), self.start / self.scale, device=device))

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
        return torch.sigmoid(self.log_odds - self.temperature * math.log(-self.low / self.high)).sum()

    def settle_(self) -> None:
        """Nothing is to be done."""


METHODS = {"clamped": Clamped, "hard-concrete": HardConcrete}
