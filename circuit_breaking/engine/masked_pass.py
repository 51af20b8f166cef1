"""One forward and its hand-written backward through a model with a weight on every edge (layer 1).

Shapes: B batch, T position, N tokens = B * T, P sources, R readers, H heads, D width, E edges.

How it is fast:
- Node outputs live in one preallocated stack, stored as x_i - μ_i, so that means cost one addition a reader:
  r_j = Σ_i m_ij (x_i - μ_i) + Σ_i μ_i. The readers of a few layers, a group, are one product
  [R, P'] · [P', N * D] over the P' nodes before the group; what they read of each other's layers is added on the way.
- Where most weights are 1, as in a mask that can be saved, a running sum of the nodes takes the place of the product,
  and only the edges whose weight differs are added apart. The backward does the same with the readers' gradients.
- Walking the layers in reverse, the gradient of all edges into a group is one product. The gradients of a layer's
  readers take the place of what they read. Nodes and readers are rows of one memory, which the next pass uses again.
- A small pass on a GPU is replayed as a CUDA graph (`replays`).
- Autograd keeps what attention and the MLP need, nothing else, and not even that with `model.recompute`: what the
  readers read is there in the backward, so one layer at a time is computed again. Model weights are frozen.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from circuit_breaking.engine.sparse_mask import Exceptions
from circuit_breaking.graph import EdgeGraph, LayerSlice

# Layers that read all earlier nodes in one product, and whose nodes all later readers give their gradients to in one:
# a group of four, or more where they are narrow. Products of so many rows run at full speed, and what they make stays
# small beside the stack.
GROUP_LAYERS, GROUP_NODES = 4, 52
# On a GPU the product of masks and node outputs costs less than to find out whether a running sum would do, as long as
# a layer's share of it takes fewer multiplications and additions than a GPU does while Python launches a layer.
SMALL_PRODUCT = 1.5e11


def layer_groups(graph: EdgeGraph) -> list[list[LayerSlice]]:
    """The layers, in groups whose readers are served by one product."""
    size = max(GROUP_LAYERS, GROUP_NODES // (graph.n_heads + 1))
    return [graph.layers[start : start + size] for start in range(0, graph.n_layers, size)]


def inner(a: Tensor, b: Tensor) -> Tensor:
    """a [R, F] · b [P, F]ᵀ, where F is far larger than R and P.

    (One such product keeps few of a GPU's processors busy, so there F is taken in parts at the same time.)
    """
    parts = math.gcd(a.shape[1], 256) if a.is_cuda else 1
    if parts == 1:
        return a @ b.t()
    a, b = (x.view(len(x), parts, -1).transpose(0, 1) for x in (a, b))
    return torch.bmm(a, b.transpose(1, 2)).sum(0)


def is_small(model: Any, tokens: Tensor) -> bool:
    """Whether a pass is on a GPU and its mask products are small there."""
    operations = 6 * len(model.edge_readers) * tokens.numel() * model.embedding.shape[1]
    return tokens.is_cuda and operations < SMALL_PRODUCT * model.graph.n_layers


class OutputRead(torch.autograd.Function):
    """What `output` reads [N, D], as a function of the mask weights [E] and of means [P, D] where those are learned."""

    @staticmethod
    def forward(ctx, weights: Tensor, means: Tensor | None, model: Any, tokens: Tensor) -> Tensor:
        keep, learned = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[1]
        run = model.replays.start(model, weights.detach(), tokens, keep, learned)
        run = run or Pass(model, weights.detach(), tokens, keep)
        read = run.forward()
        if keep:
            ctx.run = run
        else:
            run.release()
        return read

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return *ctx.run.backward(gradient, means=ctx.needs_input_grad[1]), None, None


class Workspace:
    """Memory that one pass after another uses: on a CPU, pages that are new cost as much as what is written to them."""

    def __init__(self) -> None:
        self.free: Tensor | None = None

    def take(self, count: int, like: Tensor) -> Tensor:
        """At least `count` numbers of any value, of the type of `like`; nobody else's until they are given back."""
        free, self.free = self.free, None
        if free is None or len(free) < count or free.dtype != like.dtype or free.device != like.device:
            return like.new_empty(count)
        return free

    def give_back(self, memory: Tensor) -> None:
        """Take back what `take` gave. (A GPU's memory goes to torch, which hands it out again at no cost.)"""
        if memory.device.type == "cpu":
            self.free = memory


class Pass:
    """One forward and its backward over one batch. The backward uses the stack up; a second one makes it anew.

    `constants` are what the model's `offsets` and `base` are, or were; a pass that is given them shares no beginnings.
    """

    def __init__(
        self, model: Any, weights: Tensor, tokens: Tensor, keep: bool,
        constants: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.graph, self.keep = model, model.graph, keep
        self.batch, self.length = tokens.shape
        self.tokens = tokens
        self.mask_dtype, self.weights = weights.dtype, weights
        self.offsets, self.base = constants or (model.offsets, model.base)
        self.beginnings = model.beginnings if constants is None else None
        self.width = model.embedding.shape[1]
        self.flat = tokens.numel() * self.width  # one node's output, as one row
        self.rotary = model.rotary_tables(self.length, tokens.device)
        self.memory: Tensor | None = None
        self.read_mask()

    def read_mask(self) -> None:
        """Take the weights as they are now."""
        weights = self.weights.to(self.model.dtype)
        self.mask, self.exceptions = self._matrix(weights), None
        if not is_small(self.model, self.tokens):
            differing = (weights != 1).nonzero()[:, 0]
            if len(differing) <= len(self.mask):
                self.exceptions = Exceptions(self.model, weights, differing)

    def _matrix(self, weights: Tensor | None = None) -> Tensor:
        """[R, P], zero where there is no edge; with the weights [E] of those that there are, if given."""
        matrix = self.model.embedding.new_zeros(len(self.graph.readers), len(self.graph.sources))
        if weights is not None:
            matrix[self.model.edge_readers, self.model.edge_sources] = weights
        return matrix

    def _fill(self, rows: Tensor, constants: Tensor) -> None:
        """Set [k, N, D] or [k, N * D] to constants [k, 1 or max T, D], which may differ by position."""
        rows = rows.view(rows.shape[0], self.batch, self.length, self.width)
        rows.copy_(constants[:, None, : self.length])

    def _allocate(self) -> None:
        """Take the memory of the pass: a row [N * D] for each node and reader, and the gradients of a group's nodes.

        Without a backward the readers of one group are all there are at a time.
        """
        graph = self.graph
        largest = len(self.model.groups[0]) if self.model.groups else 0  # only the last one may be smaller
        sources = len(graph.sources)
        readers = len(graph.readers) if self.keep else largest * (graph.head_readers + 1)
        scratch = largest * (graph.n_heads + 1) if self.keep else 0
        rows = sources + readers + scratch
        self.memory = self.model.workspace.take(rows * self.flat, self.model.embedding)
        parts = self.memory[: rows * self.flat].view(rows, self.flat).split([sources, readers, scratch])
        self.rows, self.reads, self.scratch = parts
        self.stack = self.rows.view(sources, -1, self.width)

    def release(self) -> None:
        """Give the memory of the pass back."""
        self.model.workspace.give_back(self.memory)
        self.memory = self.stack = self.rows = self.reads = self.scratch = None

    def forward(self) -> Tensor:
        model, graph, sources = self.model, self.graph, len(self.graph.sources)
        n_tokens, heads = self.tokens.numel(), graph.n_heads
        self._allocate()
        stack, rows = self.stack, self.rows
        self.total, self.counted = rows.new_zeros(self.flat), 0
        beginnings, begin = self.beginnings, 0
        if beginnings is not None and not self.keep:
            begin = beginnings.load(self.tokens, self.weights, graph, model.edge_readers, rows)
        self._fill(stack[:1], self.offsets[:1])
        embedding = F.embedding(self.tokens, model.embedding)
        if model.positions is not None:
            embedding += model.positions[: self.length]
        stack[0] += embedding.view(n_tokens, -1)
        self.saved: list[tuple[Tensor, ...] | None] = [None] * begin
        for group in model.groups:
            parts = [part for part in group if part.sources // (heads + 1) >= begin]  # of the layers still to do
            if not parts:
                continue
            start, end = parts[0].reader, parts[-1].reader + parts[-1].rows
            reads = self.reads[start:end] if self.keep else self.reads[: end - start]
            if self.exceptions is None:
                self._read(reads, start, group[0].sources)
            for part in parts:
                layer, first, mlp = len(self.saved), part.sources, part.sources + heads
                block = model.blocks[layer]
                read = reads[part.reader - start :][: part.rows]
                if self.exceptions is None:
                    self._add_group(read, part, group[0].sources)
                else:
                    self._read_sum(read, part.reader, first, layer)
                read = read.view(part.rows, n_tokens, self.width)
                inverse, qkv, z = self._heads(layer, read)
                self._fill(stack[first:mlp], self.offsets[first:mlp])
                stack[first:mlp].baddbmm_(z.detach(), block.w_o)
                if part.own:
                    read[-1].view(-1).addmv_(rows[first:mlp].t(), self.mask[part.reader + part.rows - 1, first:mlp])
                hidden, read_mlp = self._traced(block.mlp, read[-1])
                self._fill(stack[mlp : mlp + 1], self.offsets[mlp : mlp + 1])
                stack[mlp].addmm_(hidden.detach(), block.w_down)
                kept = (inverse, None if model.recompute else (qkv, z, read_mlp, hidden))
                self.saved.append(kept if self.keep else None)
        if beginnings is not None:
            beginnings.keep(self.tokens, self.weights, rows)
        output, reader = rows.new_empty(1, self.flat), len(self.mask) - 1  # not in the workspace, as others will see it
        if self.exceptions is None:
            self._read(output, reader, sources)
        else:
            self._read_sum(output, reader, sources, graph.n_layers)
        return output.view(n_tokens, self.width)

    def _heads(self, layer: int, read: Tensor, inverse: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """1 / the divisors of the norms of a layer's reads [R, N, D], what they are projected to, and the heads' z.

        With the divisors of the first time the reads are taken as that left them, and all is computed again.
        """
        block = self.model.blocks[layer]
        qkv, inverse = block.qkv(read[:-1], inverse)
        z, qkv = self._traced(lambda x: block.attention(x, self.batch, self.rotary), qkv)
        return inverse, qkv, z

    def _saved_of(self, layer: int, part: LayerSlice) -> tuple[Tensor, ...]:
        """What the backward of a layer needs of its forward, computed again where it was not kept."""
        inverse, kept = self.saved[layer]
        self.saved[layer] = None
        if kept is not None:
            return inverse, *kept
        read = self.reads[part.reader : part.reader + part.rows].view(part.rows, -1, self.width)
        hidden, read_mlp = self._traced(self.model.blocks[layer].mlp, read[-1])
        return *self._heads(layer, read, inverse), read_mlp, hidden

    def _traced(self, function, read: Tensor) -> tuple[Tensor, Tensor]:
        """`function(read)` with its graph from `read` on, where a backward is to come."""
        with torch.set_grad_enabled(self.keep):
            # `data`: what autograd saves is not told of writes to other rows of the same storage, which cannot harm it
            read = read.data.requires_grad_(self.keep)
            return function(read), read

    def _read(self, out: Tensor, start: int, sources: int) -> None:
        """Set `out` [k, N * D] to what k readers from `start` on get: the first `sources` nodes, and means."""
        weights, nodes = self.mask[start : start + len(out), :sources], self.rows[:sources]
        if self.base is None:
            torch.mm(weights, nodes, out=out)
        else:
            self._fill_base(out, start)
            out.addmm_(weights, nodes)

    def _fill_base(self, out: Tensor, start: int) -> None:
        """Set `out` [k, N * D] to the sum of the means of all nodes that k readers from `start` on read."""
        self._fill(out, self.base[self.model.sources_read[start : start + len(out)]])

    def _add_group(self, read: Tensor, part: LayerSlice, before: int) -> None:
        """Add to a layer's reads [R, N * D] the nodes of its group's earlier layers, from node `before` on."""
        if before < part.sources:
            weights = self.mask[part.reader : part.reader + part.rows, before : part.sources]
            read.addmm_(weights, self.rows[before : part.sources])

    def _read_sum(self, out: Tensor, start: int, sources: int, layer: int) -> None:
        """As `_read` for readers of one layer, by the running sum of the nodes."""
        self.total += self.rows[self.counted : sources].sum(0)
        self.counted = sources
        if self.base is None:
            out.copy_(self.total.expand_as(out))
        else:
            self._fill_base(out, start)
            out += self.total
        readers, nodes, excess = self.exceptions.into(layer)
        if len(excess):
            out.index_add_(0, readers - start, self.rows[nodes].mul_(excess[:, None]))

    def backward(self, gradient: Tensor, means: bool) -> tuple[Tensor, Tensor | None]:
        """Gradients of the mask weights [E] and, if wanted, of the means [P, D]."""
        if self.memory is None:
            self.forward()
        graph, mask, rows, reads, heads = self.graph, self.mask, self.rows, self.reads, self.graph.n_heads
        readers, sources = mask.shape
        edge_gradient = self._matrix()
        edge_gradient[-1] = rows[:sources] @ gradient.reshape(-1)
        reads[-1] = gradient.reshape(-1)
        self.total, self.counted = rows.new_zeros(self.flat), readers
        layer = graph.n_layers
        for group in reversed(self.model.groups):
            before, end = group[0].sources, group[-1].reader + group[-1].rows
            nodes = len(group) * (heads + 1)
            if self.exceptions is None:
                at_group = torch.mm(mask[end:, before : before + nodes].t(), reads[end:], out=self.scratch[:nodes])
            for part in reversed(group):
                layer -= 1
                block = self.model.blocks[layer]
                inverse, qkv, z, read_mlp, hidden = self._saved_of(layer, part)
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
                    if not rows.is_cuda:
                        edge_gradient[after - 1, first:mlp] = rows[first:mlp] @ at_mlp_read.view(-1)
                    at_heads.addr_(mask[after - 1, first:mlp], at_mlp_read.view(-1))
                at_z = torch.bmm(at_heads.view(heads, -1, self.width), block.w_o.transpose(1, 2))
                (at_qkv,) = torch.autograd.grad(z, qkv, at_z)

                here = reads[part.reader : after]
                block.qkv.backward_(here[:-1].view(len(qkv), -1, self.width), inverse, qkv.detach(), at_qkv)
                here[-1] = at_mlp_read.view(-1)
                if before < first and not rows.is_cuda:
                    edge_gradient[part.reader : after, before:first] = here @ rows[before:first].t()
            # on a GPU the edges within the group too: a third of the products for nothing, in a quarter of the launches
            start, counted = group[0].reader, before + nodes * rows.is_cuda
            edge_gradient[start:end, :counted] = inner(reads[start:end], rows[:counted])
        at_edges = edge_gradient[self.model.edge_readers, self.model.edge_sources].to(self.mask_dtype)
        at_means = None
        if means:
            cut = self._matrix(torch.ones_like(at_edges, dtype=mask.dtype)) - mask  # 1 - m where there is an edge
            at_means = cut.t() @ reads.view(readers, -1, self.width).sum(1)
        self.release()
        return at_edges, at_means

    def _at_nodes_sum(self, first: int, after: int, layer: int) -> Tensor:
        """Gradient at a layer's nodes by the running sum of the gradients of all later readers: [H + 1, N * D]."""
        self.total += self.reads[after : self.counted].sum(0)
        self.counted = after
        at_nodes = self.scratch[: self.graph.n_heads + 1]
        at_nodes.copy_(self.total.expand_as(at_nodes))
        readers, nodes, excess = self.exceptions.out_of(layer)
        if len(excess):
            at_nodes.index_add_(0, nodes - first, self.reads[readers].mul_(excess[:, None]))
        return at_nodes
