"""How many of the first edges of a ranking a budget should cut.

A budget is the largest number of edges to cut. With more edges the objective is usually lower, but a single edge can
spoil a mask. So after the edges are ranked, the objective is measured on batches of training texts for prefixes of the
ranking, and each budget gets the best prefix that it allows.

Shapes: E edges.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.mask_gradient import MaskFunction
from circuit_breaking.training.methods import method_class
from circuit_breaking.training.methods.base import LearnedScores

BATCHES = 8  # batches of each task on which prefixes are measured
LENGTHS = 12  # lengths that are measured in addition to the budgets, log-evenly spaced


def choice_steps(config: MaskConfig) -> int:
    """Number of steps that measure prefixes, one for each batch."""
    learned = issubclass(method_class(config.method), LearnedScores)
    return BATCHES if learned and config.steps and config.max_edges else 0


def lengths_to_measure(config: MaskConfig, ranked: int) -> list[int]:
    """Lengths of prefixes, rising from 0: the budgets that are asked for, and some between them.

    Args:
        config: the settings. `max_edges` is among the lengths only if it is above all of `budgets`, so that masks for
            smaller budgets can share one training.
        ranked: number of ranked edges.
    """
    wanted = set(config.budgets)
    if config.max_edges > max(wanted, default=0):
        wanted.add(config.max_edges)
    most = min(max(wanted, default=0), ranked)
    spaced = {round(most ** (number / (LENGTHS - 1))) for number in range(LENGTHS)} if most else set()
    return sorted({0} | {length for length in wanted | spaced if length <= most})


class PrefixChoice:
    """Objectives of prefixes of a ranking, and the length that each budget should cut.

    Args:
        lengths: lengths of the prefixes, rising from 0.
    """

    def __init__(self, lengths: Iterable[int]) -> None:
        self.lengths = list(lengths)
        self.values = torch.empty(0, len(self.lengths), dtype=torch.float64)  # objectives, [batch, length]

    @torch.no_grad()
    def measure(self, objective: MaskFunction, order: Tensor, whole: Tensor) -> float:
        """Measure all prefixes on a batch of each task.

        Args:
            objective: the objective on the batch, as a function of the mask [E].
            order: indices of the ranked edges, the edge to cut first comes first.
            whole: a mask [E] that keeps all edges.

        Returns:
            the objective at the longest prefix.
        """
        mask, row = whole.clone(), []
        for start, stop in zip([0, *self.lengths], self.lengths, strict=False):
            mask[order[start:stop]] = 0
            row.append(float(objective(mask)))
        self.values = torch.cat([self.values, torch.tensor([row], dtype=torch.float64)])
        return row[-1]

    def length(self, budget: int) -> int:
        """Number of edges to cut, at most `budget`: the measured length with the lowest mean objective.

        A budget that is not measured is the answer itself if the next longer prefix is at least as good as all shorter
        ones, or if nothing longer was measured and the longest is the best.
        """
        if not len(self.values):
            return budget
        means = self.values.mean(0).tolist()
        within = [number for number, length in enumerate(self.lengths) if length <= budget]
        best = min(within, key=lambda number: (means[number], -number))  # of equal ones the longest
        longer = means[len(within)] if len(within) < len(means) else means[-1]
        if best == within[-1] and longer <= means[best]:
            return budget
        return self.lengths[best]

    def state(self) -> dict[str, Tensor]:
        """The objectives that were measured, for a checkpoint."""
        return {"values": self.values}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Continue from what `state` returned."""
        self.values = state["values"].clone()
