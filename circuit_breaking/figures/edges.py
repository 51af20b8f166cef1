"""All pictures of the edges of a mask."""

from pathlib import Path

from circuit_breaking.figures.edge_graph import draw_graph
from circuit_breaking.figures.edge_table import write_edge_table
from circuit_breaking.figures.heat_map import draw_heat_map


def draw_edges(folder: Path | str) -> None:
    """Draw `graph.png` and `heat_map.png` and write `edges.tex`, from the `graph.json` of a run folder."""
    draw_graph(folder)
    draw_heat_map(folder)
    write_edge_table(folder)
