"""The section with the edges as a graph: those that a run cuts or keeps, rankings, circuits with scores."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from circuit_breaking.evaluation.result_files import EVIDENCE, read_evidence
from circuit_breaking.evaluation.tables import interval
from circuit_breaking.figures.browser.edge_list import EdgeList
from circuit_breaking.figures.browser.parts import Graph, Section, Text
from circuit_breaking.figures.edge_effects import EFFECTS, TEXTS
from circuit_breaking.figures.edge_graph import read_graph
from circuit_breaking.figures.style import readable
from circuit_breaking.graph import EdgeGraph
from circuit_breaking.runs.circuit_files import read_circuit
from circuit_breaking.runs.files import read_json
from circuit_breaking.runs.mask_record import CUT_EDGES, KEPT_EDGES, MASK, MaskRecord, read_edges_of_interest
from circuit_breaking.runs.ranking_record import RANKING
from circuit_breaking.runs.tensors import read_tensors
from circuit_breaking.training.edge_ranking import load_ranking

RECORDS = {"graph": "edges", "known_circuit": "edges beside the published circuit"}  # files: what their edges are
SHOWN = 50  # edges of a ranking that are shown first, where no budget is known
MOST_LISTS = 8  # of one page

HOW_TO_READ = (
    "Layers go from bottom to top, with heads side by side and MLPs on the right; an edge leads upwards from the node "
    "that writes to the node that reads. Wider edges are more important. Drag to move; to zoom, use the wheel after a "
    "click or with Ctrl, or two fingers. Point at an edge or a node to read about it."
)


def edges(folder: Path) -> Section | None:
    """The lists of edges in a folder, for one graph in which the reader chooses among them."""
    lists = [*_records(folder), *_ranking(folder), *_evidence(folder), *_circuits(folder)][:MOST_LISTS]
    return Section("Edges", [Text(HOW_TO_READ), Graph(lists)]) if lists else None


def _records(folder: Path) -> Iterator[EdgeList]:
    for name, what in RECORDS.items():
        path = folder / f"{name}.json"
        if path.is_file():
            graph, values, record = read_graph(path)
            if values:
                title = f"{what}, {record.get('what', 'cut')}" if name == "graph" else what
                yield EdgeList.of(title, graph, values, record.get("measure") or "importance")


def _ranking(folder: Path) -> Iterator[EdgeList]:
    if not (folder / RANKING).is_file():
        return
    ranking, record = load_ranking(folder / RANKING)
    listed = (folder / CUT_EDGES).is_file() or (folder / KEPT_EDGES).is_file()
    count = len(read_edges_of_interest(folder)) if listed else SHOWN
    order, scores = ranking.order.numpy(), ranking.scores.double().numpy()
    title = f"ranked edges ({record.method})" if record.method else "ranked edges"
    yield EdgeList(title, ranking.graph, order, scores, "score in the ranking", min(count, len(order)))


def _evidence(folder: Path) -> Iterator[EdgeList]:
    """The edges of each mask that was examined, with their four effects."""
    if not (folder / EVIDENCE).is_file():
        return
    graph = _graph_of_masks(folder)
    if graph is None:
        return
    for name, mask in read_evidence(folder)["masks"].items():
        rows = {row["edge"]: row for row in mask["edges"] if row["edge"] in graph}
        if not rows:
            continue
        values = {edge: row["restore_effect"]["toxic"]["value"] or 0.0 for edge, row in rows.items()}
        notes: dict[int, Sequence[tuple[str, str]]] = {
            graph.index(edge): [
                (f"{text} loss, {label}", interval(row[effect][text]))
                for text in TEXTS
                for effect, (_, label) in EFFECTS.items()
            ]
            for edge, row in rows.items()
        }
        yield EdgeList.of(readable(name), graph, values, "fall of toxic loss when restored, nats", notes=notes)


def _graph_of_masks(folder: Path) -> EdgeGraph | None:
    """The graph of the masks below a folder, as the first of their records says."""
    for path in [folder / MASK, *sorted(folder.glob(f"masks/*/{MASK}"))]:
        if path.is_file():
            record = MaskRecord.from_json(read_tensors(path)[1], path)
            shape = {key: record.graph[key] for key in ("n_layers", "n_heads", "split_qkv", "parallel")}
            return EdgeGraph(**shape)
    return None


def _circuits(folder: Path) -> Iterator[EdgeList]:
    """Graphs of EAP-IG with scores that lie in the folder, as ioi/faithfulness.py writes them."""
    result = folder / "faithfulness.json"
    names = read_json(result).get("circuits", {}) if result.is_file() else {}
    for name in names:
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        circuit = read_circuit(path)
        if circuit.scores is None:
            continue
        scores = circuit.scores.numpy()
        order = np.argsort(-np.abs(scores), kind="stable")
        count = min(SHOWN, len(order))
        yield EdgeList(f"scores of {name}", circuit.graph, order, scores[order], "score", count)
