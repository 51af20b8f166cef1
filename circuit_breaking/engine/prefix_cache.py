"""What masks have in common, computed once: the layers before the first edge in which they differ (layer 1).

A search measures many masks on the same batches, each a few edges away from one. Kept are the outputs of all nodes of
every batch, which costs the memory of a stack each.

Shapes: P sources, B batch, T position, N = B * T tokens, D width, E edges.
"""

import torch
from torch import Tensor

from circuit_breaking.graph import EdgeGraph


class Beginnings:
    """Node outputs of batches, each under the mask that was first seen with it."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # tokens, mask, node outputs

    def _find(self, tokens: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mask and node outputs that are kept of a batch. It is told by its tokens, as each use may have a copy."""
        return next((rest for batch, *rest in self._kept if torch.equal(batch, tokens)), None)

    def keep(self, tokens: Tensor, weights: Tensor, rows: Tensor) -> None:
        """Keep the outputs [P, N * D] of the nodes under a mask [E] of a batch [B, T], if none are kept of it."""
        if self._find(tokens) is None:
            self._kept.append((tokens, weights.clone(), rows.clone()))

    def load(self, tokens: Tensor, weights: Tensor, graph: EdgeGraph, readers: Tensor, rows: Tensor) -> int:
        """Set the outputs of the nodes that a mask [E] leaves as they were; the first layer that is still to do."""
        found = self._find(tokens)
        if found is None:
            return 0
        kept, outputs = found
        differing = readers[(weights != kept).nonzero()[:, 0]]
        layer = int(differing.min()) // (graph.head_readers + 1) if len(differing) else graph.n_layers
        known = graph.layers[layer].sources if layer < graph.n_layers else len(rows)
        rows[:known] = outputs[:known]
        return layer
