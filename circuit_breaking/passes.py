"""One forward and its hand-written backward through a model with a weight on every edge (layer 1).

Shapes: B batch, T position, N tokens = B * T, P sources, R readers, H heads, D width, E edges.

How it is fast:
- Node outputs live in one preallocated stack, stored as x_i - μ_i, so that means cost one addition a reader:
  r_j = Σ_i m_ij (x_i - μ_i) + Σ_i μ_i. The readers of a few layers, a group, are one product
  [R, P'] · [P', N * D] over the P' nodes before the group; what they read of each other's layers is added on the way.
- Where most weights are 1, as in a mask that can be saved, a running sum of the nodes takes the place of the product,
  and only the edges whose weight differs are added apart. The backward does the same with the readers' gradients.
- Walking the layers in reverse, the gradient of all edges into a group is one product. Once a layer is done, nothing
  reads its node outputs again, so the gradients of its readers take their place: one stack serves both passes.
- Autograd keeps what attention and the MLP's nonlinearity need, nothing else. Model weights are frozen.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from circuit_breaking.graph import EdgeGraph, LayerSlice

# Layers whose readers read all earlier nodes in one product are grouped up to about this many readers: enough for a
# matrix product to run at full speed, few enough for what it makes to stay small beside the stack.
GROUP_READERS = 52


def layer_groups(graph: EdgeGraph) -> list[list[LayerSlice]]:
    """The layers, in groups whose readers are served by one product."""
    size = max(1, GROUP_READERS // (graph.head_readers + 1))
    return [graph.layers[start : start + size] for start in range(0, graph.n_layers, size)]


class OutputRead(torch.autograd.Function):
    """What `output` reads [N, D], as a function of the mask weights [E] and of means [P, D] where those are learned."""

    @staticmethod
    def forward(ctx, weights: Tensor, means: Tensor | None, model: Any, tokens: Tensor) -> Tensor:
        run = Pass(model, weights.detach(), tokens, keep=any(ctx.needs_input_grad[:2]))
        ctx.run = run
        return run.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return *ctx.run.backward(gradient, means=ctx.needs_input_grad[1]), None, None


class Exceptions:
    """The edges whose weight is not 1, of those between layers or into `output`, in two orders.

    `into(layer)` are those that a layer's readers read, `out_of(layer)` those that its nodes feed: each as the indices
    of reader and source and the weight less 1. `output` counts as the layer after the last.
    """

    def __init__(self, model: Any, weights: Tensor, edges: Tensor) -> None:
        graph, device = model.graph, weights.device
        readers, sources = model.edge_readers[edges], model.edge_sources[edges]
        reader_layers = readers // (graph.head_readers + 1)
        source_layers = (sources + graph.n_heads) // (graph.n_heads + 1) - 1  # -1 for `embed`
        between = source_layers < reader_layers  # not from a head to its own layer's MLP
        layers = torch.arange(graph.n_layers + 2, device=device)
        self._orders = []
        for of_edge in (reader_layers[between], source_layers[between]):
            of_edge, order = of_edge.sort(stable=True)
            chosen = edges[between][order]
            ends = torch.searchsorted(of_edge, layers).tolist()
            self._orders.append((ends, readers[between][order], sources[between][order], weights[chosen] - 1))

    def _of(self, order: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        ends, *columns = self._orders[order]
        return tuple(column[ends[layer] : ends[layer + 1]] for column in columns)

    def into(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._of(0, layer)

    def out_of(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._of(1, layer)


class Pass:
    """One forward and its backward over one batch. The backward uses the stack up; a second one makes it anew."""

    def __init__(self, model: Any, weights: Tensor, tokens: Tensor, keep: bool) -> None:
        self.model, self.graph, self.keep = model, model.graph, keep
        self.batch, self.length = tokens.shape
        self.tokens = tokens
        self.mask_dtype = weights.dtype
        self.width = model.embedding.shape[1]
        self.flat = tokens.numel() * self.width  # one node's output, as one row
        weights = weights.to(model.dtype)
        self.mask = self._matrix(weights)
        differing = (weights != 1).nonzero()[:, 0]
        few = len(differing) <= len(self.mask)
        self.exceptions = Exceptions(model, weights, differing) if few else None
        self.stack: Tensor | None = None

    def _matrix(self, weights: Tensor | None = None) -> Tensor:
        """[R, P], zero where there is no edge; with the weights [E] of those that there are, if given."""
        matrix = self.model.embedding.new_zeros(len(self.graph.readers), len(self.graph.sources))
        if weights is not None:
            matrix[self.model.edge_readers, self.model.edge_sources] = weights
        return matrix

    def _fill(self, rows: Tensor, constants: Tensor) -> None:
        """Set [k, N, D] to constants [k, 1 or max T, D], which may differ by position."""
        rows = rows.view(rows.shape[0], self.batch, self.length, self.width)
        rows.copy_(constants[:, None, : self.length])

    def forward(self) -> Tensor:
        model, graph, sources = self.model, self.graph, len(self.graph.sources)
        n_tokens, heads = self.tokens.numel(), graph.n_heads
        # one row more than there are nodes: the backward keeps the gradient of `output` there
        self.stack = stack = model.embedding.new_empty(sources + 1, n_tokens, self.width)
        self.rows = rows = stack.view(sources + 1, self.flat)
        self.total, self.counted = rows.new_zeros(self.flat), 0
        self._fill(stack[:1], model.offsets[:1])
        embedding = F.embedding(self.tokens, model.embedding)
        if model.positions is not None:
            embedding += model.positions[: self.length]
        stack[0] += embedding.view(n_tokens, -1)
        rotary = model.rotary_tables(self.length, self.tokens.device)
        self.saved: list[tuple[Tensor, ...] | None] = []
        for group in model.groups:
            if self.exceptions is None:
                reads = self._read(group[0].reader, group[-1].reader + group[-1].rows, group[0].sources)
            for part in group:
                block, first, mlp = model.blocks[len(self.saved)], part.sources, part.sources + heads
                if self.exceptions is None:
                    read = reads[part.reader - group[0].reader :][: part.rows]
                    self._add_group(read, part, group[0].sources)
                else:
                    read = self._read_sum(part.reader, part.rows, first, len(self.saved))
                z, read_heads = self._traced(lambda x, block=block: block.heads(x, self.batch, rotary), read[:-1])
                self._fill(stack[first:mlp], model.offsets[first:mlp])
                stack[first:mlp].baddbmm_(z.detach(), block.w_o)
                if part.own:
                    read[-1].view(-1).addmv_(rows[first:mlp].t(), self.mask[part.reader + part.rows - 1, first:mlp])
                hidden, read_mlp = self._traced(block.mlp, read[-1])
                self._fill(stack[mlp : mlp + 1], model.offsets[mlp : mlp + 1])
                stack[mlp].addmm_(hidden.detach(), block.w_down)
                self.saved.append((read_heads, z, read_mlp, hidden) if self.keep else None)
        readers = len(self.mask)
        if self.exceptions is None:
            return self._read(readers - 1, readers, sources)[0]
        return self._read_sum(readers - 1, 1, sources, graph.n_layers)[0]

    def _traced(self, function, read: Tensor) -> tuple[Tensor, Tensor]:
        """`function(read)` with its graph from `read` on, where a backward is to come."""
        with torch.set_grad_enabled(self.keep):
            # `data`: what autograd saves is not told of writes to other rows of the same storage, which cannot harm it
            read = read.data.requires_grad_(self.keep)
            return function(read), read

    def _read(self, start: int, end: int, sources: int) -> Tensor:
        """What the readers from `start` to `end` get from the first `sources` nodes, and all their means: [., N, D]."""
        out = self.stack.new_empty(end - start, self.tokens.numel(), self.width)
        flat, weights, nodes = out.view(len(out), -1), self.mask[start:end, :sources], self.rows[:sources]
        if self.model.base is None:
            torch.mm(weights, nodes, out=flat)
        else:
            self._fill(out, self.model.base[self.model.sources_read[start:end]])
            flat.addmm_(weights, nodes)
        return out

    def _add_group(self, read: Tensor, part: LayerSlice, before: int) -> None:
        """Add to a layer's reads [R, N, D] the nodes of its group's earlier layers, from node `before` on."""
        if before < part.sources:
            weights = self.mask[part.reader : part.reader + part.rows, before : part.sources]
            read.view(part.rows, -1).addmm_(weights, self.rows[before : part.sources])

    def _read_sum(self, start: int, count: int, sources: int, layer: int) -> Tensor:
        """As `_read` for `count` readers of one layer, by the running sum of the nodes: [count, N, D]."""
        self.total += self.rows[self.counted : sources].sum(0)
        self.counted = sources
        out = self.stack.new_empty(count, self.tokens.numel(), self.width)
        flat = out.view(count, -1)
        if self.model.base is None:
            flat.copy_(self.total.expand_as(flat))
        else:
            self._fill(out, self.model.base[self.model.sources_read[start : start + count]])
            flat += self.total
        readers, nodes, excess = self.exceptions.into(layer)
        if len(excess):
            flat.index_add_(0, readers - start, self.rows[nodes].mul_(excess[:, None]))
        return out

    def backward(self, gradient: Tensor, means: bool) -> tuple[Tensor, Tensor | None]:
        """Gradients of the mask weights [E] and, if wanted, of the means [P, D]."""
        if self.stack is None:
            self.forward()
        graph, mask, stack, flat, heads = self.graph, self.mask, self.stack, self.flat, self.graph.n_heads
        rows, self.stack, self.rows = self.rows, None, None
        readers, sources = mask.shape
        edge_gradient = self._matrix()
        edge_gradient[-1] = rows[:sources] @ gradient.reshape(-1)
        # Gradients of the readers. Row for row they fit where the outputs of the same layer's nodes were, unless
        # queries, keys and values read apart.
        self.reads = reads = stack.new_empty(readers, flat) if graph.split_qkv else rows[1:]
        reads[-1] = gradient.reshape(-1)
        self.total, self.counted = rows.new_zeros(flat), readers
        layer = graph.n_layers
        for group in reversed(self.model.groups):
            before, end = group[0].sources, group[-1].reader + group[-1].rows
            nodes = len(group) * (heads + 1)
            if self.exceptions is None:
                at_group = torch.mm(mask[end:, before : before + nodes].t(), reads[end:])
            for part in reversed(group):
                layer -= 1
                block, (read_heads, z, read_mlp, hidden) = self.model.blocks[layer], self.saved[layer]
                first, mlp, after = part.sources, part.sources + heads, part.reader + part.rows
                if self.exceptions is not None:
                    at_nodes = self._at_nodes_sum(first, after, layer)
                else:
                    at_nodes = at_group[first - before :][: heads + 1]
                    if after < end:
                        at_nodes.addmm_(mask[after:end, first : mlp + 1].t(), reads[after:end])
                at_heads, at_mlp = at_nodes[:heads], at_nodes[heads].view(-1, self.width)

                (at_mlp_read,) = torch.autograd.grad(hidden, read_mlp, at_mlp @ block.w_down.t())
                if part.own:
                    edge_gradient[after - 1, first:mlp] = rows[first:mlp] @ at_mlp_read.view(-1)
                    at_heads.addr_(mask[after - 1, first:mlp], at_mlp_read.view(-1))
                at_z = torch.bmm(at_heads.view(heads, -1, self.width), block.w_o.transpose(1, 2))
                (at_head_reads,) = torch.autograd.grad(z, read_heads, at_z)
                self.saved[layer] = None

                here = reads[part.reader : after]
                here[:-1] = at_head_reads.view(-1, flat)
                here[-1] = at_mlp_read.view(-1)
                if before < first:
                    edge_gradient[part.reader : after, before:first] = here @ rows[before:first].t()
            start = group[0].reader
            edge_gradient[start:end, :before] = reads[start:end] @ rows[:before].t()
        self.reads = None
        at_edges = edge_gradient[self.model.edge_readers, self.model.edge_sources].to(self.mask_dtype)
        if not means:
            return at_edges, None
        cut = self._matrix(torch.ones_like(at_edges, dtype=mask.dtype)) - mask  # 1 - m where there is an edge
        return at_edges, cut.t() @ reads.view(readers, -1, self.width).sum(1)

    def _at_nodes_sum(self, first: int, after: int, layer: int) -> Tensor:
        """Gradient at a layer's nodes by the running sum of the gradients of all later readers: [H + 1, N * D]."""
        self.total += self.reads[after : self.counted].sum(0)
        self.counted = after
        at_nodes = self.total.expand(self.graph.n_heads + 1, -1).clone()
        readers, nodes, excess = self.exceptions.out_of(layer)
        if len(excess):
            at_nodes.index_add_(0, nodes - first, self.reads[readers].mul_(excess[:, None]))
        return at_nodes
