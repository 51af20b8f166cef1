"""Refinement: search over binary masks that cuts, restores or exchanges single edges by their measured effect.

First-order attribution proposes changes, and a change is taken only if a batch measures a gain. Every measurement
corrects the next prediction for its edge, because first-order estimates are biased.

Shapes: E edges.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from circuit_breaking.engine.mask import lowest
from circuit_breaking.training.mask_gradient import MaskFunction, value_and_gradient


@dataclass
class Move:
    """One change of a binary mask: the edges to flip, and the predicted gain (decrease of the objective)."""

    edges: tuple[int, ...]
    predicted: float


@dataclass
class EdgeRefiner:
    """State of the search over binary masks that cut at most `max_edges` edges.

    Attributes:
        max_edges: the budget; no mask that the search visits exceeds it.
        allowed: bool [E], the edges that may be cut; None if all may be.
        moves_per_round: most changes that are measured in a round.
        memory: weight of older gradients in their running mean, which averages out the noise of single batches.
        gradient: that running mean [E].
        correction: what to add to the first-order gain of flipping each edge [E], from earlier measurements.
    """

    max_edges: int
    allowed: Tensor | None = None
    moves_per_round: int = 8
    memory: float = 0.5
    gradient: Tensor | None = None
    correction: Tensor | None = None
    _flipped: dict[int, float] = field(default_factory=dict)  # edges flipped in the last round, and what each gained

    def state(self) -> dict[str, Tensor]:
        """Everything that the next rounds depend on, for a checkpoint."""
        if self.gradient is None:
            return {}
        return {
            "gradient": self.gradient,
            "correction": self.correction,
            "flipped": torch.tensor(list(self._flipped), dtype=torch.int64),
            "gained": torch.tensor(list(self._flipped.values()), dtype=torch.float64),
        }

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Continue from what `state` returned."""
        if state:
            self.gradient, self.correction = state["gradient"].to(device), state["correction"].to(device)
            self._flipped = dict(zip(state["flipped"].tolist(), state["gained"].tolist(), strict=True))

    def round(self, mask: Tensor, objective: MaskFunction) -> tuple[Tensor, float]:
        """Try to improve a binary `mask` [E] on one batch, one change after another.

        Returns:
            the mask, changed or not, and the objective at the mask that was given.
        """
        value, gradient = value_and_gradient(objective, mask)
        before = value = float(value)
        self._update(mask, gradient)
        start = mask
        for move in self._moves(mask)[: self.moves_per_round]:
            flipped = list(move.edges)
            candidate = mask.clone()
            candidate[flipped] = 1 - candidate[flipped]
            if not torch.equal(mask[flipped], start[flipped]) or int((candidate == 0).sum()) > self.max_edges:
                continue  # an earlier change of this round already flipped one of these edges or used the budget
            with torch.no_grad():
                after = float(objective(candidate))
            gain = value - after
            for edge in flipped:
                self.correction[edge] += (gain - move.predicted) / len(flipped)
            if gain > 0:
                mask, value = candidate, after
                self._flipped |= {edge: gain / len(flipped) for edge in flipped}
        return mask, before

    def _update(self, mask: Tensor, gradient: Tensor) -> None:
        """Update the running mean with the gradient at the mask, and the corrections of edges that were flipped."""
        old = self.gradient
        self.gradient = gradient if old is None else self.memory * old + (1 - self.memory) * gradient
        if self.correction is None:
            self.correction = torch.zeros_like(gradient)
        # flipping an edge back would lose what its flip gained
        for edge, gain in self._flipped.items():
            self.correction[edge] = -gain - float(self.gradient[edge] * (2 * mask[edge] - 1))
        self._flipped.clear()

    def _gains(self, mask: Tensor) -> Tensor:
        """Predicted gain of flipping each edge, [E]; -inf for edges that may not be cut."""
        # cutting an edge gains F(1) - F(0); the gradient at either end is its first-order estimate
        gains = self.gradient * (2 * mask - 1) + self.correction
        return gains if self.allowed is None else gains.masked_fill(~self.allowed & (mask == 1), float("-inf"))

    def _moves(self, mask: Tensor) -> list[Move]:
        """Single cuts, single restorations and exchanges, the highest predicted gain first."""
        gains = self._gains(mask)
        cut = (mask == 0).nonzero()[:, 0].tolist()
        restore = sorted(((float(gains[edge]), edge) for edge in cut), reverse=True)
        kept_gains = gains.masked_fill(mask == 0, float("-inf"))
        best = lowest(-kept_gains, self.moves_per_round)
        add = [(g, edge) for g, edge in zip(kept_gains[best].tolist(), best.tolist(), strict=True) if g > 0]
        moves = [Move((edge,), gain) for gain, edge in restore if gain > 0]
        if len(cut) < self.max_edges:
            moves += [Move((edge,), gain) for gain, edge in add]
        else:
            moves += [Move((e, out), g + h) for g, e in add for h, out in restore[:3] if g + h > 0]
        return sorted(moves, key=lambda move: -move.predicted)
