"""The computations of one layer, built from its description: what heads and MLP compute from what they read.

Shapes: B batch, T position, N tokens = B * T, H query heads, G key heads, D model width, K head width, F MLP width,
R readers of the layer's heads: H, or 3H with `split_qkv`, where a head's query, key and value read separately, r
rotated components of a head.

A block stops before its two output projections, `w_o` and `w_down`. The masked pass applies those, straight into its
stack of node outputs, so that nothing is copied and autograd saves nothing for them. The pass also calls `qkv`, the
norm before attention with the projections after it.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuit_breaking.engine.network import Rotary
from circuit_breaking.engine.norms import NORMS, Norm, NormedProjection, OutputNorm, PlainProjection, centre
from circuit_breaking.engine.weights import WeightSource
from circuit_breaking.models.activations import activation
from circuit_breaking.models.families.spec import (
    LayerSpec,
    LinearSpec,
    ModelSpec,
    NormSpec,
    ProjectionSpec,
    check_supported,
)

OPTIONS = {  # of a description, those that the engine supports
    "gate", "query_norm", "key_norm", "norms_all_heads", "softcap", "attention_out_norm", "mlp_out_norm",
    "rotary_kind", "multiplier", "window", "positions", "embedding_scale", "rotary", "unembedding_bias",
    "head", "parallel", "dropouts",
}  # fmt: skip


def make_blocks(
    spec: ModelSpec, split_qkv: bool, source: WeightSource, devices: Sequence[torch.device] | None = None
) -> nn.ModuleList:
    """The blocks of a model, one after the other, on the device of `source` or each on its own of `devices`.

    With `source.release`, the description of each layer is dropped from `spec.layers`, and the layer's weights are
    freed, as soon as its block is made.

    Raises:
        UserError: the model has an option that the blocks do not compute.
    """
    check_supported(spec, "the edge-masked transformer", OPTIONS, NORMS)
    kinds, blocks = spec.rotary_kinds, nn.ModuleList()
    for index, layer in enumerate(spec.layers):
        own = source if devices is None else replace(source, device=devices[index])
        blocks.append(Block(layer, split_qkv, own, kinds.index(layer.rotary_kind)))
        if source.release:
            spec.layers[index] = None  # it holds views of the weights
            source.done_with(layer.layer)
    return blocks


def biases_of(blocks: nn.ModuleList, n_heads: int, device: torch.device) -> Tensor:
    """What each node writes whatever it reads: [P, 1, D]."""
    biases = [torch.zeros_like(blocks[0].b_down, device=device)[None]]  # of `embed`
    for block in blocks:
        head, mlp = (one.to(device) for one in block.constants)
        biases += [head.expand(n_heads, -1), mlp[None]]
    return torch.cat(biases)[:, None]


class Block(nn.Module):
    """One layer. Its weights are shared with the Hugging Face model, except for queries, keys and values.

    Every query head reads its keys and values from its own masked residual stream. So where heads share keys and values
    (grouped-query attention), the shared projection is applied once for each query head.

    Args:
        layer: its description.
        split_qkv: a head's query, key and value read separately.
        source: how its weights are taken over.
        rotary_kind: number of the layer's kind of rotary positions.
    """

    def __init__(self, layer: LayerSpec, split_qkv: bool, source: WeightSource, rotary_kind: int = 0) -> None:
        super().__init__()
        self.split, self.scale, self.rotary_kind = split_qkv, layer.scale, rotary_kind
        self.window, self.softcap = layer.window, layer.softcap
        self.qkv = project_qkv(layer, split_qkv, source)
        self.norms_all_heads = layer.norms_all_heads
        self.query_norm = None if layer.query_norm is None else Norm(layer.query_norm, source)
        self.key_norm = None if layer.key_norm is None else Norm(layer.key_norm, source)
        if self.norms_all_heads and layer.queries_per_key > 1:
            gain = self.key_norm.weight.view(-1, layer.head_width)
            self.key_norm.weight = gain.repeat_interleave(layer.queries_per_key, 0).flatten()
        after = layer.attention_out_norm, layer.mlp_out_norm
        self.attention_out_norm, self.mlp_out_norm = (None if one is None else OutputNorm(one, source) for one in after)
        self.register_buffer("w_o", source.take(layer.w_o))  # [H, K, D]
        self.multiplier = layer.multiplier
        b_o, b_down = (source.precise(bias_of(one)) for one in (layer.out, layer.down))
        # a head's share of the bias, [D]
        self.register_buffer("b_o", source.take(self.multiplied(b_o / layer.n_heads)))
        self.mlp_norm = Norm(layer.mlp_norm, source)
        self.act = activation(layer.activation)
        for name, one in (("gate", layer.gate), ("up", layer.up)):  # [D, F] and [F]
            self.register_buffer(f"w_{name}", None if one is None else source.take(one.weight))
            self.register_buffer(f"b_{name}", None if one is None or one.bias is None else source.take(one.bias))
        self.register_buffer("w_down", source.take(layer.down.weight))  # [F, D]
        self.register_buffer("b_down", source.take(self.multiplied(b_down)))

    def multiplied(self, x: Tensor) -> Tensor:
        """x times the layer's factor of what it writes."""
        return x if self.multiplier == 1 else x * self.multiplier

    def attention(self, qkv: Tensor, batch: int, rotary: Rotary | None) -> Tensor:
        """The attention-weighted values of every head, before its output projection.

        Args:
            qkv: [H, N, 3K], or [3H, N, K] in the order q, k, v of each head with `split_qkv`.
            batch: number of texts, B.
            rotary: cos and sin [kinds, T, r]; None for a model without rotary positions.

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
        q, k = self.normed(q, self.query_norm), self.normed(k, self.key_norm)
        if rotary is not None:
            cos, sin = (table[self.rotary_kind] for table in rotary)
            q, k = (rotate_halves(x, cos, sin) for x in (q, k))
        z = self.multiplied(attend(q, k, v, self.scale, self.window, self.softcap))
        return z.transpose(0, 1).reshape(z.shape[1], tokens, z.shape[-1])

    def normed(self, x: Tensor, norm: Norm | None) -> Tensor:
        """Queries or keys [B, H, T, K] after their norm: of each head, or of all together."""
        if norm is None or not self.norms_all_heads:
            return x if norm is None else norm(x)
        # where heads share a key, each of them has its own copy of it, which counts once for each head
        return norm(x.transpose(1, 2).flatten(-2)).unflatten(-1, x.shape[1::2]).transpose(1, 2)

    @property
    def constants(self) -> tuple[Tensor, Tensor]:
        """What each head, and the MLP, writes whatever it reads: [D] each. Norms after them leave nothing fixed."""
        heads, mlp = self.attention_out_norm, self.mlp_out_norm
        return tuple(b if norm is None else torch.zeros_like(b) for b, norm in ((self.b_o, heads), (self.b_down, mlp)))

    def mlp(self, read: Tensor) -> Tensor:
        """The hidden layer of the MLP, before its output projection: [N, D] -> [N, F]."""
        x = self.mlp_norm(read)
        up = F.linear(x, self.w_up.t(), self.b_up)
        hidden = self.act(up) if self.w_gate is None else self.act(F.linear(x, self.w_gate.t(), self.b_gate)) * up
        return self.multiplied(hidden)


def project_qkv(layer: LayerSpec, split_qkv: bool, source: WeightSource) -> NormedProjection | PlainProjection:
    """The norm before attention and the projections to queries, keys and values, with the norm's weights folded in.

    They are folded in float32 or better, and rounded to the type of the model once, one projection at a time. A key or
    value that query heads share is repeated for each of them.
    """
    norm, (heads, width, k) = layer.attention_norm, layer.query.weight.shape
    by_head, axis = ((heads, 3, width, k), 1) if split_qkv else ((heads, width, 3, k), 2)
    weight = torch.empty(by_head, dtype=source.dtype, device=source.device)
    bias = weight.new_empty(heads, 3, 1, k) if split_qkv else weight.new_empty(heads, 1, 3, k)
    for number, one in enumerate((layer.query, layer.key, layer.value)):
        for whole, part in zip((weight, bias), folded(one, norm, source), strict=True):
            whole.select(axis, number).unflatten(0, (len(part), -1)).copy_(part[:, None])
    weight, bias = (x.flatten(axis - 1, axis) if split_qkv else x.flatten(axis) for x in (weight, bias))
    if norm.kind == "none":
        return PlainProjection(weight, bias)
    return NormedProjection(weight, bias, norm.eps, centred=norm.kind == "layer")


def folded(one: ProjectionSpec, norm: NormSpec, source: WeightSource) -> tuple[Tensor, Tensor]:
    """A projection's weight [G, D, K] times the gain of the norm before it, and its bias [G, 1, K] with the norm's."""
    weight = source.precise(one.weight)
    bias = weight.new_zeros(len(weight), 1, weight.shape[2]) if one.bias is None else source.precise(one.bias)[:, None]
    if norm.bias is not None:  # contiguous, so that the rounding does not depend on the family's layout
        bias = bias + source.precise(norm.bias)[None] @ weight.contiguous()
    if norm.kind != "none":
        weight = source.precise(norm.gain(weight.dtype))[:, None] * weight
    return centre(weight) if norm.kind == "layer" else weight, bias


def bias_of(one: LinearSpec) -> Tensor:
    """The bias of a linear module [out], zeros where it has none."""
    return one.weight.new_zeros(one.weight.shape[1]) if one.bias is None else one.bias.detach()


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """The attention-weighted values of every head: [B, H, T, K].

    Args:
        q, k, v: queries, keys and values, [B, H, T, K].
        scale: factor of the attention scores.
        window: how many tokens a token attends to at most, itself included; None for all before it.
        softcap: c, if scores are capped to c · tanh(scores / c).
    """
    length = q.shape[2]
    if softcap is not None:  # which no fused kernel computes
        scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
        scores = scores.masked_fill(~visible(length, window, q.device), float("-inf"))
        return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v
    if window is None or window >= length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible(length, window, q.device), scale=scale)


def visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Which tokens (columns) a token (row) attends to: bool [T, T]."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal if window is None else causal.triu(1 - window)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding (Su et al. 2021) in Llama's layout to x [..., T, K], with cos and sin [T, r].

    Only the first r components are rotated (r < K in GPT-NeoX).
    """
    turned = x[..., : cos.shape[-1]]
    first, second = turned.chunk(2, -1)
    # OLMo 2 has its tables in float32 whatever the model's type, and rotates in that
    turned = (turned * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
    return turned if turned.shape == x.shape else torch.cat((turned, x[..., cos.shape[-1] :]), -1)
