"""The computations of one layer, built from its description: what heads and MLP compute from what they read.

Shapes: B batch, T position, N tokens = B * T, H query heads, G key heads, D model width, K head width, F MLP width,
R readers of the layer's heads: H, or 3H with `split_qkv`, where a head's query, key and value read separately.

A block stops before its two output projections, `w_o` and `w_down`. The masked pass applies those, straight into its
stack of node outputs, so that nothing is copied and autograd saves nothing for them. The pass also calls `qkv`, the
norm before attention with the projections after it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuit_breaking.engine.attention import attend, rotate_halves
from circuit_breaking.engine.norms import NORMS, Norm, NormedProjection
from circuit_breaking.models.activations import activation
from circuit_breaking.models.families.spec import LayerSpec, LinearSpec, ModelSpec, ProjectionSpec, check_supported

OPTIONS = {  # of a description, those that the engine supports
    "gate", "query_norm", "key_norm", "multiplier", "window",
    "positions", "embedding_scale", "rotary", "unembedding_bias", "logit_divisor", "parallel",
}  # fmt: skip
Rotary = tuple[Tensor, Tensor]  # cos and sin [T, r] of the rotary position embedding, r <= K


def make_blocks(spec: ModelSpec, split_qkv: bool) -> nn.ModuleList:
    """The blocks of a model. Raises `UserError` if the model has an option that they do not compute."""
    check_supported(spec, "the edge-masked transformer", OPTIONS, NORMS)
    return nn.ModuleList(Block(layer, split_qkv) for layer in spec.layers)


class Block(nn.Module):
    """One layer. Its weights are shared with the Hugging Face model, except for queries, keys and values.

    Every query head reads its keys and values from its own masked residual stream. So where heads share keys and values
    (grouped-query attention), the shared projection is applied once for each query head.

    Args:
        layer: its description.
        split_qkv: a head's query, key and value read separately.
    """

    def __init__(self, layer: LayerSpec, split_qkv: bool) -> None:
        super().__init__()
        self.split, self.scale, self.window = split_qkv, layer.scale, layer.window
        self.qkv = project_qkv(layer, split_qkv)
        self.query_norm = None if layer.query_norm is None else Norm(layer.query_norm)
        self.key_norm = None if layer.key_norm is None else Norm(layer.key_norm)
        self.register_buffer("w_o", layer.w_o.detach())  # [H, K, D]
        self.multiplier = layer.multiplier
        self.register_buffer(
            "b_o", self.multiplied(bias_of(layer.out) / layer.n_heads)
        )  # a head's share of the bias, [D]
        self.mlp_norm = Norm(layer.mlp_norm)
        self.act = activation(layer.activation)
        for name, one in (("gate", layer.gate), ("up", layer.up)):  # [D, F] and [F]
            self.register_buffer(f"w_{name}", None if one is None else one.weight.detach())
            self.register_buffer(f"b_{name}", None if one is None or one.bias is None else one.bias.detach())
        self.register_buffer("w_down", layer.down.weight.detach())  # [F, D]
        self.register_buffer("b_down", self.multiplied(bias_of(layer.down)))

    def multiplied(self, x: Tensor) -> Tensor:
        """x times the layer's factor of what it writes."""
        return x if self.multiplier == 1 else x * self.multiplier

    def attention(self, qkv: Tensor, batch: int, rotary: Rotary | None) -> Tensor:
        """The attention-weighted values of every head, before its output projection.

        Args:
            qkv: [H, N, 3K], or [3H, N, K] in the order q, k, v of each head with `split_qkv`.
            batch: number of texts, B.
            rotary: cos and sin; None for a model without rotary positions.

        Returns:
            [H, N, K].
        """
        if self.split:
            readers, tokens, width = qkv.shape
            parts = qkv.view(readers // 3, 3, batch, tokens // batch, width).unbind(1)
        else:
            heads, tokens, width = qkv.shape
            parts = qkv.view(heads, batch, tokens // batch, width).chunk(3, -1)
        q, k, v = (part.transpose(0, 1) for part in parts)  # [B, H, T, K]
        if self.query_norm is not None:
            q = self.query_norm(q)
        if self.key_norm is not None:
            k = self.key_norm(k)
        if rotary is not None:
            q, k = (rotate_halves(x, *rotary) for x in (q, k))
        z = self.multiplied(attend(q, k, v, self.scale, self.window))
        return z.transpose(0, 1).reshape(z.shape[1], tokens, z.shape[-1])

    def mlp(self, read: Tensor) -> Tensor:
        """The hidden layer of the MLP, before its output projection: [N, D] -> [N, F]."""
        x = self.mlp_norm(read)
        up = F.linear(x, self.w_up.t(), self.b_up)
        hidden = self.act(up) if self.w_gate is None else self.act(F.linear(x, self.w_gate.t(), self.b_gate)) * up
        return self.multiplied(hidden)


def project_qkv(layer: LayerSpec, split_qkv: bool) -> NormedProjection:
    """The norm before attention and the projections to queries, keys and values, with the norm's weights folded in.

    They are folded in float32 or better, and rounded to the type of the model once.
    """
    norm, kind = layer.attention_norm, layer.query.weight.dtype
    precise = torch.promote_types(kind, torch.float32)
    gain = norm.gain(precise)
    weights, biases = [], []
    for one in (layer.query, layer.key, layer.value):
        weight, bias = (tensor.to(precise) for tensor in per_query_head(one, layer.n_heads))
        bias = bias[:, None]
        if norm.bias is not None:  # contiguous, so that the rounding does not depend on the family's layout
            bias = bias + norm.bias.detach()[None].to(precise) @ weight.contiguous()
        weights.append(gain[:, None] * weight)
        biases.append(bias)
    weight, bias = (by_reader(parts, split_qkv) for parts in (weights, biases))
    return NormedProjection(weight, bias, norm.eps, centred=norm.kind == "layer").to(kind)


def per_query_head(one: ProjectionSpec, heads: int) -> tuple[Tensor, Tensor]:
    """The weight [H, D, K] and bias [H, K] of a projection, repeated for query heads that share a key or a value."""
    weight = one.weight.detach()
    bias = weight.new_zeros(len(weight), weight.shape[2]) if one.bias is None else one.bias.detach()
    shared_by = heads // len(weight)
    if shared_by > 1:
        weight, bias = (tensor.repeat_interleave(shared_by, 0) for tensor in (weight, bias))
    return weight, bias


def by_reader(parts: list[Tensor], split_qkv: bool) -> Tensor:
    """Query, key and value projections [H, D, K] (or their biases [H, 1, K]) as one matrix for each reader.

    Returns [H, D, 3K], or [3H, D, K] with `split_qkv`.
    """
    return torch.stack(parts, 1).flatten(0, 1).contiguous() if split_qkv else torch.cat(parts, -1).contiguous()


def bias_of(one: LinearSpec) -> Tensor:
    """The bias of a linear module [out], zeros where it has none."""
    return one.weight.new_zeros(one.weight.shape[1]) if one.bias is None else one.bias.detach()
