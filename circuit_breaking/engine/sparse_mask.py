"""The edges in which a mask that is mostly whole differs from a whole one (layer 1)."""

from typing import Any

import torch
from torch import Tensor


class Exceptions:
    """The edges whose weight is not 1, of those between layers or into `output`, in two orders.

    `into(layer)` are those that a layer's readers read, `out_of(layer)` those that its nodes feed: each as the indices
    of reader and source and the weight less 1. `output` counts as the layer after the last.
    """

    def __init__(self, model: Any, weights: Tensor, edges: Tensor) -> None:
        graph, device = model.graph, weights.device
        readers, sources = model.edge_readers[edges], model.edge_sources[edges]
        reader_layers = readers // (graph.head_readers + 1)
        source_layers = (sources + graph.n_heads) // (graph.n_heads + 1) - 1  # -1 for `embed`
        between = source_layers < reader_layers  # not from a head to its own layer's MLP
        layers = torch.arange(graph.n_layers + 2, device=device)
        self._orders = []
        for of_edge in (reader_layers[between], source_layers[between]):
            of_edge, order = of_edge.sort(stable=True)
            chosen = edges[between][order]
            ends = torch.searchsorted(of_edge, layers).tolist()
            self._orders.append((ends, readers[between][order], sources[between][order], weights[chosen] - 1))

    def _of(self, order: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        ends, *columns = self._orders[order]
        return tuple(column[ends[layer] : ends[layer + 1]] for column in columns)

    def into(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._of(0, layer)

    def out_of(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._of(1, layer)
