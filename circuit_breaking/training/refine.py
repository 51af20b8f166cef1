"""Search over binary masks by measured effects: cut, restore or exchange single edges (layer 3).

First-order attribution names candidates, and only a measured gain is taken. What lies between the two is learned: every
measurement corrects the next prediction for its edge.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# objective(mask [E]) -> scalar to be minimised, differentiable in the mask
Objective = Callable[[Tensor], Tensor]


@dataclass
class Move:
    """One change of a binary mask: the edges to flip, and the gain (drop of the objective) that is expected of it."""

    edges: tuple[int, ...]
    predicted: float


@dataclass
class EdgeRefiner:
    """State of the search over binary masks that cut at most `max_edges`.

    Attributes:
        max_edges: the budget; no mask that is visited exceeds it.
        allowed: bool [E], edges that may be cut; all when None.
        min_gain: what a cut edge must win at least, in the objective's units.
        moves_per_round: most changes that are measured in a round.
        memory: weight of older gradients in their running mean, which evens out the noise of one batch.
        gradient: that running mean [E].
        correction: what to add to the first-order gain of flipping each edge [E], from what was measured before.
    """

    max_edges: int
    allowed: Tensor | None = None
    min_gain: float = 0.0
    moves_per_round: int = 8
    memory: float = 0.5
    gradient: Tensor | None = None
    correction: Tensor | None = None
    _flipped: dict[int, float] = field(default_factory=dict)  # gain that each edge's last accepted flip is owed

    def state(self) -> dict[str, Tensor]:
        """What the next rounds depend on, as tensors."""
        if self.gradient is None:
            return {}
        return {
            "gradient": self.gradient,
            "correction": self.correction,
            "flipped": torch.tensor(list(self._flipped), dtype=torch.int64),
            "owed": torch.tensor(list(self._flipped.values()), dtype=torch.float64),
        }

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Go on from what `state` gave."""
        if state:
            self.gradient, self.correction = state["gradient"].to(device), state["correction"].to(device)
            self._flipped = dict(zip(state["flipped"].tolist(), state["owed"].tolist(), strict=True))

    def round(self, mask: Tensor, objective: Objective) -> tuple[Tensor, float]:
        """Try to improve a binary `mask` [E] on one batch, change by change.

        Returns:
            the mask, changed or not; the objective of the mask that was given.
        """
        before, gradient = differentiate(mask, objective)
        self._remember(mask, gradient)
        start, value = mask, before
        for move in self._moves(mask)[: self.moves_per_round]:
            at = list(move.edges)
            candidate = mask.clone()
            candidate[at] = 1 - candidate[at]
            if not torch.equal(mask[at], start[at]) or int((candidate == 0).sum()) > self.max_edges:
                continue  # an earlier change of this round has overtaken it
            with torch.no_grad():
                after = float(objective(candidate))
            gain = value - after - self.min_gain * int((mask - candidate).sum())
            for edge in at:
                self.correction[edge] += (gain - move.predicted) / len(at)
            if gain > 0:
                mask, value = candidate, after
                self._flipped |= {edge: gain / len(at) for edge in at}
        return mask, before

    def _remember(self, mask: Tensor, gradient: Tensor) -> None:
        """Take the gradient at the mask into the running mean."""
        old = self.gradient
        self.gradient = gradient if old is None else self.memory * old + (1 - self.memory) * gradient
        if self.correction is None:
            self.correction = torch.zeros_like(gradient)
        # flipping an edge back would lose what its flip gained
        for edge, gain in self._flipped.items():
            self.correction[edge] = -gain - float((self.gradient[edge] - self.min_gain) * (2 * mask[edge] - 1))
        self._flipped.clear()

    def _gains(self, mask: Tensor) -> Tensor:
        """What flipping each edge is expected to gain, [E]; -inf where it may not be."""
        # a cut gains F(1) - F(0), for which the gradient at either end is the first-order estimate
        gains = (self.gradient - self.min_gain) * (2 * mask - 1) + self.correction
        return gains if self.allowed is None else gains.masked_fill(~self.allowed & (mask == 1), float("-inf"))

    def _moves(self, mask: Tensor) -> list[Move]:
        """Single cuts, single restorations and exchanges, the most promising first."""
        gains = self._gains(mask)
        cut = (mask == 0).nonzero()[:, 0].tolist()
        restore = sorted(((float(gains[edge]), edge) for edge in cut), reverse=True)
        top = gains.masked_fill(mask == 0, float("-inf")).topk(min(self.moves_per_round, len(gains)))
        add = [(g, edge) for g, edge in zip(top.values.tolist(), top.indices.tolist(), strict=True) if g > 0]
        moves = [Move((edge,), gain) for gain, edge in restore if gain > 0]
        if len(cut) < self.max_edges:
            moves += [Move((edge,), gain) for gain, edge in add]
        else:
            moves += [Move((e, out), g + h) for g, e in add for h, out in restore[:3] if g + h > 0]
        return sorted(moves, key=lambda move: -move.predicted)


def differentiate(mask: Tensor, objective: Objective) -> tuple[float, Tensor]:
    """The objective at a mask [E] and its gradient [E]."""
    weights = mask.detach().clone().requires_grad_()
    value = objective(weights)
    (gradient,) = torch.autograd.grad(value, weights)
    return float(value.detach()), gradient
