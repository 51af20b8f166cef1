"""Edges as a graph for Graphviz."""

import re

from circuit_breaking.figures.edge_dot import to_dot

EDGES = ["embed->a0.1.q", "a0.1->m1", "a10.0->m11", "a2.0->m11", "m11->output"]


def test_dot():
    text = to_dot(EDGES, {edge: value for edge, value in zip(EDGES, (1.0, -2.0, 0.0, 1.0, 4.0), strict=True)}, 'a "b"')
    lines = text.splitlines()
    assert lines[0] == r'digraph "a \"b\"" {' and lines[-1] == "}"
    rows = [re.findall(r'"([^"]+)"', line) for line in lines if "rank=same" in line]
    assert rows == [["embed"], ["a0.1"], ["m1"], ["a2.0"], ["a10.0"], ["m11"], ["output"]]
    arrows = [line for line in lines if "->" in line]
    assert len(arrows) == 5 and arrows[0].startswith('  "embed" -> "a0.1" [color="#b5478f", label="q"')
    widths = [float(re.search(r'penwidth="([\d.]+)"', line)[1]) for line in arrows]
    assert widths == [1.38, 2.25, 0.5, 1.38, 4.0] and ['style="dashed"' in line for line in arrows] == [0, 1, 0, 0, 0]
    assert "penwidth" not in to_dot(EDGES) and to_dot([]).count("->") == 0
