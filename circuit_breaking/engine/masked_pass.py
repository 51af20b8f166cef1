"""One forward and its hand-written backward through a network with a weight on every edge.

Layer by layer the forward gives every reader its masked read (`reads`), runs attention and the MLP on it
(`network.LayerBlock`), and writes the outputs of the layer's nodes. The backward walks the layers in reverse and yields
the gradient of every edge weight, ∂L/∂m_ij = (x_i - μ_i) · ∂L/∂r_j, with one matrix product for each group of layers.

The life of each buffer (`network.PassBuffers`, [rows, N * D]):

    buffer          rows                    forward                            backward
    node_outputs    P nodes                 x_i - μ_i, written layer by layer  read for the gradients of the edges
    reader_inputs   R readers (without a    r_j; the norm before attention     r_j of a layer is read, then replaced by
                    backward: of a group)   centres it in place                ∂L/∂r_j, which earlier layers read;
                                                                               zero before position ablate_from
    grad_scratch    nodes of a group        unused                             ∂L/∂x_i of the nodes of one group
    saved           one entry a layer       norm divisors, sums before norms   used once and dropped; inputs and
                                            after attention and MLP, and the   outputs are computed again with gradient
                                            inputs and outputs of both         checkpointing

`backward` overwrites the buffers and gives their memory back; calling it a second time reruns the forward. The
model's weights are frozen: autograd sees attention and the MLP of one layer at a time, and nothing else.

Shapes: B batch, T position, N = B * T tokens, P nodes that write, R readers, H heads, D width, K head width, F width of
the MLP, E edges.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from circuit_breaking.engine.network import LayerGroup, Network, PassBuffers, PassInputs, Workspace
from circuit_breaking.engine.norms import OutputNorm
from circuit_breaking.engine.prefix_cache import PrefixCache
from circuit_breaking.engine.products import inner_products, precise_type, products_with
from circuit_breaking.engine.reads import DenseReads, MaskedReads, RunningSumReads, SparseMask, product_is_small
from circuit_breaking.graph import LayerSlice
from circuit_breaking.runs.devices import without_autocast


class MaskedForward(torch.autograd.Function):
    """What `output` reads [N, D], as a function of the edge weights [E] and, if learned, of ablation constants [P, D].

    `run` is the pass that computes it: a `MaskedPass` for these weights, or a `ReplayedPass` with the same methods.
    """

    @staticmethod
    def forward(ctx, weights: Tensor, constants: Tensor | None, run: "MaskedPass") -> Tensor:
        read = run.forward()
        if any(ctx.needs_input_grad[:2]):
            ctx.run = run
        else:
            run.release()
        return read

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        with without_autocast(gradient.device):
            edges, constants = ctx.needs_input_grad[:2]
            return *ctx.run.backward(gradient, edges, constants), None


class MaskedPass:
    """One forward over one batch, and its backward.

    Args:
        network: the network.
        inputs: tokens, mask and what cut edges carry.
        workspace: where the memory of the pass comes from.
        save_for_backward: whether a backward will follow.
        prefix_cache: node outputs to start from and to add to, if no backward follows.
    """

    def __init__(
        self, network: Network, inputs: PassInputs, workspace: Workspace, save_for_backward: bool,
        prefix_cache: PrefixCache | None = None,
    ) -> None:  # fmt: skip
        self.network, self.inputs, self.workspace = network, inputs, workspace
        self.save_for_backward, self.prefix_cache = save_for_backward, prefix_cache
        self.batch, self.length = inputs.tokens.shape
        self.width = network.embedding.shape[1]
        self.buffers: PassBuffers | None = None
        self.read_mask()

    @property
    def passes(self) -> "list[MaskedPass]":
        """The passes of all devices: here this one alone."""
        return [self]

    def read_mask(self) -> None:
        """Take the edge weights as they are now."""
        weights = self.inputs.mask.to(self.network.embedding.dtype)
        self.mask, self.sparse = self.network.mask_matrix(weights), None
        if not product_is_small(self.network, self.inputs.tokens):
            differing = (weights != 1).nonzero()[:, 0]
            if len(differing) <= len(self.mask) and self._leaves_most(differing):
                ends = self.network.edge_readers, self.network.edge_sources
                self.sparse = SparseMask(self.network.graph, *ends, weights, differing)

    def _leaves_most(self, differing: Tensor) -> bool:
        """Whether every reader keeps at least half of its edges. Of a running sum less most of its terms, little but
        its rounding errors would be left."""
        readers = self.network.edge_readers[differing].bincount(minlength=len(self.network.n_read))
        return bool((2 * readers <= self.network.n_read).all())

    def _allocate(self) -> None:
        """Take the memory of the pass, and make the masked reads over it."""
        self.buffers = PassBuffers.take(self.workspace, self.network, self.inputs.tokens, self.save_for_backward)
        sizes = self.batch, self.length, self.inputs.ablate_from
        about = self.network, self.mask, self.inputs.values, self.buffers, *sizes
        self.reads: MaskedReads = DenseReads(*about) if self.sparse is None else RunningSumReads(self.sparse, *about)

    def release(self) -> None:
        """Give the memory of the pass back."""
        self.workspace.give_back(self.buffers.memory)
        self.buffers = self.reads = None

    def node_outputs(self) -> Tensor:
        """What the nodes wrote, less their ablation values: [P, N * D], after `forward`."""
        return self.buffers.node_outputs

    def _fill(self, rows: Tensor, nodes: slice) -> None:
        """Start the outputs of some nodes [k, N, D] with their bias less their ablation value."""
        self.inputs.values.start(rows, nodes, self.batch, self.length)

    def forward(self) -> Tensor:
        """What `output` reads: [N, D]."""
        done = self.begin()
        self.embed()
        self.compute_layers(done)
        return self.read_output()

    def begin(self) -> int:
        """Take the memory of the pass. Returns how many layers have node outputs that are known already."""
        self._allocate()
        if self.prefix_cache is None or self.save_for_backward:
            return 0
        nodes = self.buffers.node_outputs
        return self.prefix_cache.load(self.inputs, self.network.graph, self.network.edge_readers, nodes)

    def compute_layers(self, done: int) -> None:
        """Compute the nodes of the layers, but for the first `done` layers of the model."""
        nodes, reader_inputs = self.buffers.node_outputs_3d, self.buffers.reader_inputs
        # by layer, which those of the first layers of the model are not if other devices compute them
        self.saved: dict[int, tuple[Tensor, ...] | None] = {}
        for group in self.network.groups:
            parts = group.parts[max(done - group.first, 0) :]
            if not parts:
                continue
            start, end = parts[0].first_reader, parts[-1].first_reader + parts[-1].n_readers
            group_inputs = self._rows(start, end) if self.save_for_backward else reader_inputs[: end - start]
            self.reads.read_group(group_inputs, start, group.first_node)
            for layer, part in enumerate(parts, max(done, group.first)):
                layer_inputs = group_inputs[part.first_reader - start :][: part.n_readers]
                self.reads.read_layer(layer_inputs, layer, part, group.first_node)
                self._layer(layer, part, layer_inputs, nodes)
        if self.prefix_cache is not None:
            self.prefix_cache.store(self.inputs, self.buffers.node_outputs)

    def read_output(self) -> Tensor:
        """What `output` reads: [N, D]."""
        nodes = self.buffers.node_outputs
        output = nodes.new_empty(1, nodes.shape[1])  # not in the workspace, since the caller keeps it
        self.reads.read_output(output)
        return output.view(-1, self.width)

    def _rows(self, start: int, end: int) -> Tensor:
        """The inputs of readers [end - start, N * D], if a backward follows."""
        first = self.network.first_reader
        return self.buffers.reader_inputs[start - first : end - first]

    def embed(self) -> None:
        """Write the output of `embed`: token embeddings, and learned positions where there are any."""
        nodes = self.buffers.node_outputs_3d
        self._fill(nodes[:1], slice(0, 1))
        nodes[0] += self.embedded()

    def embedded(self) -> Tensor:
        """The output of `embed` [N, D]."""
        return self.network.embed(self.inputs.tokens)

    def _layer(self, layer: int, part: LayerSlice, layer_inputs: Tensor, nodes: Tensor) -> None:
        """Compute the nodes of one layer [H + 1, N, D] from what its readers get [readers, N * D]."""
        network, block = self.network, self.network.blocks[layer]
        heads = slice(part.n_earlier_nodes, part.n_earlier_nodes + network.graph.n_heads)
        mlp = heads.stop
        layer_inputs = layer_inputs.view(part.n_readers, -1, self.width)
        inverse, qkv, z = self._attend(layer, layer_inputs)
        sums: list[Tensor | None] = [None, None]  # of what heads, and the MLP, write, where a norm comes after them
        self._fill(nodes[heads], heads)
        if block.attention_out_norm is None:
            nodes[heads].baddbmm_(z.detach(), block.w_o)
        else:
            sums[0] = self._write_normed(nodes[heads], z.detach(), block.w_o, block.b_o, block.attention_out_norm)
        if part.n_same_layer_edges:
            self.reads.read_own_heads(layer_inputs[-1].view(-1), part)
        hidden, mlp_input = self._with_graph(block.mlp, layer_inputs[-1])
        self._fill(nodes[mlp : mlp + 1], slice(mlp, mlp + 1))
        if block.mlp_out_norm is None:
            nodes[mlp].addmm_(hidden.detach(), block.w_down)
        else:
            about = hidden.detach()[None], block.w_down[None], block.b_down, block.mlp_out_norm
            sums[1] = self._write_normed(nodes[mlp : mlp + 1], *about)
        activations = None if network.gradient_checkpointing else (qkv, z, mlp_input, hidden)
        self.saved[layer] = (sums, inverse, activations) if self.save_for_backward else None

    def _write_normed(self, rows: Tensor, z: Tensor, weight: Tensor, bias: Tensor, norm: OutputNorm) -> Tensor:
        """Add to rows [n, N, D] the outputs of nodes with a norm after them; return their sum before it [N, D]."""
        outputs = torch.empty_like(rows)
        total = norm.write(outputs, z, weight, bias)
        rows += outputs
        return total

    def _attend(self, layer: int, layer_inputs: Tensor, inverse: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """1 / the norms' divisors, queries, keys and values, and the heads' z, from what the readers get [R, N, D].

        With the divisors of an earlier call, the inputs are taken as that call left them.
        """
        block = self.network.blocks[layer]
        qkv, inverse = block.qkv(layer_inputs[:-1], inverse)
        z, qkv = self._with_graph(lambda x: block.attention(x, self.batch, self.inputs.rotary), qkv)
        return inverse, qkv, z

    def _with_graph(self, function, x: Tensor) -> tuple[Tensor, Tensor]:
        """`function(x)`, and the x from which its autograd graph starts, if a backward will follow."""
        with torch.set_grad_enabled(self.save_for_backward):
            # `data`: autograd does not see writes to other rows of the same storage, which do no harm
            x = x.data.requires_grad_(self.save_for_backward)
            return function(x), x

    def backward(self, gradient: Tensor, edges: bool, constants: bool) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the edge weights [E] and of the ablation constants [P, D], each None if it is not wanted.

        Args:
            gradient: of what `output` reads, [N, D].
            edges, constants: which of them are wanted.
        """
        if self.buffers is None:
            self.forward()
        self.begin_backward()
        grad_matrix = self.output_backward(gradient, edges)
        self.layers_backward(grad_matrix)
        grad_edges = None if grad_matrix is None else self.grad_edges(grad_matrix)
        grad_constants = self.grad_constants() if constants else None
        self.release()
        return grad_edges, grad_constants

    def begin_backward(self) -> None:
        """Called before the backward pass begins."""

    def output_backward(self, gradient: Tensor, edges: bool) -> Tensor | None:
        """Start the backward pass with the gradient [N, D] of what `output` reads.

        Returns the gradients of edges as a matrix [R, P], with the row of `output`; None if `edges` says that they are
        not wanted.
        """
        nodes, reader_inputs = self.buffers.node_outputs, self.buffers.reader_inputs
        grad_matrix = self.network.mask_matrix(dtype=precise_type(nodes)) if edges else None
        reader_inputs[-1] = gradient.reshape(-1)
        self.reads.drop_early(reader_inputs[-1:])
        if edges:
            grad_matrix[-1] = products_with(nodes, reader_inputs[-1])
        self.reads.start_backward()
        return grad_matrix

    def grad_edges(self, grad_matrix: Tensor, which: Tensor | slice = slice(None)) -> Tensor:
        """The gradients of some edges [E], from the matrix of gradients [R, P]."""
        readers, sources = self.network.edge_readers[which], self.network.edge_sources[which]
        return grad_matrix[readers, sources].to(self.inputs.mask.dtype)

    def layers_backward(self, grad_matrix: Tensor | None) -> None:
        """Walk the layers in reverse, and fill in the rows of their readers in the matrix of gradients [R, P], if there
        is one."""
        nodes = self.buffers.node_outputs
        for group in reversed(self.network.groups):
            self.reads.grad_group(group)
            parts, n_nodes = group.parts, group.first_node
            for number in reversed(range(len(parts))):
                self._layer_backward(group.first + number, parts[number], group, grad_matrix)
            start, end = parts[0].first_reader, parts[-1].first_reader + parts[-1].n_readers
            if nodes.is_cuda:  # edges inside the group too: a third more work, in a quarter of the kernel launches
                n_nodes = group.end_node
            if grad_matrix is not None:
                grad_matrix[start:end, :n_nodes] = inner_products(self._rows(start, end), nodes[:n_nodes])

    def _layer_backward(self, layer: int, part: LayerSlice, group: LayerGroup, grad_matrix: Tensor | None) -> None:
        """Replace the inputs of a layer's readers by their gradients, and note the gradients of edges in the group."""
        block, heads = self.network.blocks[layer], self.network.graph.n_heads
        nodes, first, end = self.buffers.node_outputs, part.first_reader, part.first_reader + part.n_readers
        notes = grad_matrix is not None and not nodes.is_cuda  # on a GPU, `layers_backward` does a whole group at once
        own = slice(part.n_earlier_nodes, part.n_earlier_nodes + heads)
        in_group = slice(group.first_node, part.n_earlier_nodes)
        sums, inverse, qkv, z, mlp_input, hidden = self._take_saved(layer, part)
        grad_nodes = self.reads.grad_nodes(layer, part, group)
        grad_heads, grad_mlp = grad_nodes[:heads], grad_nodes[heads].view(-1, self.width)

        if block.mlp_out_norm is None:
            grad_hidden = grad_mlp @ block.w_down.t()
        else:
            about = hidden.detach()[None], block.w_down[None], block.b_down, sums[1]
            grad_hidden = block.mlp_out_norm.grad_z(grad_mlp[None], *about)[0]
        (grad_mlp_input,) = torch.autograd.grad(hidden, mlp_input, grad_hidden)
        if part.n_same_layer_edges:
            if notes:
                grad_matrix[end - 1, own] = products_with(nodes[own], grad_mlp_input.view(-1))
            self.reads.grad_own_heads(grad_heads, grad_mlp_input.view(-1), part)
        grad_heads = grad_heads.view(heads, -1, self.width)
        if block.attention_out_norm is None:
            grad_z = torch.bmm(grad_heads, block.w_o.transpose(1, 2))
        else:
            grad_z = block.attention_out_norm.grad_z(grad_heads, z.detach(), block.w_o, block.b_o, sums[0])
        (grad_qkv,) = torch.autograd.grad(z, qkv, grad_z)

        layer_inputs = self._rows(first, end)
        block.qkv.backward_(layer_inputs[:-1].view(len(qkv), -1, self.width), inverse, qkv.detach(), grad_qkv)
        layer_inputs[-1] = grad_mlp_input.view(-1)
        self.reads.drop_early(layer_inputs)
        if in_group.start < in_group.stop and notes:
            grad_matrix[first:end, in_group] = inner_products(layer_inputs, nodes[in_group])

    def _take_saved(self, layer: int, part: LayerSlice) -> tuple:
        """What the backward of a layer needs of its forward, computed again with gradient checkpointing."""
        sums, inverse, activations = self.saved[layer]
        self.saved[layer] = None
        if activations is not None:
            return sums, inverse, *activations
        layer_inputs = self._rows(part.first_reader, part.first_reader + part.n_readers)
        layer_inputs = layer_inputs.view(part.n_readers, -1, self.width)
        hidden, mlp_input = self._with_graph(self.network.blocks[layer].mlp, layer_inputs[-1])
        return sums, *self._attend(layer, layer_inputs, inverse), mlp_input, hidden

    def grad_constants(self) -> Tensor:
        """Gradients of the ablation constants, Σ_j (1 - m_ij) ∂L/∂r_j summed over tokens: [P, D]."""
        grad_inputs = self.buffers.reader_inputs
        precise = precise_type(grad_inputs)
        cut = self.network.mask_matrix(1 - self.inputs.mask.to(precise), precise)
        return cut.t() @ grad_inputs.view(len(self.mask), -1, self.width).sum(1, dtype=precise)
