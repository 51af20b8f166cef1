"""The causal graph of a transformer: nodes, edges, their names, order and counts (layer 0).

Nodes in order: `embed`; for each layer its heads `a{layer}.{head}` and its MLP `m{layer}`; `output`. An edge
`source->target` runs from every node to every later reader. With `split_qkv` a head reads three times, as
`a{layer}.{head}.q`, `.k` and `.v`, so that the same source can be cut from its keys alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from circuit_breaking.errors import UserError

QKV = ("q", "k", "v")


class Edge(str):
    """The name of an edge, `"a0.3->m5"`, which is a plain string that also knows its two ends."""

    __slots__ = ()

    @property
    def source(self) -> str:
        """Name of the node that writes."""
        return self.partition("->")[0]

    @property
    def target(self) -> str:
        """Name of the reader."""
        return self.partition("->")[2]


def node_of(reader: str) -> str:
    """The node that a reader belongs to: `"a3.7"` for `"a3.7.q"`, all others are nodes themselves."""
    node, _, part = reader.rpartition(".")
    return node if part in QKV else reader


class LayerSlice(NamedTuple):
    """Where the edges of one layer lie in the flat order: a block [n_readers, n_earlier_nodes], then the edges from the
    layer's own heads into its MLP."""

    n_readers: int  # rows of the block: the readers of the heads, then the MLP
    n_earlier_nodes: int  # columns of the block: nodes of earlier layers, which every reader of this layer reads
    n_same_layer_edges: int  # edges from the layer's own heads into its MLP; 0 where both run in parallel
    first_reader: int  # index of the first row among all readers


@dataclass(frozen=True)
class EdgeGraph:
    """Nodes and edges of a transformer with `n_layers` layers of `n_heads` heads.

    `parallel=True` is the GPT-NeoX layer, whose attention and MLP read the same residual stream, so that an MLP
    does not read its own layer's heads. `len(graph)` is the number of edges.
    """

    n_layers: int = 12
    n_heads: int = 12
    split_qkv: bool = False
    parallel: bool = False

    def __post_init__(self) -> None:
        if self.n_layers < 0 or self.n_heads < 1:
            raise ValueError(f"a graph of {self.n_layers} layers with {self.n_heads} heads is not possible")

    @property
    def head_readers(self) -> int:
        """Readers that the heads of one layer have between them."""
        return self.n_heads * (3 if self.split_qkv else 1)

    @cached_property
    def sources(self) -> list[str]:
        """Names of the nodes that write, in order: everything but `output`."""
        names = ["embed"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.{head}" for head in range(self.n_heads)] + [f"m{layer}"]
        return names

    @cached_property
    def readers(self) -> list[str]:
        """Names of the nodes that read, in order."""
        names = []
        for layer in range(self.n_layers):
            for head in range(self.n_heads):
                names += [f"a{layer}.{head}.{part}" for part in QKV] if self.split_qkv else [f"a{layer}.{head}"]
            names.append(f"m{layer}")
        return [*names, "output"]

    @cached_property
    def layers(self) -> list[LayerSlice]:
        """Where each layer's edges lie; the edges into `output` are the last `len(sources)`."""
        slices = []
        rows, own = self.head_readers + 1, 0 if self.parallel else self.n_heads
        for layer in range(self.n_layers):
            sources = 1 + layer * (self.n_heads + 1)
            slices.append(LayerSlice(rows, sources, own, layer * rows))
        return slices

    @cached_property
    def _ends(self) -> tuple[Tensor, Tensor]:
        readers, sources = [], []
        for part in self.layers:
            readers.append(
                torch.arange(part.first_reader, part.first_reader + part.n_readers).repeat_interleave(
                    part.n_earlier_nodes
                )
            )
            sources.append(torch.arange(part.n_earlier_nodes).repeat(part.n_readers))
            readers.append(torch.full((part.n_same_layer_edges,), part.first_reader + part.n_readers - 1))
            sources.append(torch.arange(part.n_earlier_nodes, part.n_earlier_nodes + part.n_same_layer_edges))
        readers.append(torch.full((len(self.sources),), len(self.readers) - 1))
        sources.append(torch.arange(len(self.sources)))
        return torch.cat(readers), torch.cat(sources)

    @property
    def edge_readers(self) -> Tensor:
        """Index into `readers` of each edge's target: int64 [n_edges]."""
        return self._ends[0]

    @property
    def edge_sources(self) -> Tensor:
        """Index into `sources` of each edge's source: int64 [n_edges]."""
        return self._ends[1]

    @cached_property
    def edges(self) -> list[Edge]:
        """All edges, reader by reader in forward order, each reader's sources in order."""
        readers, sources = self._ends
        return [
            Edge(f"{self.sources[source]}->{self.readers[reader]}")
            for reader, source in zip(readers.tolist(), sources.tolist(), strict=True)
        ]

    @cached_property
    def _index(self) -> dict[str, int]:
        return {edge: number for number, edge in enumerate(self.edges)}

    def index(self, edge: str) -> int:
        """Position of an edge in the flat order. Raises `UserError` for an edge that this graph lacks."""
        try:
            return self._index[edge]
        except KeyError:
            raise UserError(f"there is no edge {str(edge)!r} in {self}; {self._why_not(str(edge))}") from None

    def _why_not(self, edge: str) -> str:
        source, arrow, target = edge.partition("->")
        if not arrow:
            return "an edge is written like 'a0.3->m1'."
        if source not in self.sources:
            return f"{source!r} is no node that writes (those are embed, a<layer>.<head>, m<layer>)."
        if target not in self.readers:
            part = "a<layer>.<head>.<q|k|v>" if self.split_qkv else "a<layer>.<head>"
            return f"{target!r} is no reader (those are {part}, m<layer>, output)."
        return f"{target} does not come after {source}."

    def __contains__(self, edge: object) -> bool:
        return edge in self._index

    def __len__(self) -> int:
        return len(self._ends[0])

    def __str__(self) -> str:
        kind = ", query, key and value apart" if self.split_qkv else ""
        return f"a graph of {self.n_layers} layers x {self.n_heads} heads{kind} ({len(self):,} edges)"


def describe(graph: EdgeGraph) -> dict[str, Any]:
    """What a mask's file says of the graph it belongs to."""
    return {
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads,
        "split_qkv": graph.split_qkv,
        "parallel": graph.parallel,
        "n_edges": len(graph),
    }


def from_description(described: Mapping[str, Any]) -> EdgeGraph:
    """The graph that `describe` described. It is small until its edges are asked for.

    Raises:
        ValueError: this describes no graph, or one whose shape and number of edges do not agree.
    """
    shape = {key: value for key, value in described.items() if key != "n_edges"}
    types = {"n_layers": int, "n_heads": int, "split_qkv": bool, "parallel": bool}
    if shape.keys() != types.keys() or any(type(shape[key]) is not kind for key, kind in types.items()):
        raise ValueError(f"{dict(described)} describes no graph")
    graph = EdgeGraph(**shape)
    layers, nodes = graph.n_layers, graph.n_heads + 1
    own = 0 if graph.parallel else layers * graph.n_heads
    # without the edges themselves: a damaged file may name sizes that no memory holds
    count = (graph.head_readers + 1) * (layers + nodes * layers * (layers - 1) // 2) + own + 1 + layers * nodes
    if described.get("n_edges") != count:
        raise ValueError(f"a graph of {layers} layers x {graph.n_heads} heads has {count:,} edges")
    return graph
