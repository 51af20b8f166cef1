"""The masked read in both of its forms, against the formula written out edge by edge."""

import pytest
import torch
from helpers.models import small_gpt2, small_neox

from circuit_breaking.engine.ablation_values import AblationValues
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.network import PassBuffers, Workspace
from circuit_breaking.engine.reads import DenseReads, RunningSumReads, SparseMask

BATCH, LENGTH = 2, 5


def formula(graph, mask, nodes, means, reader):
    """Σ_i [ m_ij x_i + (1 - m_ij) μ_i ] over the edges i -> j of the graph, from x [P, N, D] and μ [P, N, D]."""
    total = torch.zeros_like(nodes[0])
    for number, edge in enumerate(graph.edges):
        if edge.target == graph.readers[reader]:
            source = graph.sources.index(edge.source)
            total += mask[number] * nodes[source] + (1 - mask[number]) * means[source]
    return total


@pytest.fixture(params=[(small_gpt2, False), (small_gpt2, True), (small_neox, False)])
def network(request):
    make, split = request.param
    return load_model(make().double(), split, device="cpu", dtype="float64")._network()


def reads_of(network, mask, means, nodes, form):
    """The reads of a pass whose node outputs are all known, and the buffers that they work in."""
    graph, width = network.graph, network.embedding.shape[1]
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    buffers = PassBuffers.take(Workspace(), network, tokens, True)
    buffers.node_outputs_3d.copy_(nodes - means)
    values = AblationValues.of(torch.zeros(len(nodes), 1, width, dtype=torch.float64), means[:, 0], network.n_read)
    about = network, network.mask_matrix(mask), values, buffers, BATCH, LENGTH, 0
    if form == "dense":
        return DenseReads(*about), buffers
    differing = (mask != 1).nonzero()[:, 0]
    sparse = SparseMask(graph, network.edge_readers, network.edge_sources, mask, differing)
    return RunningSumReads(sparse, *about), buffers


@pytest.mark.parametrize("form", ["dense", "running sum"])
def test_reads_and_their_gradients_are_the_formula(network, form):
    graph, width = network.graph, network.embedding.shape[1]
    torch.manual_seed(0)
    nodes = torch.randn(len(graph.sources), BATCH * LENGTH, width, dtype=torch.float64)
    means = torch.randn(len(graph.sources), 1, width, dtype=torch.float64).expand_as(nodes)
    mask = torch.where(torch.rand(len(graph)) < 0.2, torch.rand(len(graph)), 1.0).double()
    reads, buffers = reads_of(network, mask, means, nodes, form)
    inputs = buffers.reader_inputs
    for group in network.groups:
        parts = group.parts
        start, end = parts[0].first_reader, parts[-1].first_reader + parts[-1].n_readers
        reads.read_group(inputs[start:end], start, parts[0].n_earlier_nodes)
        for part in parts:
            rows = inputs[part.first_reader : part.first_reader + part.n_readers]
            reads.read_layer(rows, graph.layers.index(part), part, parts[0].n_earlier_nodes)
            if part.n_same_layer_edges:
                reads.read_own_heads(rows[-1], part)
    reads.read_output(inputs[-1:])
    for reader in range(len(graph.readers)):
        expected = formula(graph, mask, nodes, means, reader)
        torch.testing.assert_close(inputs[reader].view_as(expected), expected, atol=1e-12, rtol=1e-12)

    gradient = torch.randn_like(inputs)
    inputs.copy_(gradient)
    reads.start_backward()
    expected = network.mask_matrix(mask).t() @ gradient  # Σ_j m_ij ∂L/∂r_j
    layer = graph.n_layers
    for group in reversed(network.groups):
        reads.grad_group(group)
        for part in reversed(group.parts):
            layer -= 1
            found = reads.grad_nodes(layer, part, group)
            if part.n_same_layer_edges:
                reads.grad_own_heads(found[: graph.n_heads], inputs[part.first_reader + part.n_readers - 1], part)
            rows = slice(part.n_earlier_nodes, part.n_earlier_nodes + graph.n_heads + 1)
            torch.testing.assert_close(found, expected[rows], atol=1e-12, rtol=1e-12)
