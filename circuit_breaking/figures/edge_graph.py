"""Pictures of a mask, drawn from result files only: its edges as a graph and as a matrix, what it does to one prompt
(layer 3)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve

from circuit_breaking.errors import UserError
from circuit_breaking.figures.style import COLOURS, figure, from_results
from circuit_breaking.graph import Edge, EdgeGraph, node_of
from circuit_breaking.runs.files import read_json

KINDS = {"embed": "#000000", "head": COLOURS[0], "MLP": COLOURS[1]}  # what writes: colour of its edges
FAINT, GREY = "#DADADA", "#8C8C8C"
CLASS_COLOURS = (*COLOURS[:6], "#7B4FA3")  # one for each class of heads of a known circuit
MOST_READERS = 10_000  # of a graph that is drawn; GPT-2 XL has 3,648 with q, k and v apart
SMALL = 60  # at most so many nodes are labelled in full size
HINT = "Make it with ioi/train_mask.py."


def read_graph(path: Path) -> tuple[EdgeGraph, dict[Edge, float], dict[str, Any]]:
    """Graph, edges with their importance, and the whole record of such a file. A damaged one is a `UserError`."""
    record = read_json(path, HINT)
    try:
        shape = {key: value for key, value in record["graph"].items() if key != "n_edges"}
        graph = EdgeGraph(**shape)
        sizes = (graph.n_layers, graph.n_heads)
        if any(type(size) is not int for size in sizes) or sizes[0] * (3 * sizes[1] + 1) > MOST_READERS:
            raise ValueError("a graph of a size that no model has")
        edges = {Edge(name): float(value) for name, value in record["edges"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} does not describe a graph ({error!r}). {HINT}") from error
    for edge in edges:
        graph.index(edge)
    return graph, edges, record


def layout(graph: EdgeGraph) -> dict[str, tuple[float, float]]:
    """Where nodes are drawn: layers from bottom to top, heads side by side, MLPs in a column of their own."""
    middle, mlp = (graph.n_heads - 1) / 2, graph.n_heads + 0.8
    places = {"embed": (middle, -1.0), "output": (middle, float(graph.n_layers))}
    for layer in range(graph.n_layers):
        places |= {f"a{layer}.{head}": (float(head), float(layer)) for head in range(graph.n_heads)}
        places[f"m{layer}"] = (mlp, layer + 0.35)
    return places


@from_results
def draw_graph(folder: Path | str, name: str = "graph") -> Path:
    """The edges of a mask between the nodes of the model, by layer; wider is more important.

    Reads `<name>.json` (see `graph_record`), writes `<name>.png`, both in `folder`. Where the file has `classes`
    (name -> heads, as `known_circuits` has them), heads are coloured by class and edges outside `in_circuit` are grey.
    """
    folder = Path(folder)
    graph, edges, record = read_graph(folder / f"{name}.json")
    places, classes = layout(graph), record.get("classes") or {}
    touched = {node for edge in edges for node in (edge.source, node_of(edge.target))}
    colours = {head: CLASS_COLOURS[i] for i, heads in enumerate(classes.values()) for head in heads}
    largest = max((abs(value) for value in edges.values()), default=0.0) or 1.0
    width = min(max(3.6, 0.42 * graph.n_heads + 1.6), 9.0)
    height = min(max(3.2, 0.42 * (graph.n_layers + 2) + 0.9), 12.0)
    path = folder / f"{name}.png"
    with figure(path, width + (1.4 if classes else 0), height) as drawn:
        axes = drawn.subplots()
        for edge, value in sorted(edges.items(), key=lambda item: abs(item[1])):  # the important on top
            share = abs(value) / largest
            colour = KINDS[_kind(edge.source)]
            if classes and edge not in record.get("in_circuit", []):
                colour = GREY
            curve = _curve(places[edge.source], places[node_of(edge.target)])
            style = {".k": (0, (4, 1.5)), ".v": (0, (1, 1.2))}.get(edge.target[-2:], "-")
            fade = (0.65 if len(edges) > SMALL else 0.5) * (1 - share)
            axes.add_patch(
                PathPatch(
                    curve, fill=False, edgecolor=to_rgba(colour, 0.9 - fade), linewidth=0.5 + 3 * share, linestyle=style
                )
            )
        used = [node for node in places if node in touched or node in colours]
        rest = [node for node in places if node not in touched and node not in colours]
        axes.scatter(*np.array([places[node] for node in rest]).reshape(-1, 2).T, s=5, color=FAINT, zorder=2)
        size = 7 if len(used) <= SMALL else 5
        for node in used:
            on = node in touched
            face = colours.get(node, KINDS.get(_kind(node), "#000000") if not classes else "#555555")
            axes.annotate(
                node, places[node], ha="center", va="center", fontsize=size, zorder=4, color="white" if on else face,
                bbox={"boxstyle": "round,pad=0.22", "facecolor": face if on else "white", "edgecolor": face, "lw": 0.7},
            )  # fmt: skip
        axes.set(xlim=(-0.8, graph.n_heads + 1.6), ylim=(-1.6, graph.n_layers + 0.6))
        axes.set_yticks(range(graph.n_layers), [f"layer {layer}" for layer in range(graph.n_layers)])
        axes.set_xticks([(graph.n_heads - 1) / 2, graph.n_heads + 0.8], ["heads", "MLPs"])
        axes.tick_params(length=0)
        axes.grid(False)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.set_title(f"{len(edges)} of {len(graph):,} edges {record.get('what', 'cut')}")
        _legend(drawn, graph, classes)
    return path


def _legend(drawn: Any, graph: EdgeGraph, classes: Mapping[str, Any]) -> None:
    if classes:
        handles = [
            Line2D([], [], color=CLASS_COLOURS[i], marker="s", linestyle="", label=kind)
            for i, kind in enumerate(classes)
        ]
        handles.append(Line2D([], [], color=GREY, label="edge outside"))
        drawn.legend(handles=handles, loc="outside right center")
        return
    handles = [Line2D([], [], color=colour, linewidth=2, label=f"from {kind}") for kind, colour in KINDS.items()]
    if graph.split_qkv:
        styles = {"query": "-", "key": (0, (4, 1.5)), "value": (0, (1, 1.2))}
        handles += [Line2D([], [], color="#333333", linestyle=style, label=part) for part, style in styles.items()]
    drawn.legend(handles=handles, loc="outside lower center", ncols=len(handles) if len(handles) <= 3 else 3)


def _kind(node: str) -> str:
    return {"a": "head", "m": "MLP"}.get(node[0], node)


def _curve(start: tuple[float, float], end: tuple[float, float]) -> Curve:
    """A curve that leaves upwards and arrives from below, bent aside where it would run through the nodes between."""
    (x0, y0), (x1, y1) = start, end
    rise = y1 - y0
    bend = 0.0 if abs(x1 - x0) > 0.3 or rise < 1.5 else min(0.35 + 0.04 * rise, 0.9)
    lift = 0.45 * max(rise, 0.5)
    points = [(x0, y0), (x0 + bend, y0 + lift), (x1 + bend, y1 - lift), (x1, y1)]
    return Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])


@from_results
def draw_heat_map(folder: Path | str) -> Path:
    """The edges of a mask as a matrix, sources across and readers up, coloured by importance.

    Reads `graph.json`, writes `heat_map.png`, both in `folder`. Where nothing can run the ground is grey.
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
        # squares a cell large, but never too small to be seen
        side = max(3.0, 0.75 * 72 * 4.2 / len(readers))
        points: PathCollection = axes.scatter(
            [sources[edge.source] for edge in edges], [readers[edge.target] for edge in edges], c=values, s=side**2,
            marker="s", cmap="RdBu", vmin=-largest, vmax=largest, edgecolors="#444444", linewidths=0.3,
        )  # fmt: skip
        for axis, names in ((axes.xaxis, sources), (axes.yaxis, readers)):
            few = len(names) <= 30
            shown = {
                node: at for node, at in names.items() if few or node in ("embed", "output") or _shown(node, graph)
            }
            axis.set_ticks(list(shown.values()), list(shown))
        axes.tick_params(axis="x", rotation=90)
        axes.tick_params(labelsize=6, length=2)
        axes.grid(False)
        axes.set(xlabel="source", ylabel="reader", title=f"{len(edges)} edges {record.get('what', 'cut')}")
        bar = drawn.colorbar(points, ax=axes, shrink=0.7)
        bar.set_label("importance, logit difference")
        bar.outline.set_linewidth(0.5)
    return path


