"""Refine a binary mask by measured effects: cut, restore or exchange one edge at a time (layer 3).

First-order attribution names candidates, a forward pass measures them, and only a measured gain is taken. Candidates
are tried in the order of their predicted gain, each edge's prediction discounted by how far its last one was off, and
the first whose measured gain no later prediction exceeds is taken (lazy greedy, as in CELF; Leskovec et al. 2007).
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
class MeasuredSearch:
    """State of the search over binary masks that cut at most `max_edges`.

    Attributes:
        max_edges: the budget; no mask that is visited exceeds it.
        allowed: bool [E], edges that may be cut; all when None.
        price: what a cut edge must win at least, in the objective's units.
        tries: most candidates that are measured in a round.
        memory: weight of older gradients in their running mean, which evens out the noise of one batch.
    """

    max_edges: int
    allowed: Tensor | None = None
    price: float = 0.0
    tries: int = 8
    memory: float = 0.5
    trust: dict[int, float] = field(default_factory=dict)
    gradient: Tensor | None = None

    def round(self, mask: Tensor, objective: Objective) -> tuple[Tensor, float]:
        """Try to improve a binary `mask` [E] on one batch.

        Returns:
            the mask, changed or not; the objective of the mask that was given.
        """
        weights = mask.clone().requires_grad_()
        value = objective(weights)
        (gradient,) = torch.autograd.grad(value, weights)
        before = float(value.detach())
        # a cut gains F(1) - F(0), for which the gradient at either end is the first-order estimate
        old = self.gradient
        self.gradient = gradient if old is None else self.memory * old + (1 - self.memory) * gradient
        best, best_gain = mask, 0.0
        for move in self._moves(mask)[: self.tries]:
            if best_gain >= move.predicted:
                break
            candidate = mask.clone()
            at = list(move.edges)
            candidate[at] = 1 - candidate[at]
            with torch.no_grad():
                gain = before - float(objective(candidate)) - self.price * int((mask - candidate).sum())
            self._learn(move, gain)
            if gain > best_gain:
                best, best_gain = candidate, gain
        return best, before

    def _discount(self, edge: int, gain: float) -> float:
        return gain * self.trust.get(edge, 1.0) if gain > 0 else gain

    def _learn(self, move: Move, gain: float) -> None:
        """Remember how much of the prediction came true, forgetting slowly: what is no use now may be later."""
        ratio = min(max(gain / move.predicted, 0.0), 2.0) if move.predicted > 0 else 1.0
        for edge in move.edges:
            self.trust[edge] = max(self.trust.get(edge, 1.0) * max(ratio, 0.1), 1e-3)

    def _moves(self, mask: Tensor) -> list[Move]:
        """Single cuts, single restorations and exchanges, the most promising first."""
        gains = self.gradient * (2 * mask - 1)  # of flipping each edge
        gains = gains - self.price * (2 * mask - 1)
        if self.allowed is not None:
            gains = gains.masked_fill(~self.allowed & (mask == 1), float("-inf"))
        count = 4 * self.tries
        cut = (mask == 0).nonzero()[:, 0].tolist()
        restore = sorted(((self._discount(e, float(gains[e])), e) for e in cut), reverse=True)
        top = gains.masked_fill(mask == 0, float("-inf")).topk(min(count, len(gains))).indices.tolist()
        add = sorted(((self._discount(e, float(gains[e])), e) for e in top if gains[e] > 0), reverse=True)
        moves = [Move((e,), g) for g, e in restore if g > 0]
        if len(cut) < self.max_edges:
            moves += [Move((e,), g) for g, e in add]
        else:
            moves += [Move((e, out), g + h) for g, e in add[: self.tries] for h, out in restore[:3] if g + h > 0]
        return sorted(moves, key=lambda move: -move.predicted)
