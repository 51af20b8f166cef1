"""Edges by hand on a small graph, counts of real models, names and their errors."""

import pytest

from circuit_breaking.errors import UserError
from circuit_breaking.graph import EdgeGraph

BY_HAND = [
    "embed->a0.0",
    "embed->a0.1",
    "embed->m0",
    "a0.0->m0",
    "a0.1->m0",
    "embed->a1.0",
    "a0.0->a1.0",
    "a0.1->a1.0",
    "m0->a1.0",
    "embed->a1.1",
    "a0.0->a1.1",
    "a0.1->a1.1",
    "m0->a1.1",
    "embed->m1",
    "a0.0->m1",
    "a0.1->m1",
    "m0->m1",
    "a1.0->m1",
    "a1.1->m1",
    "embed->output",
    "a0.0->output",
    "a0.1->output",
    "m0->output",
    "a1.0->output",
    "a1.1->output",
    "m1->output",
]


def test_edges_by_hand():
    graph = EdgeGraph(2, 2)
    assert graph.edges == BY_HAND and len(graph) == len(BY_HAND)
    assert graph.sources == ["embed", "a0.0", "a0.1", "m0", "a1.0", "a1.1", "m1"]
    assert graph.readers == ["a0.0", "a0.1", "m0", "a1.0", "a1.1", "m1", "output"]
    assert str(graph.edges[3]) == "a0.0->m0" and graph.edges[3].source == "a0.0" and graph.edges[3].target == "m0"


def test_split_reads_query_key_and_value_separately():
    graph = EdgeGraph(1, 2, split_qkv=True)
    heads = [f"embed->a0.{head}.{part}" for head in range(2) for part in "qkv"]
    outs = ["embed->m0", "a0.0->m0", "a0.1->m0", "embed->output", "a0.0->output", "a0.1->output", "m0->output"]
    assert graph.edges == heads + outs
    assert str(graph) == "a graph of 1 layers x 2 heads, separate query, key and value readers (13 edges)"


def test_parallel_layers_do_not_read_their_own_heads():
    edges = EdgeGraph(2, 2, parallel=True).edges
    assert [e for e in edges if e.target == "m1"] == ["embed->m1", "a0.0->m1", "a0.1->m1", "m0->m1"]


@pytest.mark.parametrize(
    ("layers", "heads", "split", "edges"),
    [(12, 12, False, 11_611), (12, 12, True, 32_491), (30, 9, False, 44_371), (0, 1, False, 1)],
)
def test_counts(layers, heads, split, edges):
    graph = EdgeGraph(layers, heads, split)
    assert len(graph) == len(graph.edges) == len(set(graph.edges)) == edges


def test_index_is_the_order():
    for graph in (EdgeGraph(3, 2), EdgeGraph(2, 3, True), EdgeGraph(3, 2, parallel=True)):
        assert [graph.index(edge) for edge in graph.edges] == list(range(len(graph)))
        ends = zip(graph.edge_sources.tolist(), graph.edge_readers.tolist(), strict=True)
        named = [f"{graph.sources[source]}->{graph.readers[reader]}" for source, reader in ends]
        assert named == graph.edges and all(edge in graph for edge in named)


@pytest.mark.parametrize(
    ("edge", "reason"),
    [
        ("a0.0", "written like"),
        ("x->m0", "no node that writes"),
        ("output->m0", "no node that writes"),
        ("embed->a0.0.q", "no reader"),
        ("m1->a0.0", "does not come after"),
        ("a1.0->a1.1", "does not come after"),
    ],
)
def test_an_edge_that_is_not_there(edge, reason):
    graph = EdgeGraph(2, 2)
    assert edge not in graph
    with pytest.raises(UserError, match=reason):
        graph.index(edge)
