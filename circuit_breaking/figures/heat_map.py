"""The edges of a mask as a matrix of sources and readers."""

import math
from pathlib import Path

import numpy as np
from matplotlib.collections import PathCollection

from circuit_breaking.figures.edge_graph import read_graph
from circuit_breaking.figures.style import figure
from circuit_breaking.graph import EdgeGraph


def draw_heat_map(folder: Path | str) -> Path:
    """Draw the edges of a mask as a matrix, sources across and readers up, coloured by importance.

    Reads `graph.json` and writes `heat_map.png`, both in `folder`. Pairs of nodes without an edge are grey.

    Raises:
        UserError: the file is missing or damaged.
    """
    folder = Path(folder)
    graph, edges, record = read_graph(folder / "graph.json")
    sources = {node: number for number, node in enumerate(graph.sources)}
    readers = {node: number for number, node in enumerate(graph.readers)}
    possible = np.zeros((len(readers), len(sources)))
    possible[graph.edge_readers.numpy(), graph.edge_sources.numpy()] = 1
    values = np.array(list(edges.values()))
    largest = float(np.abs(values).max(initial=0.0)) or 1.0
    path = folder / "heat_map.png"
    with figure(path, 5.6, 4.8) as drawn:
        axes = drawn.subplots()
        axes.imshow(possible, cmap="Greys_r", vmin=-8, vmax=1, origin="lower", aspect="auto", interpolation="nearest")
        side = max(3.0, 0.75 * 72 * 4.2 / len(readers))  # points; a cell's size, but large enough to be seen
        points: PathCollection = axes.scatter(
            [sources[edge.source] for edge in edges], [readers[edge.target] for edge in edges], c=values, s=side**2,
            marker="s", cmap="RdBu", vmin=-largest, vmax=largest, edgecolors="#444444", linewidths=0.3,
        )  # fmt: skip
        for axis, names in ((axes.xaxis, sources), (axes.yaxis, readers)):
            shown = {node: at for node, at in names.items() if len(names) <= 30 or _is_named(node, graph)}
            axis.set_ticks(list(shown.values()), list(shown))
        axes.tick_params(axis="x", rotation=90)
        axes.tick_params(labelsize=6, length=2)
        axes.grid(False)
        axes.set(xlabel="source", ylabel="reader", title=f"{len(edges)} edges {record.get('what', 'cut')}")
        bar = drawn.colorbar(points, ax=axes, shrink=0.7)
        bar.set_label("importance, logit difference")
        bar.outline.set_linewidth(0.5)
    return path


def _is_named(node: str, graph: EdgeGraph) -> bool:
    """Whether a node has a label on an axis with too many nodes: both ends, and the MLPs of at most 12 layers."""
    every = max(1, math.ceil(graph.n_layers / 12))
    return node in ("embed", "output") or (node[0] == "m" and int(node[1:]) % every == 0)
