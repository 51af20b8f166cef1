"""What masks have in common, computed once: the layers before the first edge in which they differ (layer 1).

A search measures many masks on the same batches, each a few edges away from one. Kept are the outputs of all nodes of
every batch, which costs the memory of a stack each.

Shapes: P sources, N tokens, D width, E edges.
"""

from torch import Tensor

from circuit_breaking.graph import EdgeGraph


class Beginnings:
    """Node outputs of batches, each under the mask that was first seen with it."""

    def __init__(self) -> None:
        self._kept: dict[tuple, tuple[Tensor, Tensor, Tensor]] = {}

    @staticmethod
    def _key(tokens: Tensor) -> tuple:
        """Tells a batch, as long as it is kept here and so nothing else has its memory."""
        return tokens.data_ptr(), tokens.shape, tokens.stride()

    def keep(self, tokens: Tensor, weights: Tensor, rows: Tensor) -> None:
        """Keep the outputs [P, N * D] of a batch's nodes under a mask [E], if none are kept of this batch."""
        if self._key(tokens) not in self._kept:
            self._kept[self._key(tokens)] = tokens, weights.clone(), rows.clone()

    def load(self, tokens: Tensor, weights: Tensor, graph: EdgeGraph, readers: Tensor, rows: Tensor) -> int:
        """Set the outputs of the nodes that a mask [E] leaves as they were; the first layer that is still to do."""
        if self._key(tokens) not in self._kept:
            return 0
        _, kept, outputs = self._kept[self._key(tokens)]
        differing = readers[(weights != kept).nonzero()[:, 0]]
        layer = int(differing.min()) // (graph.head_readers + 1) if len(differing) else graph.n_layers
        known = graph.layers[layer].sources if layer < graph.n_layers else len(rows)
        rows[:known] = outputs[:known]
        return layer
