"""A cache of node outputs, for many masks that are measured on the same few batches.

Refinement measures masks that differ in one or two edges. The layers before the first differing edge compute the same
for all of them, so their node outputs are loaded from here. Each batch costs the memory of one stack of node outputs.

Shapes: P nodes that write, B batch, T position, N = B * T tokens, D width, E edges.
"""

import torch
from torch import Tensor

from circuit_breaking.graph import EdgeGraph


class PrefixCache:
    """Node outputs of batches, each under the first mask that was used with it."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # tokens, mask, node outputs

    def _find(self, tokens: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mask and node outputs stored for a batch, which is recognised by its tokens: each use may bring a copy."""
        return next((rest for batch, *rest in self._kept if torch.equal(batch, tokens)), None)

    def store(self, tokens: Tensor, mask: Tensor, node_outputs: Tensor) -> None:
        """Store the node outputs [P, N * D] of a batch [B, T] under a mask [E], unless the batch is stored already."""
        if self._find(tokens) is None:
            self._kept.append((tokens, mask.clone(), node_outputs.clone()))

    def load(self, tokens: Tensor, mask: Tensor, graph: EdgeGraph, edge_readers: Tensor, node_outputs: Tensor) -> int:
        """Copy the outputs that this mask leaves unchanged into `node_outputs`.

        Returns:
            The first layer that has to be computed, 0 if the batch is not stored.
        """
        found = self._find(tokens)
        if found is None:
            return 0
        stored_mask, stored_outputs = found
        differing = edge_readers[(mask != stored_mask).nonzero()[:, 0]]
        layer = int(differing.min()) // (graph.head_readers + 1) if len(differing) else graph.n_layers
        known = graph.layers[layer].n_earlier_nodes if layer < graph.n_layers else len(node_outputs)
        node_outputs[:known] = stored_outputs[:known]
        return layer
