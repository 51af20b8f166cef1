"""The masked read: what every reader gets from the nodes before it.

    r_j = Σ_i [ m_ij x_i + (1 - m_ij) μ_i ]            (Li, Davies, Nadeau 2023, section 3)

x_i is the output of node i, m_ij the weight of edge i -> j, μ_i what a cut edge carries. Nodes are stored as x_i - μ_i,
so that only the sum of all μ_i before the reader, which no mask changes, is left to add:

    r_j = Σ_i m_ij (x_i - μ_i) + Σ_i μ_i

This holds from position `ablate_from` on. At earlier positions no cut acts, and every reader gets r_j = Σ_i x_i.

There are two ways to compute it, with one interface. They give the same numbers up to rounding:

DenseReads       the formula as a matrix product, for all readers of a group of layers at once. For any mask.
RunningSumReads  one running sum of all nodes for all readers, corrected at the few edges whose weight is not 1. For
                 masks that cut few edges; its cost does not grow with the number of edges.

Backward, the gradient of node i is Σ_j m_ij ∂L/∂r_j, the same product with the mask transposed. Attention is causal, so
nothing at positions before `ablate_from` depends on the mask, and gradients there are set to zero.

Shapes: B batch, T position, N = B * T tokens, P nodes that write, R readers, H heads, D width, E edges, X edges
whose weight is not 1.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from circuit_breaking.engine.ablation_values import Values
from circuit_breaking.engine.network import LayerGroup, Network, PassBuffers
from circuit_breaking.graph import EdgeGraph, LayerSlice

# Multiplications and additions a layer up to which a GPU finishes the mask products in the time that Python takes to
# launch that layer. Looking for the edges that differ from 1 would then cost more than the product.
SMALL_PRODUCT = 1.5e11


def product_is_small(network: Network, tokens: Tensor) -> bool:
    """Whether a pass runs on a GPU on which its mask products cost next to nothing."""
    operations = 6 * len(network.edge_readers) * tokens.numel() * network.embedding.shape[1]
    return tokens.is_cuda and operations < SMALL_PRODUCT * network.graph.n_layers


class MaskedReads(ABC):
    """The masked reads of one pass, and the gradients that go back through them.

    Args:
        network: the network.
        mask: edge weights as a matrix [R, P].
        values: what cut edges carry.
        buffers: where node outputs are, and where reader inputs and gradients go.
        batch, length: B and T.
        ablate_from: first position at which cuts act.
    """

    def __init__(
        self, network: Network, mask: Tensor, values: Values, buffers: PassBuffers, batch: int, length: int,
        ablate_from: int,
    ) -> None:  # fmt: skip
        self.graph, self.mask = network.graph, mask
        self.value_sums = values.sums(batch, length)  # None if values are zero
        self.nodes, self.inputs, self.scratch = buffers.node_outputs, buffers.reader_inputs, buffers.grad_scratch
        self.first_reader = network.first_reader  # whose row is the first of `inputs` where a backward follows
        self.batch, self.length = batch, length
        self.n_early = min(ablate_from, length)
        self.early_sum: Tensor | None = None  # of all nodes so far at early positions, [B, early T, D]
        self.n_early_summed = 0

    def continue_from(self, earlier: "MaskedReads") -> None:
        """Continue the forward pass of the device that computes the layers before."""
        if earlier.early_sum is not None:
            self.early_sum = earlier.early_sum.to(self.nodes.device, copy=True)
        self.n_early_summed = earlier.n_early_summed

    def continue_backward(self, later: "MaskedReads") -> None:
        """Continue the backward pass of the device that computes the layers after; in place of `start_backward`."""
        self.start_backward()

    @abstractmethod
    def read_group(self, out: Tensor, first_reader: int, n_nodes: int) -> None:
        """Start the reads `out` [k, N * D] of a group's readers from the `n_nodes` nodes before the group."""

    def read_layer(self, out: Tensor, layer: int, part: LayerSlice, n_before_group: int) -> None:
        """Finish the reads `out` [readers of the layer, N * D]; all nodes of earlier layers are known by now."""
        self._read_layer(out, layer, part, n_before_group)
        self._read_early(out, part.first_reader, part.n_earlier_nodes)

    def read_output(self, out: Tensor) -> None:
        """Set `out` [1, N * D] to what `output` reads."""
        self._read_output(out)
        self._read_early(out, len(self.mask) - 1, len(self.nodes))

    def read_own_heads(self, mlp_input: Tensor, part: LayerSlice) -> None:
        """Add the heads of an MLP's own layer to its read [N * D]."""
        first, end, mlp = _own_heads(part)
        mlp_input.addmv_(self.nodes[first:end].t(), self.mask[mlp, first:end])
        self._read_early(mlp_input[None], mlp, end)

    @abstractmethod
    def _read_layer(self, out: Tensor, layer: int, part: LayerSlice, n_before_group: int) -> None:
        """`read_layer` at the positions where cuts act."""

    @abstractmethod
    def _read_output(self, out: Tensor) -> None:
        """`read_output` at the positions where cuts act."""

    def drop_early(self, grad_inputs: Tensor) -> None:
        """Set the gradients of reads [k, N * D] to zero at the positions where no cut acts."""
        if self.n_early:
            self._early(grad_inputs).zero_()

    @abstractmethod
    def start_backward(self) -> None:
        """Get ready to walk the layers in reverse; the gradient of `output`'s read is the last reader input."""

    @abstractmethod
    def grad_group(self, group: LayerGroup) -> None:
        """Start the gradients of a group's nodes from the gradients of all readers after the group."""

    @abstractmethod
    def grad_nodes(self, layer: int, part: LayerSlice, group: LayerGroup) -> Tensor:
        """Gradients of a layer's nodes, heads and then MLP, from all readers of later layers: [H + 1, N * D]."""

    def grad_own_heads(self, grad_heads: Tensor, grad_mlp_input: Tensor, part: LayerSlice) -> None:
        """Add to the gradients of a layer's heads [H, N * D] what their own layer's MLP passes back [N * D]."""
        first, end, mlp = _own_heads(part)
        grad_heads.addr_(self.mask[mlp, first:end], grad_mlp_input)

    def _read_early(self, out: Tensor, first_reader: int, n_nodes: int) -> None:
        """Set the reads `out` [k, N * D] to the sum of the first `n_nodes` nodes where no cut acts."""
        if not self.n_early:
            return
        added = self._early(self.nodes[self.n_early_summed : n_nodes]).sum(0)
        self.early_sum = added if self.early_sum is None else self.early_sum.add_(added)
        self.n_early_summed = n_nodes
        early = self._early(out)
        early.copy_(self.early_sum.expand_as(early))
        if self.value_sums is not None:  # nodes are stored as x - μ
            self.value_sums.add_early(early, first_reader)

    def _early(self, rows: Tensor) -> Tensor:
        """The part of rows [k, N * D] where no cut acts, a view [k, B, early T, D]."""
        return rows.view(len(rows), self.batch, self.length, -1)[:, :, : self.n_early]


