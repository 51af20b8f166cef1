"""A circuit: which edges of a model are kept, with a score for each edge. All other edges are cut.

Shapes: E edges, P nodes that write.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from circuit_breaking.errors import UserError
from circuit_breaking.graph import Edge, EdgeGraph, edge_nodes, node_of, on_a_path


@dataclass(frozen=True, eq=False)
class Circuit:
    """Edges that are kept, and scores.

    Attributes:
        graph: the graph that the edges belong to.
        kept: whether each edge is in the circuit, bool [E].
        scores: of each edge, float64 [E]. The higher, the more the edge belongs to the circuit. None: no scores.
        config: the model's shape as a file of EAP-IG gives it (`eap_graph`), with `d_model`. Empty where unknown.
        nodes: whether each node, and `output` as the last, is in the circuit, bool [P + 1], as a file gives it. None:
            it follows from the edges (`in_circuit`).
        node_scores: of some nodes, by name.
    """

    graph: EdgeGraph
    kept: Tensor
    scores: Tensor | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    nodes: Tensor | None = None
    node_scores: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("kept", "scores"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != (len(self.graph),):
                raise UserError(f"{name} has the shape {list(tensor.shape)}, and {self.graph} needs one value an edge.")
        object.__setattr__(self, "kept", self.kept.detach().cpu().bool())
        if self.scores is not None:
            object.__setattr__(self, "scores", self.scores.detach().cpu().double())
            if not self.scores.isfinite().all():
                edge = self.graph.edges[int((~self.scores.isfinite()).nonzero()[0])]
                raise UserError(f"the score of the edge {edge} is not a finite number, so edges cannot be ranked.")

    def cut_edges(self) -> list[Edge]:
        """Names of the edges outside the circuit, in the graph's order: what `ablate` takes."""
        return self._names(~self.kept)

    def kept_edges(self) -> list[Edge]:
        """Names of the edges of the circuit, in the graph's order."""
        return self._names(self.kept)

    def _names(self, chosen: Tensor) -> list[Edge]:
        return [self.graph.edges[index] for index in chosen.nonzero()[:, 0].tolist()]

    def with_kept(self, kept: Tensor) -> "Circuit":
        """The same graph and scores with other edges kept, bool [E]."""
        return replace(self, kept=kept, nodes=None)

    def top(self, count: int, absolute: bool = False) -> "Circuit":
        """Keep the `count` edges with the highest scores; with `absolute`, those furthest from zero.

        Among equal scores, the edge that comes first in the graph is kept first.

        Raises:
            UserError: there are no scores, or fewer edges than `count`.
        """
        if self.scores is None:
            raise UserError("this circuit has no scores to choose edges by. Give a file with scores.")
        return self.with_kept(highest(self.scores, count, absolute))

    def complement(self) -> "Circuit":
        """Keep the edges that are cut, and cut those that are kept."""
        return self.with_kept(~self.kept)

    def pathless(self) -> list[Edge]:
        """Names of kept edges that are on no path of kept edges from `embed` to `output`."""
        return self._names(self.kept & ~on_a_path(self.graph, self.kept))

    def pruned(self) -> "Circuit":
        """Cut also the edges of `pathless`."""
        return self.with_kept(on_a_path(self.graph, self.kept))

    def of_graph(self, graph: EdgeGraph) -> "Circuit":
        """The same circuit in the graph of a model, with or without separate queries, keys and values.

        An edge into a head as a whole becomes three edges with its score. Three edges become one if they agree in
        membership and score.

        Raises:
            UserError: the graph has another shape, or three edges into a head disagree.
        """
        if self.graph == graph:
            return self
        if self.graph != replace(graph, split_qkv=not graph.split_qkv):
            raise UserError(f"this circuit is of {self.graph}, and the model has {graph}. Use a circuit of that model.")
        if graph.split_qkv:
            whole = whole_of(graph)
            scores = None if self.scores is None else self.scores[whole]
            return replace(self, graph=graph, kept=self.kept[whole], scores=scores)
        whole, count = whole_of(self.graph), len(graph)
        values = [self.kept.double()] + ([] if self.scores is None else [self.scores])
        joined = []
        for value in values:
            one = value.new_zeros(count).index_copy_(0, whole, value)
            if not torch.equal(one[whole], value):
                edge = graph.edges[int(whole[(one[whole] != value).nonzero()[0]])]
                raise UserError(
                    f"the edges into query, key and value that make up {edge} differ, and this model has one edge for "
                    "the three. Load it with split_qkv."
                )
            joined.append(one)
        return replace(self, graph=graph, kept=joined[0].bool(), scores=joined[1] if len(joined) > 1 else None)


def circuit_of(graph: EdgeGraph, edges: Iterable[str], cut: bool = False) -> Circuit:
    """The circuit that consists of the named edges or, with `cut`, of all others."""
    kept = torch.full((len(graph),), cut)
    kept[[graph.index(edge) for edge in edges]] = not cut
    return Circuit(graph, kept)


def highest(scores: Tensor, count: int, absolute: bool = False) -> Tensor:
    """The `count` highest scores [E], or those furthest from zero: bool [E]. Among equal ones, the first come first."""
    if not 0 <= count <= len(scores):
        raise UserError(f"{count:,} edges were asked for, and there are {len(scores):,}.")
    order = (scores.abs() if absolute else scores).sort(descending=True, stable=True).indices
    chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    chosen[order[:count]] = True
    return chosen


def whole_of(graph: EdgeGraph) -> Tensor:
    """For each edge of a graph with separate queries, keys and values, its edge in the graph without: int64 [E]."""
    joined = replace(graph, split_qkv=False)
    return torch.tensor([joined.index(f"{edge.source}->{node_of(edge.target)}") for edge in graph.edges])


def in_circuit(graph: EdgeGraph, kept: Tensor) -> Tensor:
    """Whether each node has kept edges both in and out, bool [P + 1]. `embed` needs none in, `output` is always in."""
    sources, nodes = graph.edge_sources[kept], edge_nodes(graph)[kept]
    out, into = torch.zeros(2, len(graph.sources) + 1, dtype=torch.bool)
    out[sources] = True
    into[nodes] = True
    into[0] = True
    found = out & into
    found[-1] = True
    return found
