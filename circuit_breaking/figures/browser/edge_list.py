"""A list of edges with a value each, in the form in which a page holds it.

An edge is stored as its number in `EdgeGraph.edges`, in 2 bytes where that is enough, and its value as float32, both in
base64. So a list of all 44,371 edges of a model with 30 layers of 9 heads takes 0.36 MB. `edge_graph.js` numbers the
edges of a graph in the same way.
"""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from circuit_breaking.graph import EdgeGraph, describe


@dataclass(frozen=True)
class EdgeList:
    """Edges of a graph in an order, from the most important on.

    Attributes:
        title: what the list is, for the reader who chooses between lists.
        graph: the graph.
        order: numbers of the edges in `graph.edges`, [n].
        values: a value of each, [n], in the same order.
        measure: what the value is, with its unit.
        shown: how many of the edges are shown first.
        notes: more about some edges, by number of the edge: pairs of a label and a text.
    """

    title: str
    graph: EdgeGraph
    order: np.ndarray
    values: np.ndarray
    measure: str
    shown: int
    notes: Mapping[int, Sequence[tuple[str, str]]] = field(default_factory=dict)

    @classmethod
    def of(cls, title: str, graph: EdgeGraph, values: Mapping[str, float], measure: str, **more: Any) -> "EdgeList":
        """A list of named edges, those with the largest absolute value first; all are shown."""
        names = sorted(values, key=lambda edge: -abs(values[edge]))
        order = np.array([graph.index(name) for name in names], dtype=np.int64)
        return cls(title, graph, order, np.array([values[name] for name in names]), measure, len(names), **more)

    def to_json(self) -> dict[str, Any]:
        """The list for `edge_graph.js`."""
        wide = len(self.graph) > 2**16  # numbers of edges in 4 bytes in place of 2
        return {
            "title": self.title,
            "graph": describe(self.graph),
            "wide": wide,
            "order": _base64(self.order, "<u4" if wide else "<u2"),
            "values": _base64(self.values, "<f4"),
            "measure": self.measure,
            "shown": self.shown,
            "notes": {str(edge): [list(pair) for pair in pairs] for edge, pairs in self.notes.items()},
        }


def _base64(values: np.ndarray, kind: str) -> str:
    return b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode("ascii")
