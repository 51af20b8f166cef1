"""The edge-masked transformer: a Hugging Face causal language model with a weight on every causal edge.

Every reader gets  r_j = Σ_i [ m_ij x_i + (1 - m_ij) μ_i ]  (Li, Davies, Nadeau 2023, section 3), with x_i the output of
node i, m_ij the weight of edge i -> j and μ_i what a cut edge carries. `reads` computes it for heads, MLPs and `output`
alike, `masked_pass` runs the network forward and backward, and `reference` is the plain definition of the same.

Shapes: B batch, T position, P nodes that write, E edges, D width, V vocabulary.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from circuit_breaking.engine.ablation_values import AblationValues, check_means
from circuit_breaking.engine.arguments import check_ablate_from, check_positions, check_right_padding
from circuit_breaking.engine.blocks import make_blocks
from circuit_breaking.engine.cuda_graphs import CudaGraphCache
from circuit_breaking.engine.mask import EdgeMask
from circuit_breaking.engine.masked_pass import MaskedForward, MaskedPass
from circuit_breaking.engine.network import Network, PassInputs, Rotary, Workspace, layer_groups
from circuit_breaking.engine.norms import Norm
from circuit_breaking.engine.prefix_cache import PrefixCache
from circuit_breaking.errors import UserError
from circuit_breaking.models.families import describe, require_plain
from circuit_breaking.runs.devices import without_autocast


def select_positions(hidden: Tensor, at: Tensor) -> Tensor:
    """Of [B, T, D] the positions `at`, [B] or [B, k]: [B, D] or [B, k, D]."""
    batch = torch.arange(len(hidden), device=hidden.device)
    return hidden[batch.view(-1, *[1] * (at.dim() - 1)), at]


class _Unembed(torch.autograd.Function):
    """Logits of hidden states with a frozen unembedding, whose backward does not depend on `torch.autocast` either."""

    @staticmethod
    def forward(ctx, hidden: Tensor, unembedding: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(unembedding)
        return F.linear(hidden, unembedding, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (unembedding,) = ctx.saved_tensors
        with without_autocast(gradient.device):
            return gradient @ unembedding, None, None


class EdgeMaskedTransformer(nn.Module):
    """A Hugging Face causal language model with a weight on every causal edge.

    With all weights 1 it computes the original model's logits. Batches are padded on the right, if at all: causal
    attention keeps earlier tokens from seeing the padding, so no attention mask is needed. Tokens alone do not show
    whether they are padded on the left, where they would be at wrong positions: pass `attention_mask` to have this
    checked.

    It computes in its own `dtype`, inside `torch.autocast` too, which is switched off within a pass. For bfloat16, load
    it with `dtype="bfloat16"`.

    Attributes:
        graph: the `EdgeGraph`, whose edge order is used everywhere.
        mask: the `EdgeMask`; `mask.weights` [E] is the one trainable parameter.
        means: the ablation values, what a cut edge carries: None (zero), [P, D], or [T, P, D] by position. Settable
            and checked. Means [P, D] that require a gradient get one, so that they can be learned as ablation
            constants (optimal ablation; Li and Janson 2024).
        ablate_from: first position at which cuts act, 0 by default. At earlier positions every reader gets the sum of
            all nodes before it, whatever the mask says, and they pass no gradient to the mask or to the means. Give 1
            to leave the first token alone, where many models have an attention sink. Settable and checked.
        gradient_checkpointing: recompute attention and MLPs in the backward pass, one layer at a time, instead of
            keeping their activations. Less memory, about a third more time, the same numbers.
        cuda_graphs: captured passes for small batches on a GPU; `cuda_graphs.enabled = False` turns them off.
    """

    def __init__(self, hf: nn.Module, split_qkv: bool = False, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        require_plain(hf)
        spec = describe(hf)
        self.graph = spec.graph(split_qkv)
        self.blocks = make_blocks(spec, split_qkv)
        # a copy, so that moving this model to another device does not move a module of `hf`
        self.norm, self.rotary = Norm(spec.final_norm), copy.deepcopy(spec.rotary)
        self.rotary_by_length, self.rotary_kinds = spec.rotary_by_length, spec.rotary_kinds
        self.max_positions, self.head = spec.max_positions, spec.head
        self.plain_head = spec.head.is_plain  # see `models.causal_model`
        for name in ("embedding", "positions", "unembedding", "unembedding_bias"):
            tensor = getattr(spec, name)
            self.register_buffer(name, None if tensor is None else tensor.detach())
        scale = None if spec.embedding_scale == 1 else self.embedding.new_tensor(spec.embedding_scale)
        self.register_buffer("embedding_scale", scale)
        self.register_buffer("edge_readers", self.graph.edge_readers)
        self.register_buffer("edge_sources", self.graph.edge_sources)
        self.register_buffer("n_read", self.graph.edge_readers.bincount(minlength=len(self.graph.readers)))
        self.groups = layer_groups(self.graph)
        self.workspace = Workspace()
        self.cuda_graphs = CudaGraphCache()
        # at least float32, so that an optimizer's small steps are not lost in bfloat16 rounding
        self.mask = EdgeMask(self.graph, dtype=torch.promote_types(self.dtype, torch.float32))
        self.register_buffer("bias_minus_mean", None)
        self.register_buffer("mean_prefix_sums", None)
        self.register_buffer("_means", None)
        # learned means, in a tuple so that they are no parameter of the model, with their version when they were set
        self._learned: tuple[Tensor, int] | None = None
        self._means_detached = False
        self._ablate_from = 0
        self.prefix_cache: PrefixCache | None = None
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

    def _apply(self, *args, **kwargs) -> nn.Module:
        self.cuda_graphs.clear()  # captured graphs hold the old weight addresses
        return super()._apply(*args, **kwargs)

    def to_dtype_(self, dtype: torch.dtype) -> None:
        """Change the type of weights and activations in place; rotary tables and the mask stay in float32 or better."""
        self.cuda_graphs.clear()
        self.blocks.to(dtype)
        self.norm.to(dtype)
        for name, tensor in list(self.named_buffers(recurse=False)):
            if tensor.is_floating_point():
                setattr(self, name, tensor.to(dtype))
        self.mask.to(torch.promote_types(dtype, torch.float32))

    @property
    def means(self) -> Tensor | None:
        """The ablation values, what a cut edge carries: None (zero ablation), [P, D], or [T, P, D] by position."""
        return self._learned[0] if self._learned else self._means

    @means.setter
    def means(self, value: Tensor | None) -> None:
        biases = self._biases()
        if value is not None:
            check_means(value, len(biases), self.embedding.shape[1])
            if value.requires_grad and value.dim() == 3:
                raise UserError("means by position cannot be learned. Give one mean a node, [nodes, width].")
        if self.prefix_cache is not None:
            self.prefix_cache = PrefixCache()
        self._learned = (value, value._version) if value is not None and value.requires_grad else None
        self._means = None if value is None else value.detach().to(self.device, self.dtype)
        values = AblationValues.of(biases, value)
        self.bias_minus_mean, self.mean_prefix_sums = values.bias_minus_mean, values.mean_prefix_sums

    @property
    def ablate_from(self) -> int:
        """First position at which cuts act; earlier positions are those of the whole model."""
        return self._ablate_from

    @ablate_from.setter
    def ablate_from(self, value: int) -> None:
        check_ablate_from(value)
        if self.prefix_cache is not None and value != self._ablate_from:
            self.prefix_cache = PrefixCache()
        self._ablate_from = value

    def _biases(self) -> Tensor:
        """What each node writes whatever it reads: [P, 1, D]."""
        biases = [self.embedding.new_zeros(1, self.embedding.shape[1])]
        for block in self.blocks:
            head, mlp = block.constants
            biases += [head.expand(self.graph.n_heads, -1), mlp[None]]
        return torch.cat(biases)[:, None]

    @contextmanager
    def detached_means(self) -> Iterator[None]:
        """Within the block, learned means are constants: what is computed passes no gradient to them."""
        before, self._means_detached = self._means_detached, True
        try:
            yield
        finally:
            self._means_detached = before

    @contextmanager
    def caching_prefixes(self, on: bool = True) -> Iterator[None]:
        """Within the block, and while `means` and `ablate_from` stay the same, keep the node outputs of every batch, so
        that a mask without gradient is computed only from the first layer on in which it differs. For many masks on few
        batches."""
        before, self.prefix_cache = self.prefix_cache, PrefixCache() if on else None
        try:
            yield
        finally:
            self.prefix_cache = before

    def rotary_tables(self, length: int, device: torch.device) -> Rotary | None:
        """cos and sin [kinds, T, r] of the rotary embedding, None where positions are learned."""
        if self.rotary is None:
            return None
        ids = torch.arange(length, device=device)[None]
        kinds = [[] if kind is None else [kind] for kind in self.rotary_kinds]
        cos, sin = zip(*(self.rotary(self.embedding, ids, *kind) for kind in kinds), strict=True)
        return torch.cat(cos), torch.cat(sin)

    def _check(
        self, tokens: Tensor, at: Tensor | None = None, mask: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> None:
        if tokens.dim() != 2 or tokens.is_floating_point() or not tokens.numel():
            raise UserError(f"tokens are a batch of at least one text, int64 [B, T], not {list(tokens.shape)}.")
        if tokens.shape[1] > self.max_positions:
            raise UserError(f"{tokens.shape[1]} tokens are more than the model's {self.max_positions} positions.")
        if self._means is not None and self._means.dim() == 3 and tokens.shape[1] > len(self._means):
            raise UserError(
                f"the means are per position for {len(self._means)} positions and the text has {tokens.shape[1]}. "
                "Compute them for longer texts or use plain means."
            )

        if at is not None:
            check_positions(at, tokens)
        if mask is not None and mask.shape != self.mask.weights.shape:
            raise UserError(f"a mask has one weight for each of the {len(self.graph):,} edges, not {list(mask.shape)}.")
        if attention_mask is not None:
            check_right_padding(attention_mask, tokens)

    def hidden(
        self, tokens: Tensor, at: Tensor | None = None, mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Final hidden state after the last norm; with `plain_head`, its product with `unembedding` are the logits.

        Args as in `forward`. Returns [B, T, D], or [B, k, D] / [B, D] at the positions asked for.
        """
        self._check(tokens, at, mask, attention_mask)
        weights = self.mask.weights if mask is None else mask
        constants, version = self._learned or (None, 0)
        if constants is not None and constants._version != version:
            self.means = constants  # an optimizer has changed them
        if self._means_detached:
            constants = None
        if not torch.is_grad_enabled():
            weights, constants = weights.detach(), None
        with without_autocast(self.device):
            read = self._output_read(weights, constants, tokens).view(*tokens.shape, -1)
            return self.norm(read if at is None else select_positions(read, at))

    @torch.compiler.disable  # it would be split into dozens of graphs, none of them faster, and take more memory
    def _output_read(self, weights: Tensor, constants: Tensor | None, tokens: Tensor) -> Tensor:
        """What `output` reads [N, D], differentiable in the edge weights [E] and in ablation constants [P, D]."""
        backward = weights.requires_grad or constants is not None
        network, inputs = self._network(), self._inputs(weights.detach(), tokens)
        run = None
        # a captured pass is padded, and padding must not change the positions
        if not self.rotary_by_length and self.cuda_graphs.usable(network, tokens):
            run = self.cuda_graphs.replay(
                network, inputs, self.workspace, backward, constants is not None, self.max_positions, self.rotary_tables
            )
        if run is None:
            run = MaskedPass(network, inputs, self.workspace, backward, self.prefix_cache)
        return MaskedForward.apply(weights, constants, run)

    def _network(self) -> Network:
        return Network(
            self.graph, self.groups, self.blocks, self.embedding, self.positions, self.embedding_scale,
            self.edge_readers, self.edge_sources, self.n_read, self.gradient_checkpointing,
        )  # fmt: skip

    def _inputs(self, weights: Tensor, tokens: Tensor) -> PassInputs:
        values = AblationValues(self.bias_minus_mean, self.mean_prefix_sums)
        rotary = self.rotary_tables(tokens.shape[1], tokens.device)
        return PassInputs(tokens, weights, values, rotary, self.ablate_from)

    def forward(
        self, tokens: Tensor, at: Tensor | None = None, mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Next-token logits.

        Args:
            tokens: int64 [B, T], padded on the right if at all.
            at: positions whose logits are wanted, int64 [B] or [B, k]; all by default.
            mask: weights [E] to use instead of `self.mask.weights`; gradients flow to it.
            attention_mask: as a Hugging Face tokenizer returns it, [B, T], 1 for tokens and 0 for padding. It changes
                nothing: padding on the right is never attended to, and any other padding is refused.

        Returns:
            [B, T, V], or [B, V] / [B, k, V] with `at`.

        Raises:
            UserError: the arguments do not fit the model or each other, or texts are padded on the left.
        """
        with without_autocast(self.device):
            return self.unembed(self.hidden(tokens, at, mask, attention_mask))

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final hidden states [..., D]."""
        return self.head.logits(_Unembed.apply(hidden, self.unembedding, self.unembedding_bias))

    @torch.no_grad()
    def node_outputs(self, tokens: Tensor) -> Tensor:
        """Output of every node under the mask in force: [P, B, T, D], in the order of `graph.sources`."""
        self._check(tokens)
        run = MaskedPass(self._network(), self._inputs(self.mask.weights.detach(), tokens), self.workspace, False)
        with without_autocast(self.device):
            run.forward()
        outputs = run.buffers.node_outputs_3d.view(len(self.graph.sources), *tokens.shape, -1)
        if self._means is not None:
            means = self._means if self._means.dim() == 2 else self._means[: tokens.shape[1]].transpose(0, 1)
            outputs += means[:, None, None] if self._means.dim() == 2 else means[:, None]
        return outputs
