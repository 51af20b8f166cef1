"""The graph files of EAP-IG, in which circuits are submitted to the circuit track of MIB.

Hanna, Pezzelle, Belinkov 2024 (github.com/hannamw/EAP-IG, `Graph.to_json`); Mueller et al. 2025 (MIB). A file is a JSON
object:

    {"cfg": {"n_layers": 12, "n_heads": 12, "parallel_attn_mlp": false, "d_model": 768},
     "nodes": {"input": {"in_graph": true}, "a0.h0": {"in_graph": false}, ..., "logits": {"in_graph": true}},
     "edges": {"input->a0.h0<q>": {"score": 0.01, "in_graph": false}, ..., "m11->logits": {...}}}

| here | there |
|---|---|
| `embed` | `input` |
| `a0.3` | `a0.h3` |
| `a1.3.q`, a reader | `a1.h3<q>` |
| `output` | `logits` |

There, queries, keys and values are always separate. The edges `in_graph` are the circuit; all others are cut. MIB also
takes circuits without scores; `Graph.from_json` of EAP-IG needs them.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuit_breaking.errors import UserError
from circuit_breaking.graph import EdgeGraph, node_of
from circuit_breaking.runs.circuits import Circuit, in_circuit
from circuit_breaking.runs.files import parse_json, read_json, write_text

HINT = "A graph of EAP-IG, as its Graph.to_json writes it, is needed."
SHAPE = {"n_layers": int, "n_heads": int, "parallel_attn_mlp": bool}
MAX_GRAPH = 2**30  # bytes of a file; Llama 3.1 8B has 1.6 million edges in some 100 MB


def eap_name(node: str) -> str:
    """Name in EAP-IG of a node or a reader."""
    if node in ("embed", "output"):
        return {"embed": "input", "output": "logits"}[node]
    if (whole := node_of(node)) != node:
        return f"{eap_name(whole)}<{node[-1]}>"
    return node.replace(".", ".h") if node[0] == "a" else node


def eap_edges(graph: EdgeGraph) -> list[str]:
    """Names in EAP-IG of the edges of a graph with separate queries, keys and values, in the graph's order."""
    sources, readers = ([eap_name(name) for name in names] for names in (graph.sources, graph.readers))
    ends = zip(graph.edge_sources.tolist(), graph.edge_readers.tolist(), strict=True)
    return [f"{sources[source]}->{readers[reader]}" for source, reader in ends]


