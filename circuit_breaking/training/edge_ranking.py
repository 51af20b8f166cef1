"""Edges in the order in which they are worth cutting: one result for every budget.

Shapes: E edges.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from circuit_breaking.errors import UserError
from circuit_breaking.graph import Edge, EdgeGraph


@dataclass(frozen=True)
class EdgeRanking:
    """The edges that may be cut, in the order in which they are worth cutting.

    Attributes:
        graph: the graph of the edges.
        order: indices of the edges, int64 [number of ranked edges] on the CPU: the edge to cut first comes first.
        scores: their scores, in the same order, so they never rise.
    """

    graph: EdgeGraph
    order: Tensor
    scores: Tensor

    @classmethod
    def of_scores(cls, graph: EdgeGraph, scores: Tensor) -> "EdgeRanking":
        """The ranking by scores [E]; edges with a score of minus infinity are left out.

        Equal scores stay in the order of the graph.
        """
        scores = scores.detach().cpu()
        order = scores.sort(descending=True, stable=True).indices
        order = order[scores[order] > float("-inf")]
        return cls(graph, order, scores[order])

    def __len__(self) -> int:
        return len(self.order)

    @property
    def edges(self) -> list[Edge]:
        """The ranked edges, the one to cut first at the beginning."""
        return [self.graph.edges[index] for index in self.order.tolist()]

    def mask(self, count: int) -> Tensor:
        """A binary mask [E], on the CPU, that cuts the first `count` edges.

        Raises:
            UserError: `count` is negative, or more edges than are ranked.
        """
        if not 0 <= count <= len(self):
            raise UserError(f"{count} edges cannot be cut: the ranking holds {len(self):,}. Give 0 to {len(self):,}.")
        mask = torch.ones(len(self.graph))
        mask[self.order[:count]] = 0.0
        return mask
