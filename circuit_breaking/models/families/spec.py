"""What a description of a model says: a `ModelSpec` with one `LayerSpec` for each layer.

A file of `families` fills these in for one model family. The engine, the hooks that cut edges, the weight masks, the
baselines and the tests read them, so that nothing else in the package knows how a family names its modules.

Shapes: D model width, H query heads, G key (and value) heads, K head width, F hidden width of the MLP, V vocabulary.
Every weight is a view of the model's own parameter, with the inputs before the outputs: [in, out]. Nothing is copied.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import MISSING, dataclass, fields

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from circuit_breaking.errors import UserError
from circuit_breaking.graph import EdgeGraph


@dataclass(frozen=True)
class NormSpec:
    """A norm over the last dimension.

    `kind` is `"layer"` (LayerNorm), `"rms"` (RMSNorm), `"rms_offset"` (RMSNorm whose gain is 1 + weight) or `"none"`
    (`NO_NORM`).
    """

    kind: str
    module: nn.Module
    eps: float

    @property
    def weight(self) -> Tensor:
        """The module's weight, [D], or [K] for the norm of a query or a key."""
        return self.module.weight

    def gain(self, dtype: torch.dtype) -> Tensor:
        """The factors of the normalised values, of the shape of `weight`."""
        weight = self.weight.detach().to(dtype)
        return 1 + weight if self.kind == "rms_offset" else weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of a LayerNorm, [D]."""
        return getattr(self.module, "bias", None)


NO_NORM = NormSpec("none", nn.Identity(), 0.0)  # where a layer reads its stream as it is


@dataclass(frozen=True)
class LinearSpec:
    """A linear module, or some columns of its output: x @ weight + bias."""

    module: nn.Module
    weight: Tensor  # [in, out]
    bias: Tensor | None  # [out]

    def inputs_first(self, tensor: Tensor) -> Tensor:
        """View a tensor of the shape of `module.weight`, such as its gradient, as [in, out]."""
        return tensor.t() if isinstance(self.module, nn.Linear) else tensor


@dataclass(frozen=True)
class ProjectionSpec:
    """How the queries, the keys or the values of a layer's heads are made.

    One module may make all three. The columns of head i in the output of `module` are then block `first + step * i`, in
    blocks of K columns.
    """

    module: nn.Module
    weight: Tensor  # [H, D, K], or [G, D, K] for keys and values
    bias: Tensor | None  # [H, K] or [G, K]
    first: int = 0
    step: int = 1


@dataclass(frozen=True)
class LayerSpec:
    """One layer: attention and MLP, each behind a norm.

    A head computes softmax(scale · q kᵀ) v, with q, k and v from norm(read), and writes through its rows of `out`. The
    MLP computes down(act(up(x))), or down(act(gate(x)) · up(x)) where it has a gate, with x = norm(read). What both
    write is multiplied by `multiplier`. Where a norm comes after them, a head writes its share of the normed sum of all
    heads: they are divided by the same number.

    A field with a default is an option. A consumer lists the options that it supports, and `check_supported` refuses a
    model that sets another one.
    """

    layer: nn.Module
    attention: nn.Module
    attention_norm: NormSpec
    query: ProjectionSpec
    key: ProjectionSpec
    value: ProjectionSpec
    scale: float  # factor of the attention scores
    out: LinearSpec  # [H * K, D]
    mlp: nn.Module
    mlp_norm: NormSpec
    activation: str  # as a Hugging Face configuration names it
    up: LinearSpec  # [D, F]
    down: LinearSpec  # [F, D]
    gate: LinearSpec | None = None  # [D, F]
    query_norm: NormSpec | None = None  # of each head's query, before positions are applied
    key_norm: NormSpec | None = None
    norms_all_heads: bool = False  # the norms of queries and keys are over all heads of the layer together
    softcap: float | None = None  # c: scores become c · tanh(scores / c)
    attention_out_norm: NormSpec | None = None  # of the sum of what all heads write
    mlp_out_norm: NormSpec | None = None  # of what the MLP writes
    rotary_kind: str | None = None  # third argument of `rotary`, where layers differ in their rotary positions
    multiplier: float = 1.0  # factor of what heads and MLP write
    window: int | None = None  # a token attends to this many tokens at most, itself included; None: to all before it
    dropouts: tuple[nn.Module, ...] = ()  # of what attention and MLP write, in training

    @property
    def n_heads(self) -> int:
        """Query heads, H."""
        return len(self.query.weight)

    @property
    def head_width(self) -> int:
        """Width of a query, K."""
        return self.query.weight.shape[2]

    @property
    def queries_per_key(self) -> int:
        """How many query heads share one key and one value (1 without grouped-query attention)."""
        return len(self.query.weight) // len(self.key.weight)

    @property
    def w_o(self) -> Tensor:
        """The output projection by head, [H, K, D]."""
        return self.out.weight.unflatten(0, (self.n_heads, -1))

    @property
    def norms(self) -> list[NormSpec]:
        """All norms of the layer."""
        before, inside = (self.attention_norm, self.mlp_norm), (self.query_norm, self.key_norm)
        after = self.attention_out_norm, self.mlp_out_norm
        return [norm for norm in (*before, *inside, *after) if norm is not None]


@dataclass(frozen=True)
class Head:
    """What is done to the product of hidden states and unembedding to get logits: division, and then a cap."""

    divisor: float = 1.0
    softcap: float | None = None  # c: logits x become c · tanh(x / c)

    @property
    def is_plain(self) -> bool:
        """Whether the product itself are the logits."""
        return self == PLAIN_HEAD

    def logits(self, product: Tensor) -> Tensor:
        """The logits."""
        if self.divisor != 1:
            product = product / self.divisor
        return product if self.softcap is None else self.softcap * torch.tanh(product / self.softcap)


PLAIN_HEAD = Head()


@dataclass(frozen=True)
class ModelSpec:
    """A whole model: embedding, layers, final norm, unembedding. Fields with a default are options, as in a layer."""

    family: str  # the configuration's `model_type`
    embedding: Tensor  # [V, D]
    layers: list[LayerSpec]
    final_norm: NormSpec
    unembedding: Tensor  # [V, D]
    max_positions: int  # tokens that the model has positions for
    positions: Tensor | None = None  # learned, [max_positions, D]
    embedding_scale: float = 1.0  # factor of the token embeddings
    rotary: nn.Module | None = None  # Hugging Face's module, which knows all kinds of scaling: (x, ids) -> (cos, sin)
    unembedding_bias: Tensor | None = None  # [V]
    head: Head = PLAIN_HEAD  # how logits are made
    parallel: bool = False  # attention and MLP of a layer read the same residual stream

    @property
    def n_heads(self) -> int:
        """Query heads of each layer, H."""
        return self.layers[0].n_heads

    @property
    def width(self) -> int:
        """Width of the residual stream, D."""
        return self.embedding.shape[1]

    @property
    def rotary_kinds(self) -> list[str | None]:
        """The kinds of rotary positions, each once; [None] if layers do not differ."""
        return list(dict.fromkeys(layer.rotary_kind for layer in self.layers))

    @property
    def rotary_by_length(self) -> bool:
        """Whether the rotary positions of a token differ with the length of its text."""
        kinds = getattr(self.rotary, "rope_type", "default")
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        return any(kind == "longrope" or "dynamic" in kind for kind in kinds)

    def graph(self, split_qkv: bool = False) -> EdgeGraph:
        """The graph of this model's edges."""
        return EdgeGraph(len(self.layers), self.n_heads, split_qkv, self.parallel)


