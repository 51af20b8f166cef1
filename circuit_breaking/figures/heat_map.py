"""The edges of a mask as a matrix of sources and readers."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.collections import PathCollection

from circuit_breaking.figures.edge_graph import read_graph
from circuit_breaking.figures.style import figure
from circuit_breaking.graph import EdgeGraph

LABEL_HEIGHT = 7.5  # points, with the space between labels


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
            shown = _labelled(names, graph, inches=3.9)
            axis.set_ticks(list(shown.values()), list(shown))
        axes.tick_params(axis="x", rotation=90)
        axes.tick_params(labelsize=6, length=2)
        axes.grid(False)
        axes.set(xlabel="source", ylabel="reader", title=f"{len(edges)} edges {record.get('what', 'cut')}")
        bar = drawn.colorbar(points, ax=axes, shrink=0.7)
        bar.set_label(record.get("measure") or "importance")
        bar.outline.set_linewidth(0.5)
    return path


def _labelled(names: Mapping[str, int], graph: EdgeGraph, inches: float) -> dict[str, int]:
    """The nodes with a label on an axis, and their positions: both ends, then MLPs, then heads, where there is room."""
    every = max(1, math.ceil(graph.n_layers / 12))
    ends = [node for node in ("embed", "output") if node in names]
    layers = [node for node in names if node[0] == "m" and int(node[1:]) % every == 0]
    heads = [node for node in names if node[0] == "a"] if len(names) <= 30 else []
    room = LABEL_HEIGHT / 72 / inches * len(names)  # a label takes as many positions
    shown: dict[str, int] = {}
    for node in (*ends, *layers, *heads):
        if all(abs(names[node] - other) >= room for other in shown.values()):
            shown[node] = names[node]
    return shown
