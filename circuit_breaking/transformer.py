"""The edge-masked transformer: causal interventions on every edge of a model at once (layer 1).

Reader j gets  r_j = Σ_i [ m_ij x_i + (1 - m_ij) μ_i ],  with x_i the output of node i, m_ij the mask weight of edge
i -> j and μ_i what a cut edge carries (Li, Davies, Nadeau 2023, section 3). Heads, MLPs and `output` read alike.

Shapes: B batch, T position, N tokens = B * T, P sources, R readers, H heads, D width, E edges, V vocabulary.

How it is fast:
- Node outputs live in one preallocated stack, stored as x_i - μ_i, so that means cost one addition a reader:
  r_j = Σ_i m_ij (x_i - μ_i) + Σ_i μ_i. The readers of a few layers, a group, are one product
  [R, P'] · [P', N * D] over the P' nodes before the group; what they read of each other's layers is added on the way.
- The backward is written by hand. Walking the groups in reverse, the gradient at a group's nodes is gathered from
  all later readers with one product, and the gradient of all edges into it is one more. Once a layer is done, nothing
  reads its node outputs again, so the gradients of its readers take their place: one stack serves both passes.
- Autograd keeps what attention and the MLP's nonlinearity need, nothing else. Model weights are frozen.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from circuit_breaking.blocks import take_apart
from circuit_breaking.cli import UserError
from circuit_breaking.graph import EdgeGraph
from circuit_breaking.masks import EdgeMask

# Layers whose readers read all earlier nodes in one product are grouped up to about this many readers: enough for a
# matrix product to run at full speed, few enough for what it makes to stay small beside the stack.
GROUP_READERS = 52


class _OutputRead(torch.autograd.Function):
    """What `output` reads [N, D], as a function of the mask weights [E]."""

    @staticmethod
    def forward(ctx, weights: Tensor, model: "EdgeMaskedTransformer", tokens: Tensor) -> Tensor:
        run = _Run(model, weights.detach(), tokens, keep=ctx.needs_input_grad[0])
        ctx.run = run
        return run.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return ctx.run.backward(gradient), None, None


class _Run:
    """One forward and its backward over one batch. The backward uses the stack up; a second one makes it anew."""

    def __init__(self, model: "EdgeMaskedTransformer", weights: Tensor, tokens: Tensor, keep: bool) -> None:
        self.model, self.graph, self.keep = model, model.graph, keep
        self.batch, self.length = tokens.shape
        self.tokens = tokens
        self.mask_dtype = weights.dtype
        self.width = model.embedding.shape[1]
        self.flat = tokens.numel() * self.width  # one node's output, as one row
        self.mask = self._matrix(weights.to(model.dtype))
        self.stack: Tensor | None = None

    def _matrix(self, weights: Tensor | None = None) -> Tensor:
        """[readers, P], zero where there is no edge; with the weights [E] of those that there are, if given."""
        matrix = self.model.embedding.new_zeros(len(self.graph.readers), len(self.graph.sources))
        if weights is not None:
            matrix[self.model.edge_readers, self.model.edge_sources] = weights
        return matrix

    def _fill(self, rows: Tensor, constants: Tensor) -> None:
        """Set [k, N, D] to constants [k, 1 or max T, D], which may differ by position."""
        rows = rows.view(rows.shape[0], self.batch, self.length, self.width)
        rows.copy_(constants[:, None, : self.length])

    def forward(self) -> Tensor:
        model, graph, mask, sources = self.model, self.graph, self.mask, len(self.graph.sources)
        n_tokens, heads = self.tokens.numel(), graph.n_heads
        # one row more than there are nodes: the backward keeps the gradient of `output` there
        self.stack = stack = model.embedding.new_empty(sources + 1, n_tokens, self.width)
        rows = stack.view(sources + 1, self.flat)
        self._fill(stack[:1], model.offsets[:1])
        embedding = F.embedding(self.tokens, model.embedding)
        if model.positions is not None:
            embedding += model.positions[: self.length]
        stack[0] += embedding.view(n_tokens, -1)
        rotary = model.rotary_tables(self.length, self.tokens.device)
        self.saved: list[tuple[Tensor, ...] | None] = []
        for group in self.model.groups:
            before = group[0]  # its first layer
            reads = self._read(before.reader, group[-1].reader + group[-1].rows, before.sources)
            for part in group:
                block, first, mlp = model.blocks[len(self.saved)], part.sources, part.sources + heads
                read = reads[part.reader - before.reader :][: part.rows]
                if part is not before:
                    weights = mask[part.reader : part.reader + part.rows, before.sources : first]
                    read.view(part.rows, -1).addmm_(weights, rows[before.sources : first])
                z, read_heads = self._traced(lambda x, block=block: block.heads(x, self.batch, rotary), read[:-1])
                self._fill(stack[first:mlp], model.offsets[first:mlp])
                stack[first:mlp].baddbmm_(z.detach(), block.w_o)
                if part.own:
                    read[-1].view(-1).addmv_(rows[first:mlp].t(), mask[part.reader + part.rows - 1, first:mlp])
                hidden, read_mlp = self._traced(block.mlp, read[-1])
                self._fill(stack[mlp : mlp + 1], model.offsets[mlp : mlp + 1])
                stack[mlp].addmm_(hidden.detach(), block.w_down)
                self.saved.append((read_heads, z, read_mlp, hidden) if self.keep else None)
        return self._read(len(mask) - 1, len(mask), sources)[0]

    def _traced(self, function, read: Tensor) -> tuple[Tensor, Tensor]:
        """`function(read)` with its graph from `read` on, where a backward is to come."""
        with torch.set_grad_enabled(self.keep):
            # `data`: what autograd saves is not told of writes to other rows of the same storage, which cannot harm it
            read = read.data.requires_grad_(self.keep)
            return function(read), read

    def _read(self, start: int, end: int, sources: int) -> Tensor:
        """What the readers from `start` to `end` get from the first `sources` nodes, and all their means: [., N, D]."""
        out = self.stack.new_empty(end - start, self.tokens.numel(), self.width)
        flat, weights, nodes = out.view(len(out), -1), self.mask[start:end, :sources], self.stack[:sources]
        if self.model.base is None:
            torch.mm(weights, nodes.view(sources, -1), out=flat)
        else:
            self._fill(out, self.model.base[self.model.sources_read[start:end]])
            flat.addmm_(weights, nodes.view(sources, -1))
        return out

    def backward(self, gradient: Tensor) -> Tensor:
        if self.stack is None:
            self.forward()
        graph, mask, stack, flat, heads = self.graph, self.mask, self.stack, self.flat, self.graph.n_heads
        self.stack = None
        readers, sources = mask.shape
        rows = stack.view(sources + 1, flat)
        edge_gradient = self._matrix()
        edge_gradient[-1] = rows[:sources] @ gradient.reshape(-1)
        # Gradients of the readers. Row for row they fit where the outputs of the same layer's nodes were, unless
        # queries, keys and values read apart.
        reads = stack.new_empty(readers, flat) if graph.split_qkv else rows[1:]
        reads[-1] = gradient.reshape(-1)
        layer = graph.n_layers
        for group in reversed(self.model.groups):
            before, end = group[0].sources, group[-1].reader + group[-1].rows
            nodes = len(group) * (heads + 1)
            at_group = torch.mm(mask[end:, before : before + nodes].t(), reads[end:])
            for part in reversed(group):
                layer -= 1
                block, (read_heads, z, read_mlp, hidden) = self.model.blocks[layer], self.saved[layer]
                first, mlp, after = part.sources, part.sources + heads, part.reader + part.rows
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
        return edge_gradient[self.model.edge_readers, self.model.edge_sources].to(self.mask_dtype)


def check_means(means: Tensor, nodes: int, width: int) -> None:
    """Raise a `UserError` for means that are neither [nodes, width] nor [T, nodes, width], or not finite."""
    if means.dim() not in (2, 3) or means.shape[-2:] != (nodes, width):
        raise UserError(
            f"means of shape {list(means.shape)} do not fit this model, which needs [{nodes}, {width}] or "
            f"[positions, {nodes}, {width}]. Compute them with this model."
        )
    if not means.isfinite().all():
        raise UserError("the means hold a value that is not finite. Compute them again.")


class EdgeMaskedTransformer(nn.Module):
    """A Hugging Face causal language model with a weight on every causal edge.

    With all weights 1 it computes the original model's logits. Batches are padded on the right, if at all: causal
    attention keeps what comes before from seeing the padding, so no attention mask is needed.

    Attributes:
        graph: the `EdgeGraph`, in whose order all edges come.
        mask: the `EdgeMask`; `mask.weights` is the one trainable parameter [E].
        means: what a cut edge carries: None (zero), [P, D], or [T, P, D] by position. Settable; checked.
    """

    def __init__(self, hf: nn.Module, split_qkv: bool = False) -> None:
        super().__init__()
        parts = take_apart(hf, split_qkv)
        heads = len(parts.blocks[0].w_o)
        self.graph = EdgeGraph(len(parts.blocks), heads, split_qkv, parts.parallel)
        self.blocks = nn.ModuleList(parts.blocks)
        # a copy: a change of device must not reach the model that was given
        self.norm, self.rotary = parts.norm, copy.deepcopy(parts.rotary)
        self.max_positions = parts.max_positions
        self.register_buffer("embedding", parts.embedding.detach())
        self.register_buffer("positions", None if parts.positions is None else parts.positions.detach())
        self.register_buffer("unembedding", parts.unembedding.detach())
        bias = parts.unembedding_bias
        self.register_buffer("unembedding_bias", None if bias is None else bias.detach())
        self.register_buffer("edge_readers", self.graph.edge_readers)
        self.register_buffer("edge_sources", self.graph.edge_sources)
        self.register_buffer("sources_read", self.graph.edge_readers.bincount(minlength=len(self.graph.readers)))
        layers, size = self.graph.layers, max(1, GROUP_READERS // (self.graph.head_readers + 1))
        self.groups = [layers[start : start + size] for start in range(0, len(layers), size)]
        # at least float32, so that a step of the optimizer is not lost in bfloat16's rounding
        self.mask = EdgeMask(self.graph, dtype=torch.promote_types(self.dtype, torch.float32))
        self.register_buffer("offsets", None)
        self.register_buffer("base", None)
        self.register_buffer("_means", None)
        self.means = None
        self.name: str | None = None  # set by `load_model`; goes into the files that belong to this model
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the model's weights and activations."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.embedding.device

    def to_dtype_(self, dtype: torch.dtype) -> None:
        """Change the type of weights and activations in place; tables of positions and the mask stay precise."""
        self.blocks.to(dtype)
        self.norm.to(dtype)
        for name, tensor in list(self.named_buffers(recurse=False)):
            if tensor.is_floating_point():
                setattr(self, name, tensor.to(dtype))
        self.mask.to(torch.promote_types(dtype, torch.float32))

    @property
    def means(self) -> Tensor | None:
        """What a cut edge carries: None (zero ablation), [P, D], or [T, P, D] by position."""
        return self._means

    @means.setter
    def means(self, value: Tensor | None) -> None:
        constants = [self.embedding.new_zeros(1, self.embedding.shape[1])]
        for block in self.blocks:
            constants += [block.b_o.expand(self.graph.n_heads, -1), block.b_down[None]]
        biases = torch.cat(constants)[:, None]  # [P, 1, D]: what a node adds whatever it reads
        if value is None:
            self._means = self.base = None
            self.offsets = biases
            return
        check_means(value, len(biases), self.embedding.shape[1])
        self._means = value.detach().to(self.device, self.dtype)
        exact = value.detach().to(self.device, torch.float64)
        by_node = exact[:, None] if value.dim() == 2 else exact.transpose(0, 1)  # [P, 1 or T, D]
        self.offsets = (biases - by_node).to(self.dtype)
        # base[p]: the sum of the means of the first p nodes
        self.base = F.pad(by_node.cumsum(0), (0, 0, 0, 0, 1, 0)).to(self.dtype)

    def rotary_tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """cos and sin [T, K] of the rotary embedding, None where positions are learned."""
        if self.rotary is None:
            return None
        cos, sin = self.rotary(self.embedding, torch.arange(length, device=device)[None])
        return cos[0], sin[0]

    def _check(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.is_floating_point() or not tokens.numel():
            raise UserError(f"tokens are a batch of at least one text, int64 [B, T], not {list(tokens.shape)}.")
        if tokens.shape[1] > self.max_positions:
            raise UserError(f"{tokens.shape[1]} tokens are more than the model's {self.max_positions} positions.")
        if self._means is not None and self._means.dim() == 3 and tokens.shape[1] > len(self._means):
            raise UserError(
                f"the means are per position for {len(self._means)} positions and the text has {tokens.shape[1]}. "
                "Compute them for longer texts or use plain means."
            )

    def hidden(self, tokens: Tensor, at: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Final hidden state after the last norm; `logits` is its product with `unembedding`.

        Args as in `forward`. Returns [B, T, D], or [B, k, D] / [B, D] at the positions asked for.
        """
        self._check(tokens)
        weights = self.mask.weights if mask is None else mask
        read = _OutputRead.apply(weights, self, tokens).view(*tokens.shape, -1)
        if at is not None:
            batch = torch.arange(len(tokens), device=tokens.device)
            read = read[batch.view(-1, *[1] * (at.dim() - 1)), at]
        return self.norm(read)

    def forward(self, tokens: Tensor, at: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Next-token logits.

        Args:
            tokens: int64 [B, T], padded on the right if at all.
            at: positions whose logits are wanted, int64 [B] or [B, k]; all by default.
            mask: weights [E] to use instead of `self.mask.weights`; gradients flow to it.

        Returns:
            [B, T, V], or [B, V] / [B, k, V] with `at`.
        """
        return F.linear(self.hidden(tokens, at, mask), self.unembedding, self.unembedding_bias)

    @torch.no_grad()
    def node_outputs(self, tokens: Tensor) -> Tensor:
        """Output of every node under the mask in force: [P, B, T, D], in the order of `graph.sources`."""
        self._check(tokens)
        run = _Run(self, self.mask.weights.detach(), tokens, keep=False)
        run.forward()
        outputs = run.stack[:-1].view(len(self.graph.sources), *tokens.shape, -1)
        if self._means is not None:
            means = self._means if self._means.dim() == 2 else self._means[: tokens.shape[1]].transpose(0, 1)
            outputs += means[:, None, None] if self._means.dim() == 2 else means[:, None]
        return outputs
