"""The edges of a mask as a table in LaTeX."""

from pathlib import Path

from circuit_breaking.figures.edge_graph import read_graph
from circuit_breaking.runs.files import write_text

SPECIAL = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def write_edge_table(folder: Path | str) -> Path:
    """Write the edges of a mask as a LaTeX table, the most important ones first, for the package booktabs.

    Reads `graph.json` and writes `edges.tex`, both in `folder`.

    Raises:
        UserError: the file is missing or damaged.
    """
    folder = Path(folder)
    graph, edges, record = read_graph(folder / "graph.json")
    ranked = sorted(edges.items(), key=lambda item: -abs(item[1]))
    rows = [f"{edge.source} & {edge.target} & ${value:.3g}$ \\\\" for edge, value in ranked]
    lines = [
        f"% {len(edges)} of {len(graph):,} edges {record.get('what', 'cut')}; needs \\usepackage{{booktabs}}",
        "\\begin{tabular}{llr}",
        "\\toprule",
        f"source & reader & {_escaped(str(record.get('measure') or 'importance'))} \\\\",
        "\\midrule",
        *rows,
        "\\bottomrule",
        "\\end{tabular}",
    ]
    path = folder / "edges.tex"
    write_text(path, "\n".join(lines) + "\n")
    return path


def _escaped(text: str) -> str:
    return "".join(SPECIAL.get(character, character) for character in text)