def _shown(node: str, graph: EdgeGraph) -> bool:
    """Whether a node is named on an axis with too many: the MLP of one layer in a few."""
    return node[0] == "m" and int(node[1:]) % max(1, math.ceil(graph.n_layers / 12)) == 0


@from_results
def draw_next_tokens(folder: Path | str) -> Path:
    """What the model says after one prompt, before and after: bars of the likeliest next tokens.

    Reads `next_tokens.json` (`prompt`, `IO`, `S`, `models`: name -> rows of token and probability), writes
    `next_tokens.png`, both in `folder`.
    """
    folder = Path(folder)
    about = read_json(folder / "next_tokens.json", HINT)
    try:
        models, io, subject = about["models"], about["IO"], about["S"]
        bars = {name: [(row["token"], row["probability"]) for row in rows] for name, rows in models.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'next_tokens.json'} lacks what is to be drawn ({error!r}). {HINT}") from error
    path = folder / "next_tokens.png"
    most = max((len(rows) for rows in bars.values()), default=1)
    with figure(path, 3.3 * max(len(bars), 1), 0.9 + 0.22 * most) as drawn:
        for axes, (name, rows) in zip(np.atleast_1d(drawn.subplots(1, max(len(bars), 1))), bars.items(), strict=False):
            colours = [
                COLOURS[0] if token == io else COLOURS[1] if token == subject else "#B5B5B5" for token, _ in rows
            ]
            axes.barh(range(len(rows)), [share for _, share in rows], color=colours, height=0.7)
            for place, (_, share) in enumerate(rows):
                axes.annotate(
                    f"{share:.2f}" if share >= 0.005 else f"{share:.0e}", (share, place), xytext=(3, 0),
                    textcoords="offset points", va="center", fontsize=7,
                )  # fmt: skip
            axes.set_yticks(range(len(rows)), [token.strip() or repr(token) for token, _ in rows])
            axes.invert_yaxis()
            axes.set(title=name, xlim=(0, 1.12), xlabel="probability")
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
        drawn.suptitle(f"{about.get('prompt', '')} …", fontsize=9)
        handles = [
            Line2D([], [], color=colour, marker="s", linestyle="", label=label)
            for colour, label in ((COLOURS[0], "indirect object"), (COLOURS[1], "subject"))
        ]
        drawn.legend(handles=handles, loc="outside lower center", ncols=2)
    return path