def eap_order(graph: EdgeGraph) -> Tensor:
    """The edges of a graph in the order in which EAP-IG lists them, as indices: int64 [E].

    Layer by layer, first the edges into its heads, then those into its MLP; each by source, then by reader. Where
    attention and MLP run in parallel, edges into heads and MLP are not separated.
    """
    per_layer, readers = graph.head_readers + 1, graph.edge_readers
    is_mlp = (readers % per_layer == graph.head_readers) & (readers < len(graph.readers) - 1)
    stage = 2 * (readers // per_layer) + (is_mlp & (not graph.parallel))
    return ((stage * len(graph.sources) + graph.edge_sources) * len(graph.readers) + readers).argsort()


def read_eap_graph(path: Path | str) -> Circuit:
    """The circuit in a graph file of EAP-IG.

    Raises:
        UserError: the file is missing or damaged, its nodes and edges are not those of a graph of its shape, or it
            chooses single neurons.
    """
    return circuit_from(read_json(path, HINT, partial(parse_json, nan=True), MAX_GRAPH), path)


def circuit_from(value: Any, path: Path | str) -> Circuit:
    """The circuit in the JSON value of a graph file; see `read_eap_graph`."""

    def refuse(why: str) -> UserError:
        return UserError(f"{path} {why}. {HINT}")

    if not isinstance(value, dict) or value.keys() != {"cfg", "nodes", "edges"}:
        raise refuse("does not consist of 'cfg', 'nodes' and 'edges'")
    if not all(isinstance(each, dict) for each in value.values()):
        raise refuse("has a 'cfg', 'nodes' or 'edges' that is no object")
    cfg, nodes, edges = value["cfg"], value["nodes"], value["edges"]
    if any(type(cfg.get(key)) is not kind for key, kind in SHAPE.items()):
        raise refuse(f"does not give {', '.join(SHAPE)} in its 'cfg'")
    n_layers, n_heads = cfg["n_layers"], cfg["n_heads"]
    # compared before the graph is made: a damaged file may name sizes that do not fit into memory
    if n_layers < 0 or n_heads < 1 or len(nodes) != 2 + n_layers * (n_heads + 1):
        raise refuse(f"has {len(nodes):,} nodes, which do not fit its {n_layers} layers x {n_heads} heads")
    graph = EdgeGraph(n_layers, n_heads, split_qkv=True, parallel=cfg["parallel_attn_mlp"])
    names, node_names = eap_edges(graph), [eap_name(node) for node in (*graph.sources, "output")]
    for what, found, expected in (("node", nodes, node_names), ("edge", edges, names)):
        if missing := [name for name in expected if name not in found]:
            raise refuse(f"lacks the {what} {missing[0]!r} of {graph}")
        if len(found) > len(expected):
            more = next(iter(found.keys() - set(expected)))
            raise refuse(f"has the {what} {more!r}, which {graph} has not")
        scored = what == "edge" and any("score" in entry for entry in found.values() if isinstance(entry, dict))
        if wrong := [name for name in expected if not _is_entry(found[name], what == "edge", scored)]:
            raise refuse(f"has no true or false 'in_graph', or no number as 'score', for the {what} {wrong[0]!r}")
    if any(key.startswith("neurons") for entry in nodes.values() for key in entry):
        raise refuse("chooses single neurons, and circuits here consist of whole edges")
    flags = torch.tensor([nodes[name]["in_graph"] for name in node_names])
    kept = torch.tensor([edges[name]["in_graph"] for name in names])
    scores = torch.tensor([edges[name]["score"] for name in names], dtype=torch.float64) if scored else None
    node_scores = {
        node: nodes[name]["score"]
        for node, name in zip((*graph.sources, "output"), node_names, strict=True)
        if "score" in nodes[name]
    }
    follows = torch.equal(flags, in_circuit(graph, kept))
    return Circuit(graph, kept, scores, cfg, None if follows else flags, node_scores)


def _is_entry(entry: Any, edge: bool, scored: bool) -> bool:
    if not isinstance(entry, Mapping) or type(entry.get("in_graph")) is not bool:
        return False
    score = entry.get("score", None if scored else 0.0)
    number = isinstance(score, int | float) and not isinstance(score, bool)
    known = entry.keys() <= ({"in_graph", "score"} if edge else {"in_graph", "score", "neurons", "neurons_scores"})
    return known and number and (math.isfinite(score) or not edge)


def write_eap_graph(path: Path | str, circuit: Circuit, d_model: int | None = None) -> None:
    """Write a circuit as a graph file of EAP-IG. Without scores there are none in the file.

    An edge into a head as a whole becomes three edges with its score.

    Args:
        path: the file.
        circuit: the circuit.
        d_model: width of the model. None: as in the circuit's `config`.

    Raises:
        UserError: the width is not known.
    """
    width = circuit.config.get("d_model", d_model)
    if type(width) is not int:
        raise UserError(
            f"a graph file of EAP-IG states the model's width, which is not known. Give d_model for {path}."
        )
    graph = replace(circuit.graph, split_qkv=True)
    circuit = circuit.of_graph(graph)
    shape = {
        "n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": graph.parallel, "d_model": width,
    }  # fmt: skip
    flags = in_circuit(graph, circuit.kept) if circuit.nodes is None else circuit.nodes
    nodes: dict[str, dict[str, Any]] = {}
    for node, flag in zip((*graph.sources, "output"), flags.tolist(), strict=True):
        score = {"score": circuit.node_scores[node]} if node in circuit.node_scores else {}
        nodes[eap_name(node)] = {"in_graph": flag, **score}
    names, kept = eap_edges(graph), circuit.kept.tolist()
    scores = [{}] * len(names) if circuit.scores is None else [{"score": score} for score in circuit.scores.tolist()]
    edges = {names[at]: {**scores[at], "in_graph": kept[at]} for at in eap_order(graph).tolist()}
    write_text(path, json.dumps({"cfg": {**shape, **circuit.config}, "nodes": nodes, "edges": edges}))


def is_eap_graph(value: Any) -> bool:
    """Whether a JSON value has the parts of a graph file."""
    return isinstance(value, dict) and {"cfg", "nodes", "edges"} <= value.keys() and "record" not in value
