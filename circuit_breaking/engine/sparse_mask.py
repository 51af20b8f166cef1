"""A mask that is mostly ones, as the list of the edges whose weight differs from 1.

Shapes: E edges of the graph, X edges that differ, R readers, P nodes that write.
"""

import torch
from torch import Tensor

from circuit_breaking.graph import EdgeGraph


class SparseMask:
    """The edges whose weight is not 1, sorted once by the layer of their reader and once by that of their source.

    Edges from a head to the MLP of its own layer are left out: the pass adds those by themselves. `output` counts as
    the layer after the last, `embed` as the layer before the first.

    Args:
        graph: the graph.
        edge_readers, edge_sources: index of each edge's reader and source, int64 [E].
        weights: mask weights [E].
        edges: indices of the edges that differ from 1, int64 [X].
    """

    def __init__(
        self, graph: EdgeGraph, edge_readers: Tensor, edge_sources: Tensor, weights: Tensor, edges: Tensor
    ) -> None:
        readers, sources = edge_readers[edges], edge_sources[edges]
        reader_layers = readers // (graph.head_readers + 1)
        source_layers = (sources + graph.n_heads) // (graph.n_heads + 1) - 1  # -1 for `embed`
        between = source_layers < reader_layers  # not from a head to the MLP of its own layer
        layers = torch.arange(graph.n_layers + 2, device=weights.device)
        self._orders = []
        for layer_of_edge in (reader_layers[between], source_layers[between]):
            layer_of_edge, order = layer_of_edge.sort(stable=True)
            chosen = edges[between][order]
            ends = torch.searchsorted(layer_of_edge, layers).tolist()
            self._orders.append((ends, readers[between][order], sources[between][order], weights[chosen] - 1))

    def edges_into(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Reader, source and weight minus 1 of the edges that end in a layer: [x] each."""
        return self._slice(0, layer)

    def edges_out_of(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same of the edges that start in a layer."""
        return self._slice(1, layer)

    def _slice(self, order: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        ends, *columns = self._orders[order]
        return tuple(column[ends[layer] : ends[layer + 1]] for column in columns)
