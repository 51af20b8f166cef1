"""The edges of a mask as a graph between the nodes of the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve

from circuit_breaking.errors import UserError
from circuit_breaking.figures.style import (
    BLACK,
    BLUE,
    COLOURS,
    DARK_GREY,
    DASHED,
    DOTTED,
    FAINT_GREY,
    GREY,
    PURPLE,
    VERMILION,
    figure,
)
from circuit_breaking.graph import Edge, EdgeGraph, from_description, node_of
from circuit_breaking.runs.checked_json import CheckedJson
from circuit_breaking.runs.ioi_results import GraphRecord, KnownCircuit
from circuit_breaking.runs.records import read_value

SOURCE_COLOURS = {"embed": BLACK, "head": BLUE, "MLP": VERMILION}  # of edges, by the kind of node that writes
CLASS_COLOURS = (*COLOURS[:6], PURPLE)  # of heads, one for each class of a known circuit
READER_LINES = {"query": "-", "key": DASHED, "value": DOTTED}
MOST_READERS = 10_000  # of a graph that is drawn; GPT-2 XL has 3,648 with split query, key and value
SMALL = 60  # up to this number of nodes, labels have their full size
HINT = "Make it with ioi/train_mask.py."


def read_graph(path: Path) -> tuple[EdgeGraph, dict[Edge, float], dict[str, Any]]:
    """Read a `GraphRecord` or `KnownCircuit`: the graph, edges with their importance, and the whole JSON object.

    Raises:
        UserError: the file is missing or damaged, or names an edge that the graph does not have.
    """
    record = read_value(path, HINT, GraphRecord, KnownCircuit)
    try:
        graph = from_description(record["graph"])
        if graph.n_layers * (3 * graph.n_heads + 1) > MOST_READERS:
            raise ValueError("a graph of a size that no model has")
        edges = {Edge(name): float(value) for name, value in record["edges"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} does not describe a graph ({error!r}). {HINT}") from error
    for edge in edges:
        graph.index(edge)
    return graph, edges, record


def layout(graph: EdgeGraph) -> dict[str, tuple[float, float]]:
    """Position of each node in a figure: layers from bottom to top, heads side by side, MLPs in a separate column."""
    middle, mlp = (graph.n_heads - 1) / 2, graph.n_heads + 0.8
    positions = {"embed": (middle, -1.0), "output": (middle, float(graph.n_layers))}
    for layer in range(graph.n_layers):
        positions |= {f"a{layer}.{head}": (float(head), float(layer)) for head in range(graph.n_heads)}
        positions[f"m{layer}"] = (mlp, layer + 0.35)
    return positions


def draw_graph(folder: Path | str, name: str = "graph") -> Path:
    """Draw the edges of a mask between the nodes of the model, by layer; wider edges are more important.

    Reads `<name>.json` (`GraphRecord` or `KnownCircuit`) and writes `<name>.png`, both in `folder`. If the file has
    `classes` (by name, the heads of a known circuit), heads have the colour of their class, and edges that are not in
    `in_circuit` are grey.

    Raises:
        UserError: the file is missing or damaged.
    """
    folder = Path(folder)
    graph, edges, record = read_graph(folder / f"{name}.json")
    classes, outside = _read_circuit(record, edges, folder / f"{name}.json")
    width = min(max(3.6, 0.42 * graph.n_heads + 1.6), 9.0)
    height = min(max(3.2, 0.42 * (graph.n_layers + 2) + 0.9), 12.0)
    picture = folder / f"{name}.png"
    with figure(picture, width + (1.4 if classes else 0), height) as drawn:
        axes = drawn.subplots()
        _draw_edges(axes, graph, edges, outside)
        _draw_nodes(axes, graph, {node for edge in edges for node in _ends_of(edge)}, classes)
        axes.set(xlim=(-0.8, graph.n_heads + 1.6), ylim=(-1.6, graph.n_layers + 0.6))
        axes.set_yticks(range(graph.n_layers), [f"layer {layer}" for layer in range(graph.n_layers)])
        axes.set_xticks([(graph.n_heads - 1) / 2, graph.n_heads + 0.8], ["heads", "MLPs"])
        axes.tick_params(length=0)
        axes.grid(False)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.set_title(f"{len(edges)} of {len(graph):,} edges {record.get('what', 'cut')}")
        _legend(drawn, graph, classes)
    return picture


def _read_circuit(
    record: Mapping[str, Any], edges: Mapping[Edge, float], path: Path
) -> tuple[dict[str, list[str]], set[Edge]]:
    """Heads of a known circuit by class, and the edges that are not in that circuit; both empty if there is none."""
    checked = CheckedJson(record, path, HINT)
    found, in_circuit = checked.get("classes"), checked.get("in_circuit")
    if found is None:
        return {}, set()
    classes = {kind: [head.text() for head in heads.rows()] for kind, heads in found.items()}
    if len(classes) > len(CLASS_COLOURS):
        found.refuse(f"an object of at most {len(CLASS_COLOURS)} classes")
    known = {edge.text() for edge in in_circuit.rows()} if in_circuit is not None else set()
    return classes, {edge for edge in edges if edge not in known}


def _ends_of(edge: Edge) -> tuple[str, str]:
    return edge.source, node_of(edge.target)


def _draw_edges(axes: Axes, graph: EdgeGraph, edges: Mapping[Edge, float], outside: set[Edge]) -> None:
    """Draw each edge as a curve, the most important ones on top; edges of `outside` are grey."""
    positions = layout(graph)
    largest = max((abs(value) for value in edges.values()), default=0.0) or 1.0
    lines = {f".{kind[0]}": line for kind, line in READER_LINES.items()}
    for edge, value in sorted(edges.items(), key=lambda item: abs(item[1])):
        share = abs(value) / largest
        colour = GREY if edge in outside else SOURCE_COLOURS[_kind(edge.source)]
        fade = (0.65 if len(edges) > SMALL else 0.5) * (1 - share)
        start, end = (positions[node] for node in _ends_of(edge))
        axes.add_patch(
            PathPatch(
                _curve(start, end), fill=False, edgecolor=to_rgba(colour, 0.9 - fade),
                linewidth=0.5 + 3 * share, linestyle=lines.get(edge.target[-2:], "-"),
            )
        )  # fmt: skip


def _draw_nodes(axes: Axes, graph: EdgeGraph, on_edges: set[str], classes: Mapping[str, list[str]]) -> None:
    """Draw nodes with edges as filled labels, heads of a known circuit without edges as outlines, the rest as dots."""
    positions = layout(graph)
    class_colours = {head: CLASS_COLOURS[i] for i, heads in enumerate(classes.values()) for head in heads}
    named = [node for node in positions if node in on_edges or node in class_colours]
    rest = [positions[node] for node in positions if node not in on_edges and node not in class_colours]
    axes.scatter(*np.array(rest).reshape(-1, 2).T, s=5, color=FAINT_GREY, zorder=2)
    for node in named:
        filled = node in on_edges
        face = class_colours.get(node, DARK_GREY if classes else SOURCE_COLOURS.get(_kind(node), BLACK))
        axes.annotate(
            node, positions[node], ha="center", va="center", fontsize=7 if len(named) <= SMALL else 5, zorder=4,
            color="white" if filled else face,
            bbox={"boxstyle": "round,pad=0.22", "facecolor": face if filled else "white", "edgecolor": face, "lw": 0.7},
        )  # fmt: skip


def _legend(drawn: Figure, graph: EdgeGraph, classes: Mapping[str, Any]) -> None:
    if classes:
        handles = [
            Line2D([], [], color=CLASS_COLOURS[i], marker="s", linestyle="", label=kind)
            for i, kind in enumerate(classes)
        ]
        handles.append(Line2D([], [], color=GREY, label="edge outside"))
        drawn.legend(handles=handles, loc="outside right center")
        return
    handles = [
        Line2D([], [], color=colour, linewidth=2, label=f"from {kind}") for kind, colour in SOURCE_COLOURS.items()
    ]
    if graph.split_qkv:
        handles += [Line2D([], [], color="#333333", linestyle=line, label=kind) for kind, line in READER_LINES.items()]
    drawn.legend(handles=handles, loc="outside lower center", ncols=len(handles) if len(handles) <= 3 else 3)


def _kind(node: str) -> str:
    return {"a": "head", "m": "MLP"}.get(node[0], node)


def _curve(start: tuple[float, float], end: tuple[float, float]) -> Curve:
    """A curve that leaves upwards and arrives from below, bent to the side if it would cross the nodes between."""
    (x0, y0), (x1, y1) = start, end
    rise = y1 - y0
    bend = 0.0 if abs(x1 - x0) > 0.3 or rise < 1.5 else min(0.35 + 0.04 * rise, 0.9)
    lift = 0.45 * max(rise, 0.5)
    points = [(x0, y0), (x0 + bend, y0 + lift), (x1 + bend, y1 - lift), (x1, y1)]
    return Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
