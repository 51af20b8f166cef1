"""The published circuit of indirect-object identification in GPT-2 small, and a mask's overlap with it (layer 1).

Source: Wang, Variengien, Conmy, Shlegeris, Steinhardt 2023, "Interpretability in the Wild: a Circuit for Indirect
Object Identification in GPT-2 small" (arXiv:2211.00593), figure 2 and section 3: 26 heads in seven classes. Their
circuit is one of heads. The edges between them are those of that figure, from class to class.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from circuit_breaking.errors import UserError
from circuit_breaking.graph import QKV, Edge, EdgeGraph, node_of

HEADS: dict[str, tuple[str, ...]] = {
    "name mover": ("a9.6", "a9.9", "a10.0"),
    "backup name mover": ("a9.0", "a9.7", "a10.1", "a10.2", "a10.6", "a10.10", "a11.2", "a11.9"),
    "negative name mover": ("a10.7", "a11.10"),
    "S-inhibition": ("a7.3", "a7.9", "a8.6", "a8.10"),
    "induction": ("a5.5", "a5.8", "a5.9", "a6.9"),
    "duplicate token": ("a0.1", "a0.10", "a3.0"),
    "previous token": ("a2.2", "a4.11"),
}
MOVERS = ("name mover", "backup name mover", "negative name mover")

# who reads whom in the figure; a part where only a head's query, key or value reads
PATHS: tuple[tuple[str, str, str | None], ...] = (
    ("embed", "duplicate token", None),
    ("embed", "previous token", None),
    ("embed", "induction", None),
    ("previous token", "induction", "k"),
    ("duplicate token", "S-inhibition", "v"),
    ("induction", "S-inhibition", "v"),
    *(("S-inhibition", mover, "q") for mover in MOVERS),
    *(("embed", mover, None) for mover in MOVERS),
    *((mover, "output", None) for mover in MOVERS),
)
SHAPE = (12, 12)  # layers and heads of GPT-2 small


@dataclass(frozen=True)
class Agreement:
    """How two sets agree: `shared` of `found` are among the `known`."""

    found: int
    known: int
    shared: int
    precision: float | None  # shared / found; None where nothing was found
    recall: float  # shared / known
    by_chance: float  # precision to be expected of as many drawn at random


def check_shape(graph: EdgeGraph) -> None:
    """Raise a `UserError` for a graph that is not GPT-2 small's, whose heads the table does not name."""
    if (graph.n_layers, graph.n_heads) != SHAPE or graph.parallel:
        raise UserError(f"the published circuit is GPT-2 small's, and this is {graph}. Compare a mask of gpt2.")


def circuit_edges(graph: EdgeGraph) -> set[Edge]:
    """Edges of the published circuit that this graph has.

    Where a head reads as a whole, an edge into its query, key or value is the edge into it; where the three read apart,
    `PATHS` says which, and all three do where it says nothing.
    """
    check_shape(graph)
    edges = set()
    for source_class, reader_class, part in PATHS:
        for source in HEADS.get(source_class, (source_class,)):
            for head in HEADS.get(reader_class, (reader_class,)):
                readers = [head]
                if graph.split_qkv and head != "output":
                    readers = [f"{head}.{each}" for each in ((part,) if part else QKV)]
                edges.update(Edge(f"{source}->{reader}") for reader in readers)
    return {edge for edge in edges if edge in graph}  # no induction head reads a previous-token head of a later layer


def overlap(graph: EdgeGraph, edges: Iterable[Edge]) -> dict[str, Any]:
    """A mask's edges against the published circuit.

    Returns:
        `edges`, an `Agreement` over edges; `heads`, one over the heads that are an end of an edge; `classes`, how many
        of each class's heads are; `in_circuit`, the names of the edges shared.
    """
    edges, known = {Edge(edge) for edge in edges}, circuit_edges(graph)
    heads = {node for edge in edges for node in (edge.source, node_of(edge.target)) if node[0] == "a"}
    table = {head for group in HEADS.values() for head in group}
    every = graph.n_layers * graph.n_heads
    return {
        "edges": asdict(_agreement(edges, known, len(graph))),
        "heads": asdict(_agreement(heads, table, every)),
        "classes": {name: {"heads": len(group), "touched": len(heads & set(group))} for name, group in HEADS.items()},
        "in_circuit": sorted(edges & known, key=graph.index),
    }


def _agreement(found: set[str], known: set[str], every: int) -> Agreement:
    shared = len(found & known)
    precision = shared / len(found) if found else None
    return Agreement(len(found), len(known), shared, precision, shared / len(known), len(known) / every)