def _own_heads(part: LayerSlice) -> tuple[int, int, int]:
    """First and last (exclusive) head of a layer among the nodes, and its MLP among the readers."""
    first = part.n_earlier_nodes
    return first, first + part.n_same_layer_edges, part.first_reader + part.n_readers - 1


class DenseReads(MaskedReads):
    """r = m (x - μ) + Σ μ as a matrix product. Readers of a group of layers share one product over the nodes before the
    group; the nodes inside the group are added layer by layer."""

    def read_group(self, out: Tensor, first_reader: int, n_nodes: int) -> None:
        weights, nodes = self.mask[first_reader : first_reader + len(out), :n_nodes], self.nodes[:n_nodes]
        if self.value_sums is None:
            torch.mm(weights, nodes, out=out)
        else:
            self.value_sums.write(out, first_reader)
            out.addmm_(weights, nodes)

    def _read_layer(self, out: Tensor, layer: int, part: LayerSlice, n_before_group: int) -> None:
        inside = slice(n_before_group, part.n_earlier_nodes)
        if inside.start < inside.stop:
            weights = self.mask[part.first_reader : part.first_reader + part.n_readers, inside]
            out.addmm_(weights, self.nodes[inside])

    def _read_output(self, out: Tensor) -> None:
        self.read_group(out, len(self.mask) - 1, len(self.nodes))

    def start_backward(self) -> None:
        pass

    def grad_group(self, group: LayerGroup) -> None:
        first, after = group.parts[0].n_earlier_nodes, group.end_reader
        nodes = group.end_node - first
        weights = self.mask[after:, first : group.end_node]
        self.grads = torch.mm(weights.t(), self.inputs[after - self.first_reader :], out=self.scratch[:nodes])

    def grad_nodes(self, layer: int, part: LayerSlice, group: LayerGroup) -> Tensor:
        first, count = part.n_earlier_nodes, self.graph.n_heads + 1
        grad_nodes = self.grads[first - group.parts[0].n_earlier_nodes :][:count]
        after, end = part.first_reader + part.n_readers, group.end_reader
        if after < end:
            gradients = self.inputs[after - self.first_reader : end - self.first_reader]
            grad_nodes.addmm_(self.mask[after:end, first : first + count].t(), gradients)
        return grad_nodes


