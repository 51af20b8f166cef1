"""Read and write circuits: `read_circuit`, `read_edges_to_cut`, `write_circuit`.

| suffix | form | read | written |
|---|---|---|---|
| `.json` | a graph of EAP-IG (`eap_graph`), as submitted to MIB | yes | yes |
| `.csv`, `.parquet` | a table with a row for each edge: `edge`, `source`, `target`, `score`, `kept` | yes | yes |
| `.safetensors` | `mask.safetensors` of a run | yes | by `engine.mask.save_mask` |
| `.json` | `edges.json` and `kept_edges.json` of a run | if the graph is given | by `mask_record.write_edges` |
| `.pt` | the same graph of EAP-IG as a pickle | no: no pickle is read | no |
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from circuit_breaking.errors import UserError, first_line
from circuit_breaking.graph import Edge, EdgeGraph, from_description
from circuit_breaking.runs.circuits import Circuit, circuit_of
from circuit_breaking.runs.eap_graph import circuit_from, is_eap_graph, read_eap_graph, write_eap_graph
from circuit_breaking.runs.files import atomic_path, read_csv, read_json, require_file, write_csv
from circuit_breaking.runs.mask_record import CutEdges, KeptEdges, MaskRecord
from circuit_breaking.runs.tensors import is_real, read_tensors

COLUMNS = ("edge", "source", "target", "score", "kept")
TABLES = (".csv", ".parquet")
HINT = "Circuits are graphs of EAP-IG (.json), tables of edges (.csv, .parquet) and masks (.safetensors)."
NO_PICKLE = (
    "is a pickle, which is not read here, because reading one can run code. Convert it where EAP-IG is installed: "
    'from eap.graph import Graph; Graph.from_pt("circuit.pt").to_json("circuit.json").'
)


def read_circuit(path: Path | str, graph: EdgeGraph | None = None) -> Circuit:
    """The circuit in a file of any form that the table above lists.

    Args:
        path: the file.
        graph: the graph of the model that it is for; needed for lists of edges. None: the graph of the file.

    Raises:
        UserError: the file is missing, damaged or of another form, or its graph is not that of the model.
    """
    found = _read(Path(path), graph)
    return found if graph is None else found.of_graph(graph)


def _read(path: Path, graph: EdgeGraph | None) -> Circuit:
    """The circuit in a file, in the graph of the file."""
    if path.suffix in (".pt", ".pth", ".pkl"):
        raise UserError(f"{path} {NO_PICKLE}")
    if path.suffix in TABLES:
        return _from_table(path)
    if path.suffix == ".safetensors":
        return _from_mask(path)
    if path.suffix == ".json":
        return _from_json(path, graph)
    raise UserError(f"{path} is of no known form. {HINT}")


def read_edges_to_cut(path: Path | str, graph: EdgeGraph | None = None) -> list[Edge]:
    """Names of the edges outside the circuit in a file, which `ablate` cuts, in the graph's order.

    Edges into a head's query, key and value are named as one edge if the model's graph has one and the file treats the
    three alike. `edges.json` of a run, which names the edges to cut, needs no graph.

    Args:
        path: the file.
        graph: the graph of the model, with or without separate queries, keys and values; needed for `kept_edges.json`.

    Raises:
        UserError: as `read_circuit`; or the file has scores and does not say which edges are in the circuit: it
            includes all or none of them.
    """
    if graph is None and Path(path).suffix == ".json":
        value = None
        with suppress(UserError):  # a graph of EAP-IG may be larger than other files and hold NaN
            value = read_json(path, HINT)
        if value is not None and not is_eap_graph(value):
            return [Edge(edge) for edge in CutEdges.from_json(value, path, HINT).edges]
    found = _read(Path(path), graph)
    if found.scores is not None and len(found.kept.unique()) < 2:
        raise UserError(
            f"{path} has scores, and {'all' if found.kept.any() else 'none'} of its edges are in the circuit. Choose "
            "edges by score: circuit = read_circuit(file).top(100), then write_circuit or circuit.cut_edges()."
        )
    if graph is not None:
        found.of_graph(replace(graph, split_qkv=found.graph.split_qkv))  # refuses another shape
        with suppress(UserError):  # the three edges into a head differ
            found = replace(found, scores=None).of_graph(graph)
    return found.cut_edges()


def write_circuit(path: Path | str, circuit: Circuit, d_model: int | None = None) -> None:
    """Write a circuit as a graph of EAP-IG (`.json`) or a table of edges (`.csv`, `.parquet`).

    Args:
        path: the file.
        circuit: the circuit.
        d_model: width of the model, for a graph of EAP-IG.

    Raises:
        UserError: the suffix is another, or the width is needed and not known.
    """
    path = Path(path)
    if path.suffix == ".json":
        write_eap_graph(path, circuit, d_model)
    elif path.suffix == ".csv":
        write_csv(path, [{**row, "kept": str(row["kept"]).lower()} for row in table(circuit)])
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        types = [(name, pyarrow.string()) for name in COLUMNS[:3]]
        schema = pyarrow.schema([*types, ("score", pyarrow.float64()), ("kept", pyarrow.bool_())])
        with atomic_path(path) as temporary:
            parquet.write_table(pyarrow.Table.from_pylist(table(circuit), schema=schema), temporary)
    else:
        raise UserError(
            f"circuits are written as .json, .csv or .parquet, and not as {path.name}. Choose another name."
        )


def table(circuit: Circuit) -> list[dict[str, Any]]:
    """A row of `COLUMNS` for each edge, in the graph's order."""
    scores = [None] * len(circuit.graph) if circuit.scores is None else circuit.scores.tolist()
    rows = zip(circuit.graph.edges, scores, circuit.kept.tolist(), strict=True)
    return [
        {"edge": str(edge), "source": edge.source, "target": edge.target, "score": score, "kept": kept}
        for edge, score, kept in rows
    ]


