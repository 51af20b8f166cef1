"""The edge-masked transformer: a Hugging Face causal language model with a weight on every causal edge.

Every reader gets  r_j = Σ_i [ m_ij x_i + (1 - m_ij) μ_i ]  (Li, Davies, Nadeau 2023, section 3), with x_i the output of
node i, m_ij the weight of edge i -> j and μ_i what a cut edge carries. `reads` computes it for heads, MLPs and `output`
alike, `masked_pass` runs the network forward and backward, and `reference` is the plain definition of the same.

Shapes: B batch, T position, P nodes that write, E edges, D width, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from circuit_breaking.engine.ablation_values import AblationValues, add_means, check_means
from circuit_breaking.engine.arguments import check_ablate_from, check_inputs, check_tokens
from circuit_breaking.engine.blocks import biases_of, make_blocks
from circuit_breaking.engine.counterfactual import CounterfactualValues, SpreadCounterfactual
from circuit_breaking.engine.cuda_graphs import CudaGraphCache
from circuit_breaking.engine.device_map import SpreadBlocks, placed
from circuit_breaking.engine.mask import EdgeMask
from circuit_breaking.engine.masked_pass import MaskedForward, MaskedPass
from circuit_breaking.engine.network import Network, PassInputs, Rotary, Workspace, layer_groups, rotary_tables
from circuit_breaking.engine.norms import Norm
from circuit_breaking.engine.offload import OffloadedBlocks
from circuit_breaking.engine.output import Unembed, select_positions
from circuit_breaking.engine.prefix_cache import PrefixCache
from circuit_breaking.engine.spread import Spread, SpreadPass
from circuit_breaking.engine.weights import WeightSource
from circuit_breaking.errors import UserError
from circuit_breaking.models.families import describe, require_plain
from circuit_breaking.runs.devices import without_autocast


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
        resample: whether tasks that have a counterfactual for each prompt use it as ablation values, through
            `resampling`. Texts without one, such as ordinary text, have `means` as ablation values.
        gradient_checkpointing: recompute attention and MLPs in the backward pass, one layer at a time, instead of
            keeping their activations. Less memory, about a third more time, the same numbers.
        blocks: the layers. With `offload`, their weights are kept in CPU memory and copied to the model's device when
            they are needed (`engine.offload`), and gradient checkpointing is always on. With `device_map`, they are on
            several devices (`engine.spread`).
        cuda_graphs: captured passes for small batches on a GPU; `cuda_graphs.enabled = False` turns them off.
    """

    def __init__(
        self, hf: nn.Module, split_qkv: bool = False, gradient_checkpointing: bool = False,
        source: WeightSource | None = None, offload: bool = False, devices: list[torch.device] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing or offload
        require_plain(hf)
        spec = describe(hf)
        source = source or WeightSource(spec.embedding.dtype, spec.embedding.device)
        self.graph = spec.graph(split_qkv)
        # a copy, so that moving this model to another device does not move a module of `hf`
        self.rotary = copy.deepcopy(spec.rotary)
        self.rotary_by_length, self.rotary_kinds = spec.rotary_by_length, spec.rotary_kinds
        # may drop layers from `spec`
        blocks = make_blocks(spec, split_qkv, source.on_cpu() if offload else source, devices)
        self.register_buffer("biases", biases_of(blocks, self.graph.n_heads, source.device))
        self.blocks = OffloadedBlocks(blocks, source.device) if offload else placed(blocks, devices)
        self.norm = Norm(spec.final_norm, source)
        self.max_positions, self.head = spec.max_positions, spec.head
        self.plain_head = spec.head.is_plain  # see `models.causal_model`
        for name in ("embedding", "positions", "unembedding", "unembedding_bias"):
            tensor = getattr(spec, name)
            self.register_buffer(name, None if tensor is None else source.take(tensor))
        if spec.unembedding is spec.embedding:  # tied embeddings stay one
            self.unembedding = self.embedding
        self.embedding_scale = spec.embedding_scale
        self.register_buffer("edge_readers", self.graph.edge_readers)
        self.register_buffer("edge_sources", self.graph.edge_sources)
        self.register_buffer("n_read", self.graph.edge_readers.bincount(minlength=len(self.graph.readers)))
        self.groups = layer_groups(self.graph)
        self.spread = Spread(self._network(), self.blocks) if isinstance(self.blocks, SpreadBlocks) else None
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
        self.resample = False
        self.make_pass: Callable[..., MaskedPass] = MaskedPass  # see `reader_gradients`
        # of the block of `resampling` that is open, and of the last one
        self._counterfactual: CounterfactualValues | SpreadCounterfactual | None = None
        self._last_counterfactual: CounterfactualValues | SpreadCounterfactual | None = None
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
        self._last_counterfactual = None
        super()._apply(*args, **kwargs)
        if isinstance(self.blocks, OffloadedBlocks | SpreadBlocks):
            self.blocks.require(self.device, self.dtype)
        return self

    @property
    def means(self) -> Tensor | None:
        """The ablation values, what a cut edge carries: None (zero ablation), [P, D], or [T, P, D] by position."""
        return self._learned[0] if self._learned else self._means

    @means.setter
    def means(self, value: Tensor | None) -> None:
        if value is not None:
            check_means(value, len(self.biases), self.embedding.shape[1])
            if value.requires_grad and value.dim() == 3:
                raise UserError("means by position cannot be learned. Give one mean a node, [nodes, width].")
        if self.prefix_cache is not None:
            self.prefix_cache = PrefixCache()
        self._learned = (value, value._version) if value is not None and value.requires_grad else None
        self._means = None if value is None else value.detach().to(self.device, self.dtype)
        values = AblationValues.of(self.biases, value, self.n_read)
        self.bias_minus_mean, self.mean_prefix_sums = values.bias_minus_mean, values.mean_prefix_sums
        self._spread_values = None if self.spread is None else self.spread.values(values)

    @property
    def ablate_from(self) -> int:
        """First position at which cuts act; earlier positions are those of the whole model."""
        return self._ablate_from

    @ablate_from.setter
    def ablate_from(self, value: int) -> None:
        check_ablate_from(value)
        if value == self._ablate_from:
            return
        if self._counterfactual is not None:
            raise UserError("ablate_from cannot change while `resampling` is in force. Set it before.")
        if self.prefix_cache is not None:
            self.prefix_cache = PrefixCache()
        self._ablate_from, self._last_counterfactual = value, None

    @contextmanager
    def detached_means(self) -> Iterator[None]:
        """Within the block, learned means are constants: what is computed passes no gradient to them."""
        before, self._means_detached = self._means_detached, True
        try:
            yield
        finally:
            self._means_detached = before

    @contextmanager
    def resampling(self, counterfactual: Tensor) -> Iterator[None]:
        """Within the block, a cut edge carries what its source writes in the whole model on a counterfactual batch, at
        the same text and position (resample ablation), in place of `means`.

        It takes a forward pass of the whole model, and the memory of a stack of node outputs [P, B, T, D]. The stack of
        the last counterfactual batch is kept, so that many masks on one batch share it. No gradient flows through the
        counterfactual, or to learned `means`.

        Args:
            counterfactual: tokens of the counterfactual texts, int64 [B, T]. Every batch inside the block has the same
                shape. Texts that are padded on the right need counterfactuals of the same numbers of tokens.

        Raises:
            UserError: the tokens do not fit the model, or a batch inside the block has another shape.
        """
        check_tokens(counterfactual, self.max_positions)
        before, self._counterfactual = self._counterfactual, self._counterfactual_values(counterfactual)
        try:
            yield
        finally:
            self._counterfactual = before

    @property
    def counterfactual_outputs(self) -> Tensor | None:
        """The ablation values inside a block of `resampling`, [P, B, T, D], zero before `ablate_from`; None outside."""
        values = self._counterfactual
        return None if values is None else values.outputs.view(len(values.outputs), *values.tokens.shape, -1)

    def _counterfactual_values(self, tokens: Tensor) -> CounterfactualValues | SpreadCounterfactual:
        known = [] if self.prefix_cache is None else self.prefix_cache.counterfactuals
        for values in (self._last_counterfactual, *known):
            if values is not None and torch.equal(values.tokens, tokens):
                return values
        self._last_counterfactual = None  # so that its memory is free for the next one
        with without_autocast(self.device):
            rotary = self.rotary_tables(tokens.shape[1], tokens.device)
            about = tokens, rotary, self.biases, self.ablate_from
            spread, network = self.spread, self._network()
            values = CounterfactualValues.of(network, *about) if spread is None else spread.counterfactual(*about)
        self._last_counterfactual = values
        if self.prefix_cache is not None:
            self.prefix_cache.counterfactuals.append(values)
        return values

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
        return rotary_tables(self.rotary, self.rotary_kinds, self.embedding, length, device)

    def _check(
        self, tokens: Tensor, at: Tensor | None = None, mask: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> None:
        check_tokens(tokens, self.max_positions)
        counterfactual = None if self._counterfactual is None else self._counterfactual.tokens
        check_inputs(tokens, counterfactual, self._means, at, mask, attention_mask, len(self.graph))

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
        if self._means_detached or self._counterfactual is not None:
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
        run = None
        # a captured pass is padded, which must not change positions, and has no values that differ by text
        fixed = not self.rotary_by_length and self._counterfactual is None and self.make_pass is MaskedPass
        if fixed and self.spread is None and self.cuda_graphs.usable(network := self._network(), tokens):
            run = self.cuda_graphs.replay(
                network, self._inputs(weights.detach(), tokens), self.workspace, backward, constants is not None,
                self.max_positions, self.rotary_tables,
            )  # fmt: skip
        if run is None:
            run = self.new_pass(weights.detach(), tokens, backward, self.make_pass, self.prefix_cache)
        return MaskedForward.apply(weights, constants, run)

    def new_pass(
        self, weights: Tensor, tokens: Tensor, backward: bool = False, make: Callable[..., MaskedPass] = MaskedPass,
        prefix_cache: PrefixCache | None = None,
    ) -> MaskedPass | SpreadPass:  # fmt: skip
        """A pass with a mask [E] over tokens [B, T]; `make` makes that of each device, as `MaskedPass`."""
        inputs = self._inputs(weights, tokens)
        if self.spread is None:
            return make(self._network(), inputs, self.workspace, backward, prefix_cache)
        inputs = self.spread.inputs(inputs, self._counterfactual or self._spread_values)
        about = self.workspace, backward, prefix_cache, make, self.gradient_checkpointing
        return SpreadPass(self.spread, inputs, *about)

    def _network(self) -> Network:
        return Network(
            self.graph, self.groups, self.blocks, self.embedding, self.positions, self.embedding_scale,
            self.edge_readers, self.edge_sources, self.n_read, self.gradient_checkpointing,
        )  # fmt: skip

    def _inputs(self, weights: Tensor, tokens: Tensor) -> PassInputs:
        fixed = AblationValues(self.bias_minus_mean, self.mean_prefix_sums, self.n_read)
        rotary = self.rotary_tables(tokens.shape[1], tokens.device)
        return PassInputs(tokens, weights, self._counterfactual or fixed, rotary, self.ablate_from)

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
        return self.head.logits(Unembed.apply(hidden, self.unembedding, self.unembedding_bias))

    @torch.no_grad()
    def node_outputs(self, tokens: Tensor) -> Tensor:
        """Output of every node under the mask in force: [P, B, T, D], in the order of `graph.sources`."""
        self._check(tokens)
        run = self.new_pass(self.mask.weights.detach(), tokens)
        with without_autocast(self.device):
            run.forward()
        outputs = run.node_outputs().view(len(self.graph.sources), *tokens.shape, -1)
        if self._counterfactual is not None:
            outputs += self.counterfactual_outputs
        elif self._means is not None:
            add_means(outputs, self._means)
        return outputs
