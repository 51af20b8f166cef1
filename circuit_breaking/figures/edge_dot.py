"""Edges as a graph for Graphviz.

from circuit_breaking.figures.edge_dot import to_dot
from circuit_breaking.runs.files import write_text
write_text("circuit.dot", to_dot(edges, scores))        # then: dot -Tsvg circuit.dot > circuit.svg
"""

import re
from collections.abc import Mapping, Sequence

from circuit_breaking.graph import Edge, node_of

COLOURS = {"q": "#b5478f", "k": "#3f8f5b", "v": "#3b6fb6", "": "#333333"}  # of edges, by the input that they enter


def to_dot(edges: Sequence[str], scores: Mapping[str, float] | None = None, title: str = "circuit") -> str:
    """A graph in the language of Graphviz, with the embedding at the bottom and the nodes of a layer in one row.

    Args:
        edges: names of the edges to draw.
        scores: of each edge; the further from zero, the thicker the edge, and dashed below zero. None: all alike.
        title: name of the graph.
    """
    edges = [Edge(edge) for edge in edges]
    nodes = dict.fromkeys(node for edge in edges for node in (edge.source, node_of(edge.target)))
    ranks: dict[tuple[int, int], list[str]] = {}
    for node in nodes:
        ranks.setdefault(_rank(node), []).append(node)
    lines = [f"digraph {_quote(title)} {{", "  rankdir=BT;", '  node [shape=box, style=rounded, fontname="Helvetica"];']
    for rank in sorted(ranks):
        lines.append(
            "  { rank=same; " + " ".join(f"{_quote(node)};" for node in sorted(ranks[rank], key=_order)) + " }"
        )
    most = max((abs(value) for value in (scores or {}).values()), default=0.0) or 1.0
    for edge in edges:
        node = node_of(edge.target)
        part = edge.target[len(node) + 1 :]
        score = None if scores is None else scores.get(edge, 0.0)
        looks = {"color": COLOURS[part], **({"label": part} if part else {})}
        if score is not None:
            looks |= {"penwidth": f"{0.5 + 3.5 * abs(score) / most:.2f}", "tooltip": f"{score:.4g}"}
            looks |= {"style": "dashed"} if score < 0 else {}
        about = ", ".join(f"{name}={_quote(value)}" for name, value in looks.items())
        lines.append(f"  {_quote(edge.source)} -> {_quote(node)} [{about}];")
    return "\n".join([*lines, "}"]) + "\n"


def _rank(node: str) -> tuple[int, int]:
    """Row of a node: its layer, and within it heads before the MLP."""
    if node in ("embed", "output"):
        return (-1, 0) if node == "embed" else (10**9, 0)
    return int(node[1:].partition(".")[0]), int(node[0] == "m")


def _order(node: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", node)]


def _quote(text: str) -> str:
    return '"' + str(text).replace("\\", r"\\").replace('"', r"\"") + '"'
