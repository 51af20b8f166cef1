"""The causal graph of a transformer: nodes, edges, their names, order and counts.

The nodes are, in order: the embedding `embed`; for each layer its heads `a{layer}.{head}` and its MLP `m{layer}`; and
`output`, which computes the logits. An edge `source->target` leads from each node to each later reader of the residual
stream. With `split_qkv`, the query, key and value of a head are three readers, `a{layer}.{head}.q`, `.k` and `.v`, so
that a source can be cut from a head's keys and still reach its queries and values.
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
    """The name of an edge, such as `"a0.3->m5"`: a string with the names of its two ends as properties."""

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
    """The node that a reader belongs to: `"a3.7"` for `"a3.7.q"`. Other readers are nodes themselves."""
    node, _, part = reader.rpartition(".")
    return node if part in QKV else reader


class LayerSlice(NamedTuple):
    """Where the edges into one layer are in the order of `EdgeGraph.edges`.

    First comes a matrix [n_readers, n_earlier_nodes], row by row, then the edges from the layer's heads to its MLP.
    """

    n_readers: int  # rows of the matrix: the readers of the heads, then the MLP
    n_earlier_nodes: int  # columns of the matrix: nodes of earlier layers, which every reader of this layer reads
    n_same_layer_edges: int  # edges from the layer's heads to its MLP; 0 if attention and MLP run in parallel
    first_reader: int  # index of the layer's first reader in `EdgeGraph.readers`


@dataclass(frozen=True)
class EdgeGraph:
    """Nodes and edges of a transformer. `len(graph)` is the number of edges.

    Args:
        n_layers: number of layers.
        n_heads: number of heads in each layer.
        split_qkv: whether the query, key and value of a head are separate readers.
        parallel: whether attention and MLP of a layer run in parallel, as in GPT-NeoX. An MLP then does not read the
            heads of its layer.
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
        """Number of readers in the heads of one layer."""
        return self.n_heads * (3 if self.split_qkv else 1)

    @cached_property
    def sources(self) -> list[str]:
        """Names of the nodes that write to the residual stream, in order: all but `output`."""
        names = ["embed"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.{head}" for head in range(self.n_heads)] + [f"m{layer}"]
        return names

    @cached_property
    def readers(self) -> list[str]:
        """Names of the readers, in order."""
        names = []
        for layer in range(self.n_layers):
            for head in range(self.n_heads):
                names += [f"a{layer}.{head}.{part}" for part in QKV] if self.split_qkv else [f"a{layer}.{head}"]
            names.append(f"m{layer}")
        return [*names, "output"]

    @cached_property
    def layers(self) -> list[LayerSlice]:
        """Where the edges into each layer are; the last `len(sources)` edges are those into `output`."""
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
        """All edges, in the order of `readers`; the edges of one reader are in the order of `sources`."""
        readers, sources = self._ends
        return [
            Edge(f"{self.sources[source]}->{self.readers[reader]}")
            for reader, source in zip(readers.tolist(), sources.tolist(), strict=True)
        ]

    @cached_property
    def _index(self) -> dict[str, int]:
        return {edge: number for number, edge in enumerate(self.edges)}

    def index(self, edge: str) -> int:
        """Index of an edge in `edges`. Raises `UserError` if the graph has no such edge."""
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
        kind = ", separate query, key and value readers" if self.split_qkv else ""
        return f"a graph of {self.n_layers} layers x {self.n_heads} heads{kind} ({len(self):,} edges)"


def edge_nodes(graph: EdgeGraph) -> Tensor:
    """The node that each edge leads to, int64 [n_edges]: its index in `graph.sources`; for `output`, their number."""
    number = {name: index for index, name in enumerate([*graph.sources, "output"])}
    return torch.tensor([number[node_of(reader)] for reader in graph.readers])[graph.edge_readers]


def on_a_path(graph: EdgeGraph, kept: Tensor) -> Tensor:
    """Which kept edges are on a path of kept edges from `embed` to `output`: bool [n_edges].

    A head continues a path whichever of its query, key and value the path enters.

    Args:
        graph: the graph.
        kept: the edges that may form paths, bool [n_edges].
    """
    kept = kept.cpu()
    count = len(graph.sources) + 1
    linked = torch.zeros(count, count, dtype=torch.bool)  # [node, earlier node]
    linked[edge_nodes(graph)[kept], graph.edge_sources[kept]] = True
    reached, reaching = torch.zeros(2, count, dtype=torch.bool)
    reached[0] = reaching[-1] = True
    for node in range(1, count):
        reached[node] = (linked[node] & reached).any()
    for node in reversed(range(count - 1)):
        reaching[node] = (linked[:, node] & reaching).any()
    return kept & reached[graph.edge_sources] & reaching[edge_nodes(graph)]


def describe(graph: EdgeGraph) -> dict[str, Any]:
    """A graph as a JSON object, for the record of a mask."""
    return {
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads,
        "split_qkv": graph.split_qkv,
        "parallel": graph.parallel,
        "n_edges": len(graph),
    }


def from_description(described: Mapping[str, Any]) -> EdgeGraph:
    """The graph that `describe` described. Its edges are made when they are first used.

    Raises:
        ValueError: the description is incomplete, or its shape and number of edges do not agree.
    """
    shape = {key: value for key, value in described.items() if key != "n_edges"}
    types = {"n_layers": int, "n_heads": int, "split_qkv": bool, "parallel": bool}
    if shape.keys() != types.keys() or any(type(shape[key]) is not kind for key, kind in types.items()):
        raise ValueError(f"{dict(described)} describes no graph")
    graph = EdgeGraph(**shape)
    layers, nodes = graph.n_layers, graph.n_heads + 1
    own = 0 if graph.parallel else layers * graph.n_heads
    # computed without making the edges, because a damaged file may name sizes that do not fit into memory
    count = (graph.head_readers + 1) * (layers + nodes * layers * (layers - 1) // 2) + own + 1 + layers * nodes
    if described.get("n_edges") != count:
        raise ValueError(f"a graph of {layers} layers x {graph.n_heads} heads has {count:,} edges")
    return graph
