"""The published circuit of indirect-object identification in GPT-2 small, and the overlap of a mask with it.

Source: Wang, Variengien, Conmy, Shlegeris, Steinhardt 2023, "Interpretability in the Wild: a Circuit for Indirect
Object Identification in GPT-2 small" (arXiv:2211.00593), figure 2 and section 3: 26 heads in seven classes. Their
circuit consists of heads. The edges between them are those of that figure, between classes of heads.
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

# (source class, reader class, input) of each arrow of the figure; the input is q, k or v where only that one reads
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
    """Agreement of two sets: `shared` elements of `found` are among the `known`."""

    found: int
    known: int
    shared: int
    precision: float | None  # shared / found; None if nothing was found
    recall: float  # shared / known
    by_chance: float  # expected precision of a random set of the same size


def check_shape(graph: EdgeGraph) -> None:
    """Raise a `UserError` for any graph but that of GPT-2 small, whose heads are in `HEADS`."""
    if (graph.n_layers, graph.n_heads) != SHAPE or graph.parallel:
        raise UserError(f"the published circuit is GPT-2 small's, and this is {graph}. Compare a mask of gpt2.")


def circuit_edges(graph: EdgeGraph) -> set[Edge]:
    """Edges of the published circuit in a graph.

    In a graph with split query, key and value, an edge goes into the input that `PATHS` names, or into all three if it
    names none. In other graphs, it goes into the head as a whole.
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
    return {edge for edge in edges if edge in graph}  # without pairs of classes in the wrong order of layers


def overlap(graph: EdgeGraph, edges: Iterable[Edge]) -> dict[str, Any]:
    """Compare the edges of a mask with the published circuit.

    Returns:
        `edges`: the `Agreement` over edges. `heads`: the `Agreement` over heads at either end of an edge. `classes`:
        the number of heads of each class, and of those at either end of an edge (`touched`). `in_circuit`: names of
        the shared edges.
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