def _from_table(path: Path) -> Circuit:
    if path.suffix == ".csv":
        cells = {"true": True, "false": False}
        rows: list[dict[str, Any]] = read_csv(path, HINT)
        for number, row in enumerate(rows, 2):
            try:
                row["score"] = float(row["score"]) if row["score"] else None
                row["kept"] = cells[row["kept"].lower()]
            except (KeyError, ValueError, AttributeError) as error:
                raise UserError(f"{path}, row {number}: {_wrong(error)}. {HINT}") from None
    else:
        import pyarrow
        from pyarrow import parquet

        try:
            rows = parquet.read_table(require_file(path, HINT)).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path} is not a readable Parquet file ({first_line(error)}). {HINT}") from error
        for number, row in enumerate(rows, 1):
            if type(row.get("kept")) is not bool or not isinstance(row.get("score", ""), float | int | None):
                raise UserError(f"{path}, row {number}: there is no number or null as 'score', or no 'kept'. {HINT}")
    if not rows or any(not isinstance(row.get("edge"), str) for row in rows):
        raise UserError(f"{path} is no table with a row and an 'edge' for each edge. {HINT}")
    graph = graph_of([row["edge"] for row in rows], path)
    by_edge = {row["edge"]: row for row in rows}
    ordered = [by_edge[edge] for edge in graph.edges]
    scores = [row["score"] for row in ordered]
    if (missing := scores.count(None)) not in (0, len(scores)):
        raise UserError(f"{path} has no score for {missing:,} of its {len(scores):,} edges. {HINT}")
    values = None if missing else torch.tensor(scores, dtype=torch.float64)
    return Circuit(graph, torch.tensor([row["kept"] for row in ordered]), values)


def _wrong(error: Exception) -> str:
    if isinstance(error, ValueError):
        return f"the score is no number ({first_line(error)})"
    return f"there is no 'score', or no true or false as 'kept' ({error})"


def graph_of(edges: Sequence[str], path: Path | str) -> EdgeGraph:
    """The graph that consists of exactly these edges. Raises a `UserError` if there is none."""
    layers = {int(found.group(1)) for edge in edges if (found := re.fullmatch(r"m(\d{1,4})->output", edge))}
    heads = {int(found.group(1)) for edge in edges if (found := re.fullmatch(r"a0\.(\d{1,4})->output", edge))}
    names = set(edges)
    graph = EdgeGraph(
        len(layers), max(1, len(heads)), "embed->a0.0.q" in names, bool(layers) and "a0.0->m0" not in names
    )  # fmt: skip
    if len(graph) != len(edges) or names != set(graph.edges):
        raise UserError(
            f"{path} has {len(edges):,} edges, which are not those of a graph of {graph.n_layers} layers x "
            f"{graph.n_heads} heads: there must be one row for each edge of the model. {HINT}"
        )
    return graph


def _from_mask(path: Path) -> Circuit:
    tensors, header = read_tensors(path, HINT)
    record, weights = MaskRecord.from_json(header, path, HINT), tensors.get("weights")
    if not is_real(weights) or weights.shape != (record.graph.get("n_edges"),):
        raise UserError(f"{path} holds no edge mask of its graph. {HINT}")
    try:
        return Circuit(from_description(record.graph), weights >= 0.5)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}. {HINT}") from None


def _from_json(path: Path, graph: EdgeGraph | None) -> Circuit:
    try:
        value = read_json(path, HINT)
    except UserError:
        return read_eap_graph(path)  # which may be larger, and hold NaN as the score of a node
    if is_eap_graph(value):
        return circuit_from(value, path)
    if graph is None:
        raise UserError(f"{path} is no graph of EAP-IG, and a list of edges does not say which graph it is of. {HINT}")
    is_kept = isinstance(value, dict) and value.get("record") == KeptEdges.NAME
    edges = (KeptEdges if is_kept else CutEdges).from_json(value, path, HINT).edges
    if any(edge not in graph for edge in edges):  # a list for the other kind of graph
        other = replace(graph, split_qkv=not graph.split_qkv)
        graph = other if all(edge in other for edge in edges) else graph
    return circuit_of(graph, edges, cut=not is_kept)
