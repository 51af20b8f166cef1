"""The edge-masked transformer: causal interventions on every edge of a model at once (layer 1).

Reader j gets  r_j = Σ_i [ m_ij x_i + (1 - m_ij) μ_i ],  with x_i the output of node i, m_ij the mask weight of edge
i -> j and μ_i what a cut edge carries (Li, Davies, Nadeau 2023, section 3). Heads, MLPs and `output` read alike.

`passes` runs it forward and backward.

Shapes: B batch, T position, P sources, E edges, D width, V vocabulary.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuit_breaking.engine.blocks import take_apart
from circuit_breaking.engine.cuda_graphs import Replays
from circuit_breaking.engine.mask import EdgeMask
from circuit_breaking.engine.masked_pass import OutputRead, Pass, Workspace, layer_groups
from circuit_breaking.engine.prefix_cache import Beginnings
from circuit_breaking.errors import UserError
from circuit_breaking.graph import EdgeGraph

# torch.compile would make dozens of pieces of the pass, of which none is faster, and let it keep more
read_output = torch.compiler.disable(OutputRead.apply)


def select_positions(hidden: Tensor, at: Tensor) -> Tensor:
    """Of [B, T, D] the positions `at`, [B] or [B, k]: [B, D] or [B, k, D]."""
    batch = torch.arange(len(hidden), device=hidden.device)
    return hidden[batch.view(-1, *[1] * (at.dim() - 1)), at]


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
        means: what a cut edge carries: None (zero), [P, D], or [T, P, D] by position. Settable; checked. Means [P, D]
            that require a gradient get one, so that they can be learned (optimal ablation; Li and Janson 2024).
        recompute: compute attention and MLPs again in the backward, a layer at a time, in place of keeping what their
            backward needs: less memory, about a third more time, the same numbers.
        replays: CUDA graphs of small passes on a GPU; `replays.on = False` does without.
    """

    def __init__(self, hf: nn.Module, split_qkv: bool = False, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
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
        self.groups = layer_groups(self.graph)
        self.workspace = Workspace()
        self.replays = Replays()
        # at least float32, so that a step of the optimizer is not lost in bfloat16's rounding
        self.mask = EdgeMask(self.graph, dtype=torch.promote_types(self.dtype, torch.float32))
        self.register_buffer("offsets", None)
        self.register_buffer("base", None)
        self.register_buffer("_means", None)
        # means that are learned, in a tuple so as to be no parameter of the model, and their state when they were set
        self._learned: tuple[Tensor, int] | None = None
        self._held = False
        self.beginnings: Beginnings | None = None
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

    def _apply(self, *words, **more) -> nn.Module:
        self.replays.clear()  # which know where the weights were
        return super()._apply(*words, **more)

    def to_dtype_(self, dtype: torch.dtype) -> None:
        """Change the type of weights and activations in place; tables of positions and the mask stay precise."""
        self.replays.clear()
        self.blocks.to(dtype)
        self.norm.to(dtype)
        for name, tensor in list(self.named_buffers(recurse=False)):
            if tensor.is_floating_point():
                setattr(self, name, tensor.to(dtype))
        self.mask.to(torch.promote_types(dtype, torch.float32))

    @property
    def means(self) -> Tensor | None:
        """What a cut edge carries: None (zero ablation), [P, D], or [T, P, D] by position."""
        return self._learned[0] if self._learned else self._means

    @means.setter
    def means(self, value: Tensor | None) -> None:
        constants = [self.embedding.new_zeros(1, self.embedding.shape[1])]
        for block in self.blocks:
            constants += [block.b_o.expand(self.graph.n_heads, -1), block.b_down[None]]
        biases = torch.cat(constants)[:, None]  # [P, 1, D]: what a node adds whatever it reads
        if self.beginnings is not None:
            self.beginnings = Beginnings()
        if value is None:
            self._learned = self._means = self.base = None
            self.offsets = biases
            return
        check_means(value, len(biases), self.embedding.shape[1])
        if value.requires_grad and value.dim() == 3:
            raise UserError("means by position cannot be learned. Give one mean a node, [nodes, width].")
        self._learned = (value, value._version) if value.requires_grad else None
        self._means = value.detach().to(self.device, self.dtype)
        exact = value.detach().to(self.device, torch.float64)
        by_node = exact[:, None] if value.dim() == 2 else exact.transpose(0, 1)  # [P, 1 or T, D]
        self.offsets = (biases - by_node).to(self.dtype)
        # base[p]: the sum of the means of the first p nodes
        self.base = F.pad(by_node.cumsum(0), (0, 0, 0, 0, 1, 0)).to(self.dtype)

    @contextmanager
    def means_held(self) -> Iterator[None]:
        """While the block lasts, what is computed gives no gradient to means that are learned: they are as they are."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    @contextmanager
    def remembering(self, on: bool = True) -> Iterator[None]:
        """While the block lasts, and while means stay the same, keep the node outputs of every batch that is seen, and
        of a mask without gradient compute only what differs: for many masks on few batches."""
        before, self.beginnings = self.beginnings, Beginnings() if on else None
        try:
            yield
        finally:
            self.beginnings = before

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
        learned, version = self._learned or (None, 0)
        if learned is not None and learned._version != version:
            self.means = learned  # an optimizer has changed them
        if self._held:
            learned = None
        if not torch.is_grad_enabled():  # which a custom function does not see: it would keep what a backward needs
            weights, learned = weights.detach(), None
        read = read_output(weights, learned, self, tokens).view(*tokens.shape, -1)
        return self.norm(read if at is None else select_positions(read, at))

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
        run = Pass(self, self.mask.weights.detach(), tokens, keep=False)
        run.forward()
        outputs = run.stack.view(len(self.graph.sources), *tokens.shape, -1)
        if self._means is not None:
            means = self._means if self._means.dim() == 2 else self._means[: tokens.shape[1]].transpose(0, 1)
            outputs += means[:, None, None] if self._means.dim() == 2 else means[:, None]
        return outputs