@dataclass(frozen=True)
class Family:
    """One row of the registry: how to recognise the models of a family, and how to describe one."""

    model_type: str  # of the Hugging Face configuration
    model_class: str  # its name in transformers, where it is loaded only when it is used
    layer_list: str  # name of the list of layers, as it stands before a layer's number in the names of weights
    describe: Callable[[nn.Module], ModelSpec]
    # from the configuration alone: are attention and MLP parallel, and which option, if any, cannot be described
    parallel: Callable[[PreTrainedConfig], bool] = lambda config: False
    refuse: Callable[[PreTrainedConfig], str | None] = lambda config: None
    # likewise: how logits are made of the product of the last hidden state and the output embedding
    head: Callable[[PreTrainedConfig], Head] = lambda config: PLAIN_HEAD


def linear(module: nn.Module) -> LinearSpec:
    """Describe a linear module. Raises `UserError` for a module that computes more, such as a LoRA adapter."""
    kind = getattr(type(module), "stands_for", type(module))  # a module of a model with cut edges keeps its weights
    if kind not in (nn.Linear, Conv1D):
        kind = f"{type(module).__module__}.{type(module).__name__}"
        raise UserError(
            f"the model has a {kind} where a plain linear layer is needed. Merge adapters and undo quantisation first."
        )
    weight = module.weight.t() if kind is nn.Linear else module.weight  # Conv1D stores [in, out]
    return LinearSpec(module, weight, module.bias)


def columns(one: LinearSpec, start: int, end: int) -> LinearSpec:
    """The part of a linear module that computes some columns of its output."""
    return LinearSpec(one.module, one.weight[:, start:end], None if one.bias is None else one.bias[start:end])


def projection(made_by: LinearSpec, heads: int, head_width: int, first: int = 0, step: int = 1) -> ProjectionSpec:
    """The queries, keys or values of `heads` heads in the output of a linear module; see `ProjectionSpec`."""
    blocks = slice(first, first + step * (heads - 1) + 1, step)
    weight = made_by.weight.unflatten(1, (-1, head_width)).transpose(0, 1)[blocks]
    bias = None if made_by.bias is None else made_by.bias.view(-1, head_width)[blocks]
    return ProjectionSpec(made_by.module, weight, bias, first, step)


def refuse_layer_types(config: PreTrainedConfig) -> str | None:
    """For `Family.refuse`: attention of a kind other than full and sliding, which no description has a field for."""
    for kind in config.layer_types:
        if kind not in ("full_attention", "sliding_attention"):
            return (
                f"this {config.model_type} model's layer_types names {kind!r}, and only full_attention and "
                "sliding_attention are supported. Use another model."
            )
    return None


def _options(spec: ModelSpec) -> Iterator[str]:
    """Names of all options that a model sets to something other than their default."""
    for part in (spec, *spec.layers):
        for field in fields(part):
            value = getattr(part, field.name)
            same = value == field.default if isinstance(value, int | float | str | Head) else value is field.default
            if field.default is not MISSING and not same:
                yield field.name


def check_supported(spec: ModelSpec, consumer: str, options: Collection[str], norms: Collection[str]) -> None:
    """Raise a `UserError` if a model sets an option, or has a kind of norm, that a consumer does not support.

    An option that is new in `LayerSpec` or `ModelSpec` is refused by every consumer until that one lists it.

    Args:
        spec: the model.
        consumer: what would use it, as the subject of the error's sentence.
        options: names of the options that the consumer supports.
        norms: the kinds of norms that it supports.
    """
    for option in _options(spec):
        if option not in options:
            raise UserError(
                f"{consumer} does not support {option!r}, which this {spec.family} model has. Use another model."
            )
    for norm in (spec.final_norm, *(norm for layer in spec.layers for norm in layer.norms)):
        if norm.kind not in norms:
            known = " and ".join(sorted(norms))
            raise UserError(
                f"{consumer} does not support norms of kind {norm.kind!r}, only {known}. Use another model."
            )