class SparseMask:
    """The edges whose weight is not 1, sorted once by the layer of their reader and once by that of their source.

    Edges from a head to the MLP of its own layer are left out: the pass adds those by themselves. `output` counts as
    the layer after the last, `embed` as the layer before the first.

    Args:
        graph: the graph.
        edge_readers, edge_sources: index of each edge's reader and source, int64 [E].
        weights: mask weights [E].
        edges: indices of the edges that differ from 1, int64 [X].
    """

    def __init__(
        self, graph: EdgeGraph, edge_readers: Tensor, edge_sources: Tensor, weights: Tensor, edges: Tensor
    ) -> None:
        readers, sources = edge_readers[edges], edge_sources[edges]
        reader_layers = readers // (graph.head_readers + 1)
        source_layers = (sources + graph.n_heads) // (graph.n_heads + 1) - 1  # -1 for `embed`
        between = source_layers < reader_layers  # not from a head to the MLP of its own layer
        layers = torch.arange(graph.n_layers + 2, device=weights.device)
        self._orders = []
        for layer_of_edge in (reader_layers[between], source_layers[between]):
            layer_of_edge, order = layer_of_edge.sort(stable=True)
            chosen = edges[between][order]
            ends = torch.searchsorted(layer_of_edge, layers).tolist()
            self._orders.append((ends, readers[between][order], sources[between][order], weights[chosen] - 1))

    def edges_into(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Reader, source and weight minus 1 of the edges that end in a layer: [x] each."""
        return self._slice(0, layer)

    def edges_out_of(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same of the edges that start in a layer."""
        return self._slice(1, layer)

    def _slice(self, order: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        ends, *columns = self._orders[order]
        return tuple(column[ends[layer] : ends[layer + 1]] for column in columns)


class RunningSumReads(MaskedReads):
    """r = Σ (x - μ) + Σ μ + Σ over the edges that differ (m - 1) (x - μ).

    Args:
        sparse: the edges whose weight is not 1.
        others: as for `MaskedReads`.
    """

    def __init__(self, sparse: SparseMask, *args) -> None:
        super().__init__(*args)
        self.sparse = sparse
        # in half precision, the rounding error of a large output would stay in a read that it is subtracted from
        self.dtype = torch.promote_types(self.nodes.dtype, torch.float32)
        self.running_sum, self.n_summed = self._zeros(), 0

    def _zeros(self) -> Tensor:
        return self.nodes.new_zeros(self.nodes.shape[1], dtype=self.dtype)

    def _sums_in(self, out: Tensor) -> Tensor:
        """Where sums that `out` will hold are made: `out` itself, or memory of the same shape in float32."""
        return out if out.dtype == self.dtype else torch.empty_like(out, dtype=self.dtype)

    def _add_corrections(self, sums: Tensor, rows: Tensor, added: Tensor, excess: Tensor) -> None:
        """Add to the named rows of `sums` [k, N * D] the terms `added` [x, N * D] times `excess` [x]; overwrites
        `added`."""
        if len(excess):
            sums.index_add_(0, rows, added.to(self.dtype).mul_(excess[:, None]))

    def continue_from(self, earlier: "RunningSumReads") -> None:
        super().continue_from(earlier)
        self._continue(earlier)

    def continue_backward(self, later: "RunningSumReads") -> None:
        self._continue(later)

    def _continue(self, other: "RunningSumReads") -> None:
        self.running_sum.copy_(other.running_sum)
        self.n_summed = other.n_summed

    def read_group(self, out: Tensor, first_reader: int, n_nodes: int) -> None:
        pass

    def _read_layer(self, out: Tensor, layer: int, part: LayerSlice, n_before_group: int) -> None:
        self._read(out, part.first_reader, part.n_earlier_nodes, layer)

    def _read_output(self, out: Tensor) -> None:
        self._read(out, len(self.mask) - 1, len(self.nodes), self.graph.n_layers)

    def _read(self, out: Tensor, first_reader: int, n_nodes: int, layer: int) -> None:
        self.running_sum += self.nodes[self.n_summed : n_nodes].sum(0, dtype=self.dtype)
        self.n_summed = n_nodes
        sums = self._sums_in(out)
        if self.value_sums is None:
            sums.copy_(self.running_sum.expand_as(sums))
        else:
            self.value_sums.write(sums, first_reader, plus=self.running_sum)
        readers, sources, excess = self.sparse.edges_into(layer)
        self._add_corrections(sums, readers - first_reader, self.nodes[sources], excess)
        if sums is not out:
            out.copy_(sums)

    def start_backward(self) -> None:
        # from here on the sum of the gradients of all readers that come later
        self.running_sum, self.n_summed = self._zeros(), len(self.mask)

    def grad_group(self, group: LayerGroup) -> None:
        pass

    def grad_nodes(self, layer: int, part: LayerSlice, group: LayerGroup) -> Tensor:
        after, first = part.first_reader + part.n_readers, self.first_reader
        self.running_sum += self.inputs[after - first : self.n_summed - first].sum(0, dtype=self.dtype)
        self.n_summed = after
        grad_nodes = self.scratch[: self.graph.n_heads + 1]
        sums = self._sums_in(grad_nodes)
        sums.copy_(self.running_sum.expand_as(sums))
        readers, sources, excess = self.sparse.edges_out_of(layer)
        rows = self.inputs[readers - first if first else readers]
        self._add_corrections(sums, sources - part.n_earlier_nodes, rows, excess)
        if sums is not grad_nodes:
            grad_nodes.copy_(sums)
        return grad_nodes
