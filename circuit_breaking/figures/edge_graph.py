"""The edges of a mask as a graph between the nodes of the model."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path as Curve
from matplotlib.patheffects import withStroke

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
LABEL = (8.0, 7.5)  # half the width and height of a node's label, in points
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
    positions = {"embed": (middle, -1.0), "output": (middle, graph.n_layers + 0.2)}
    for layer in range(graph.n_layers):
        positions |= {f"a{layer}.{head}": (float(head), float(layer)) for head in range(graph.n_heads)}
        positions[f"m{layer}"] = (mlp, layer + (0.0 if graph.parallel else 0.5))
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
    width = min(max(3.6, 0.45 * graph.n_heads + 2.2), 10.0)
    height = min(max(3.6, 0.62 * (graph.n_layers + 2) + 1.2), 14.0)
    picture = folder / f"{name}.png"
    with figure(picture, width + (1.4 if classes else 0), height) as drawn:
        axes = drawn.subplots()
        left, right, bottom, top = -0.9, graph.n_heads + 2.6, -1.5, graph.n_layers + 0.7
        axes.set(xlim=(left, right), ylim=(bottom, top))
        # data units of a point, to let arrows end at the labels of nodes; the rest of the figure takes some of its size
        point = (right - left) / (72 * (width - 0.8)), (top - bottom) / (72 * (height - 1.0))
        _draw_edges(axes, graph, edges, outside, point)
        _draw_nodes(axes, graph, {node for edge in edges for node in _ends_of(edge)}, classes)
        axes.set_yticks(range(graph.n_layers), [f"layer {layer}" for layer in range(graph.n_layers)])
        axes.set_xticks([(graph.n_heads - 1) / 2, graph.n_heads + 0.8], ["heads", "MLPs"])
        axes.tick_params(length=0)
        axes.grid(False)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.set_title(f"{len(edges)} of {len(graph):,} edges {record.get('what', 'cut')}")
        _legend(drawn, graph, edges, classes, record.get("measure") or "importance")
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


def _draw_edges(
    axes: Axes, graph: EdgeGraph, edges: Mapping[Edge, float], outside: set[Edge], point: tuple[float, float]
) -> None:
    """Draw each edge as an arrow; edges of `outside` are grey.

    Thin arrows are on top, where thick ones cannot hide them; if there are many edges, the most important ones are.
    """
    largest = _largest(edges)
    curves = _curves(graph, edges, point)
    lines = {f".{kind[0]}": line for kind, line in READER_LINES.items()}
    for edge, value in sorted(edges.items(), key=lambda item: abs(item[1]), reverse=len(edges) <= SMALL):
        share = abs(value) / largest
        colour = GREY if edge in outside else SOURCE_COLOURS[_kind(edge.source)]
        fade = (0.65 if len(edges) > SMALL else 0.5) * (1 - share)
        axes.add_patch(
            FancyArrowPatch(
                path=curves[edge], arrowstyle="-|>", mutation_scale=4 + 5 * share,
                color=_paler(colour, fade), linewidth=_line_width(share), capstyle="butt", joinstyle="miter",
                linestyle=lines.get(edge.target[-2:], "-"),
                path_effects=[withStroke(linewidth=_line_width(share) + 1.2, foreground="white")],
            )
        )  # fmt: skip


def _largest(edges: Mapping[Edge, float]) -> float:
    return max((abs(value) for value in edges.values()), default=0.0) or 1.0


def _paler(colour: str, share: float) -> tuple[float, ...]:
    """A colour mixed with a share of white; unlike a transparent one, it is the same where an arrow covers itself."""
    return tuple(channel + (1 - channel) * share for channel in to_rgb(colour))


def _line_width(share: float) -> float:
    return 0.5 + 3 * share


def _curves(graph: EdgeGraph, edges: Iterable[Edge], point: tuple[float, float]) -> dict[Edge, Curve]:
    """The curve of each edge, from the label of its source to that of its reader.

    Edges that meet at a node end side by side, in the order of their other ends. From a head to the MLP of its own
    layer, an edge runs in a lane of its own above the heads, so that those of a whole layer can be told apart.

    Args:
        graph: the graph.
        edges: the edges to draw.
        point: data units of a point, across and up.
    """
    positions, across, up = layout(graph), point[0], point[1]
    starts, ends = (_places(edges, positions, end) for end in (0, 1))
    curves = {}
    for edge in edges:
        source, reader = _ends_of(edge)
        start, end = positions[source], positions[reader]
        if source[0] == "a" and reader == f"m{_layer_of(source)}":
            curves[edge] = _lane(start, end, graph.n_heads, point)
        else:
            curves[edge] = _curve(
                (start[0] + starts[edge] * LABEL[0] * across, start[1] + LABEL[1] * up),
                (end[0] + ends[edge] * LABEL[0] * across, end[1] - LABEL[1] * up),
            )
    return curves


def _places(edges: Iterable[Edge], positions: Mapping[str, tuple[float, float]], end: int) -> dict[Edge, float]:
    """Place of each edge among those that meet at its source (`end` 0) or at its reader (1), from -1 to 1."""
    meeting: dict[str, list[Edge]] = {}
    for edge in edges:
        meeting.setdefault(_ends_of(edge)[end], []).append(edge)
    places = {}
    for found in meeting.values():
        found.sort(key=lambda edge: (positions[_ends_of(edge)[1 - end]][0], edge))
        places |= {edge: (at + 0.5) / len(found) * 2 - 1 for at, edge in enumerate(found)}
    return places


def _layer_of(head: str) -> str:
    return head[1:].partition(".")[0]


def _lane(start: tuple[float, float], end: tuple[float, float], heads: int, point: tuple[float, float]) -> Curve:
    """From a head up, along a lane, and to the left side of its layer's MLP; the lane of the first head is the highest.

    Lanes of different heads neither cross nor overlap.
    """
    (x0, y0), (x1, y1) = start, end
    place = (heads - x0 - 0.5) / heads  # from 0, the last head, to 1
    lane = y0 + (0.21 + 0.58 * place) * (y1 - y0) / 0.5
    turn = min(0.35, 0.9 * (x1 - x0))
    box = x1 - 1.15 * LABEL[0] * point[0]
    points = [
        (x0, y0 + LABEL[1] * point[1]), (x0, lane), (x0 + turn, lane), (box - 0.55, lane), (box - 0.3, lane),
        (box, y1 + (lane - y1) * 0.4),
    ]  # fmt: skip
    return Curve(points, [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3, Curve.LINETO, Curve.CURVE3, Curve.CURVE3])


def _draw_nodes(axes: Axes, graph: EdgeGraph, on_edges: set[str], classes: Mapping[str, list[str]]) -> None:
    """Draw nodes with edges as filled labels, the rest as dots.

    Heads of a known circuit without edges are outlines, and so are the embedding and the output without edges.
    """
    positions, ends = layout(graph), {"embed", "output"}  # which are labelled in any case
    class_colours = {head: CLASS_COLOURS[i] for i, heads in enumerate(classes.values()) for head in heads}
    named = [node for node in positions if node in on_edges or node in class_colours or node in ends]
    rest = [positions[node] for node in positions if node not in named]
    axes.scatter(*np.array(rest).reshape(-1, 2).T, s=5, color=FAINT_GREY, zorder=2)
    for node in named:
        filled = node in on_edges
        face = class_colours.get(node, DARK_GREY if classes else SOURCE_COLOURS.get(_kind(node), BLACK))
        axes.annotate(
            node, positions[node], ha="center", va="center", fontsize=7 if len(named) <= SMALL else 5, zorder=4,
            color="white" if filled else face,
            bbox={"boxstyle": "round,pad=0.22", "facecolor": face if filled else "white", "edgecolor": face, "lw": 0.7},
        )  # fmt: skip


def _legend(
    drawn: Figure, graph: EdgeGraph, edges: Mapping[Edge, float], classes: Mapping[str, Any], measure: str
) -> None:
    """The legend of colours, and of the importance that widths stand for, if edges differ in it."""
    widths = []
    if len({abs(value) for value in edges.values()}) > 1:
        largest = _largest(edges)
        widths = [
            Line2D([], [], color=DARK_GREY, linewidth=_line_width(share), label=f"{share * largest:.2g}")
            for share in (1.0, 0.5, 0.1)
        ]
    if classes:
        handles = [
            Line2D([], [], color=CLASS_COLOURS[i], marker="s", linestyle="", label=kind)
            for i, kind in enumerate(classes)
        ]
        handles.append(Line2D([], [], color=GREY, label="edge outside"))
        handles += [Line2D([], [], linestyle="", label=f"{measure}:"), *widths] if widths else []
        drawn.legend(handles=handles, loc="outside right center")
        return
    rows = [
        [Line2D([], [], color=colour, linewidth=2, label=f"from {kind}") for kind, colour in SOURCE_COLOURS.items()]
    ]
    if graph.split_qkv:
        rows.append(
            [Line2D([], [], color=DARK_GREY, linestyle=line, label=kind) for kind, line in READER_LINES.items()]
        )
    rows += [widths] if widths else []
    columns = [handle for column in zip(*rows, strict=True) for handle in column]  # legends are filled by columns
    title = f"width: {measure}" if widths else None
    drawn.legend(handles=columns, loc="outside lower center", ncols=3, title=title, title_fontsize=8)


def _kind(node: str) -> str:
    return {"a": "head", "m": "MLP"}.get(node[0], node)


def _curve(start: tuple[float, float], end: tuple[float, float]) -> Curve:
    """A curve that leaves upwards and arrives from below, bent to the side if it would cross the nodes between."""
    (x0, y0), (x1, y1) = start, end
    rise = y1 - y0
    bend = 0.0 if abs(x1 - x0) > 0.6 or rise < 1.2 else min(0.3 + 0.13 * rise, 1.9)
    lift = 0.45 * max(rise, 0.5)
    points = [(x0, y0), (x0 + bend, y0 + lift), (x1 + bend, y1 - lift), (x1, y1)]
    return Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
