"""The parts of a transformer that differ between families: what heads and MLPs compute from what they read (layer 1).

Shapes: B batch, T position, N tokens = B * T, H heads, R head readers (H, or 3H with `split_qkv`), D width, K head
width, F MLP width, V vocabulary.

A block stops short of its two output projections, `w_o` and `w_down`: the engine applies those itself, straight into
its stack of node outputs, so that nothing is copied and autograd keeps nothing for them. It also calls `qkv`, the norm
before attention and the projections after it, itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from circuit_breaking.engine.norms import NormedProjection, rms_norm
from circuit_breaking.errors import UserError

# One fused kernel instead of the chain of elementwise products that Hugging Face writes out
FUSED_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


Linear = tuple[Tensor, Tensor]  # weight [in, out] and bias [out]


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function that a Hugging Face configuration names."""
    return FUSED_ACTIVATIONS.get(name) or ACT2FN[name]


Placing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # what positions do to queries and keys [B, H, T, K]


def attend(qkv: Tensor, batch: int, split: bool, place: Placing | None, scale: float) -> Tensor:
    """Causal attention of every head on its own queries, keys and values.

    `qkv` is [H, N, 3K], or [3H, N, K] in the order q, k, v of each head when `split`. Returns [H, N, K].
    """
    if split:
        readers, tokens, width = qkv.shape
        parts = qkv.view(readers // 3, 3, batch, tokens // batch, width).unbind(1)
    else:
        heads, tokens, width = qkv.shape
        parts = qkv.view(heads, batch, tokens // batch, width).chunk(3, -1)
    q, k, v = (part.transpose(0, 1) for part in parts)  # [B, H, T, K]
    if place is not None:
        q, k = place(q, k)
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return z.transpose(0, 1).reshape(z.shape[1], tokens, z.shape[-1])


def reader_weights(parts: list[Tensor], split: bool) -> Tensor:
    """Query, key and value projections [H, D, K] (biases [H, 1, K]) as one matrix a reader.

    Returns [H, D, 3K], or [3H, D, K] when `split`.
    """
    return torch.stack(parts, 1).flatten(0, 1).contiguous() if split else torch.cat(parts, -1).contiguous()


class LayerNormBlock(nn.Module):
    """One layer of GPT-2 or GPT-NeoX: LayerNorm, biases everywhere, rotary positions or none.

    Args:
        norms: the LayerNorm modules before attention and before the MLP.
        weights, biases: of queries, keys and values, [3, H, D, K] and [3, H, 1, K].
        out, up, down: weight (last index: what it writes) and bias of attention's output projection and the MLP's two.
        act: activation of the MLP, as the configuration names it.
        scale: factor of the attention scores.
        split_qkv: queries, keys and values read apart.
    """

    def __init__(
        self, norms: tuple[nn.LayerNorm, nn.LayerNorm], weights: Tensor, biases: Tensor, out: Linear, up: Linear,
        down: Linear, act: str, scale: float, split_qkv: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        first, second = norms
        _, heads, d, width = weights.shape
        self.split, self.eps, self.shape, self.scale = split_qkv, second.eps, (d,), scale
        self.act = activation(act)
        biases = biases + first.bias.detach()[None] @ weights
        weights = first.weight.detach()[:, None] * weights
        weight, bias = (reader_weights(list(parts), split_qkv) for parts in (weights, biases))
        self.qkv = NormedProjection(weight, bias, first.eps, centred=True)
        self.register_buffer("w_o", out[0].reshape(heads, width, d))
        self.register_buffer("b_o", out[1] / heads)
        self.register_buffer("g_2", second.weight.detach())
        self.register_buffer("b_2", second.bias.detach())
        self.register_buffer("w_up", up[0])
        self.register_buffer("b_up", up[1])
        self.register_buffer("w_down", down[0])
        self.register_buffer("b_down", down[1])

    def attention(self, qkv: Tensor, batch: int, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Attention-weighted values of every head, before its output projection, from its queries, keys and values."""
        place = None if rotary is None else partial(rotate_both, cos=rotary[0], sin=rotary[1])
        return attend(qkv, batch, self.split, place, self.scale)

    def mlp(self, read: Tensor) -> Tensor:
        """Hidden layer of the MLP, before its output projection: [N, D] -> [N, F]."""
        x = F.layer_norm(read, self.shape, self.g_2, self.b_2, self.eps)
        return self.act(torch.addmm(self.b_up, x, self.w_up))


def gpt2_block(layer: nn.Module, config, index: int, split_qkv: bool) -> LayerNormBlock:
    """A GPT-2 layer. (`reorder_and_upcast_attn` only says how Hugging Face computes the same attention.)"""
    d, heads = config.n_embd, config.n_head
    width = d // heads
    scale = width**-0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= index + 1
    attention, mlp = layer.attn, layer.mlp
    weights = attention.c_attn.weight.detach().view(d, 3, heads, width).permute(1, 2, 0, 3)
    biases = attention.c_attn.bias.detach().view(3, heads, 1, width)
    out, up, down = ((m.weight.detach(), m.bias.detach()) for m in (attention.c_proj, mlp.c_fc, mlp.c_proj))
    return LayerNormBlock(
        (layer.ln_1, layer.ln_2), weights, biases, out, up, down, config.activation_function, scale, split_qkv
    )


def neox_block(layer: nn.Module, config, split_qkv: bool) -> LayerNormBlock:
    """A GPT-NeoX layer, whose fused projection holds query, key and value of one head after another."""
    attention, mlp = layer.attention, layer.mlp
    qkv, d, heads = attention.query_key_value, config.hidden_size, config.num_attention_heads
    weights = qkv.weight.detach().view(heads, 3, -1, d).permute(1, 0, 3, 2)
    biases = bias_of(qkv).view(heads, 3, 1, -1).transpose(0, 1)
    linears = attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h
    out, up, down = ((linear.weight.detach().t(), bias_of(linear)) for linear in linears)
    norms = layer.input_layernorm, layer.post_attention_layernorm
    return LayerNormBlock(norms, weights, biases, out, up, down, config.hidden_act, attention.scaling, split_qkv)


class LlamaBlock(nn.Module):
    """One layer of Llama, Mistral or Qwen: RMSNorm, rotary positions, shared keys and values, gated MLP.

    Every query head reads its keys and values from a residual stream of its own, so a group's projection is applied
    once for each of its query heads. Qwen3 normalises each query and key before it is rotated.
    """

    def __init__(self, layer: nn.Module, config, index: int, split_qkv: bool) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        d, heads = config.hidden_size, config.num_attention_heads
        width = attention.head_dim
        self.split, self.eps = split_qkv, config.rms_norm_eps
        self.scale = attention.scaling
        self.act = activation(config.hidden_act)
        gain = layer.input_layernorm.weight.detach()

        def per_query_head(linear: nn.Linear, tensor: Tensor | None) -> Tensor:
            groups = linear.out_features // width
            tensor = linear.weight.new_zeros(linear.out_features, 1) if tensor is None else tensor.detach()
            return tensor.view(groups, width, -1).repeat_interleave(heads // groups, 0).transpose(1, 2)

        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        weights = [gain[:, None] * per_query_head(linear, linear.weight) for linear in projections]  # [H, D, K]
        biases = [per_query_head(linear, linear.bias) for linear in projections]  # [H, 1, K]
        weight, bias = (reader_weights(parts, split_qkv) for parts in (weights, biases))
        self.qkv = NormedProjection(weight, bias, config.rms_norm_eps, centred=False)
        self.register_buffer("g_q", attention.q_norm.weight.detach() if hasattr(attention, "q_norm") else None)
        self.register_buffer("g_k", attention.k_norm.weight.detach() if hasattr(attention, "k_norm") else None)
        self.register_buffer("w_o", attention.o_proj.weight.detach().t().reshape(heads, width, d))
        self.register_buffer("b_o", bias_of(attention.o_proj) / heads)
        self.register_buffer("g_2", layer.post_attention_layernorm.weight.detach())
        self.register_buffer("w_gate", mlp.gate_proj.weight.detach())
        self.register_buffer("w_up", mlp.up_proj.weight.detach())
        self.register_buffer("b_gate", None if mlp.gate_proj.bias is None else mlp.gate_proj.bias.detach())
        self.register_buffer("b_up", None if mlp.up_proj.bias is None else mlp.up_proj.bias.detach())
        self.register_buffer("w_down", mlp.down_proj.weight.detach().t())
        self.register_buffer("b_down", bias_of(mlp.down_proj))

    def attention(self, qkv: Tensor, batch: int, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Attention-weighted values of every head, before its output projection, from its queries, keys and values."""

        def place(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            if self.g_q is not None:
                q, k = (rms_norm(x, gain, self.eps) for x, gain in ((q, self.g_q), (k, self.g_k)))
            return rotate_both(q, k, *rotary)

        return attend(qkv, batch, self.split, place, self.scale)

    def mlp(self, read: Tensor) -> Tensor:
        """Hidden layer of the MLP, before its output projection: [N, D] -> [N, F]."""
        x = rms_norm(read, self.g_2, self.eps)
        return self.act(F.linear(x, self.w_gate, self.b_gate)) * F.linear(x, self.w_up, self.b_up)


def bias_of(linear: nn.Linear) -> Tensor:
    """The bias of a linear layer, zeros [out] where it has none."""
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()


def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys with their positions put in."""
    return rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) in Llama's layout: x [..., T, K]; cos and sin [T, r], r <= K.

    GPT-NeoX rotates the first r components only.
    """
    turned = x[..., : cos.shape[-1]]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-second, first), -1) * sin
    return turned if turned.shape == x.shape else torch.cat((turned, x[..., cos.shape[-1] :]), -1)


class Norm(nn.Module):
    """LayerNorm, or RMSNorm where `kind` says so, with frozen weights and in the model's own precision throughout.

    (Hugging Face's RMSNorm goes through float32 whatever the model's type, which is too coarse for float64.)
    """

    def __init__(self, kind: str, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., D]."""
        if self.kind == "rms":
            return rms_norm(x, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass
class Parts:
    """What the engine needs of a model of any family."""

    blocks: list[nn.Module]
    embedding: Tensor  # [V, D]
    positions: Tensor | None  # [max T, D], learned; None where positions are rotary
    rotary: nn.Module | None  # Hugging Face's own module, so that every kind of scaling is right
    norm: Norm  # final norm
    unembedding: Tensor  # [V, D]
    unembedding_bias: Tensor | None
    max_positions: int
    parallel: bool = False  # attention and MLP read the same stream


def _gpt2(hf: nn.Module, split_qkv: bool) -> Parts:
    config, body = hf.config, hf.transformer
    if config.add_cross_attention:
        raise UserError("this GPT-2 has cross-attention, which the graph does not describe. Use a plain GPT-2.")
    blocks = [gpt2_block(layer, config, index, split_qkv) for index, layer in enumerate(body.h)]
    norm = Norm("layer", body.ln_f.weight, body.ln_f.bias, config.layer_norm_epsilon)
    return Parts(
        blocks, body.wte.weight, body.wpe.weight, None, norm, hf.lm_head.weight, hf.lm_head.bias,
        config.n_positions,
    )  # fmt: skip


def _llama(hf: nn.Module, split_qkv: bool) -> Parts:
    config, body = hf.config, hf.model
    blocks = [LlamaBlock(layer, config, index, split_qkv) for index, layer in enumerate(body.layers)]
    norm = Norm("rms", body.norm.weight, None, config.rms_norm_eps)
    return Parts(
        blocks, body.embed_tokens.weight, None, body.rotary_emb, norm, hf.lm_head.weight, hf.lm_head.bias,
        min(config.max_position_embeddings, sliding_window(config) or config.max_position_embeddings),
    )  # fmt: skip


def sliding_window(config) -> int | None:
    """Tokens that the attention of some layer is limited to, where that is fewer than all before.

    Up to that many it is plain causal attention, so longer texts are refused and shorter ones are exact.
    """
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if kinds is None or "sliding_attention" in kinds else None


def _neox(hf: nn.Module, split_qkv: bool) -> Parts:
    config, body = hf.config, hf.gpt_neox
    blocks = [neox_block(layer, config, split_qkv) for layer in body.layers]
    last = body.final_layer_norm
    return Parts(
        blocks, body.embed_in.weight, None, body.rotary_emb, Norm("layer", last.weight, last.bias, last.eps),
        hf.lm_head.weight, hf.lm_head.bias, config.max_position_embeddings, parallel=config.use_parallel_residual,
    )  # fmt: skip


# Hugging Face `model_type` -> how to take that family apart
FAMILIES: dict[str, Callable[[nn.Module, bool], Parts]] = {
    "gpt2": _gpt2,
    "gpt_neox": _neox,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
}


def take_apart(hf: nn.Module, split_qkv: bool) -> Parts:
    """The parts of a Hugging Face causal language model. Raises `UserError` for a family that is not known here."""
    family = getattr(getattr(hf, "config", None), "model_type", type(hf).__name__)
    if family not in FAMILIES or not hasattr(hf, "lm_head"):
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"a {type(hf).__name__} of family {family!r} is not supported. Known causal models: {known}.")
    return FAMILIES[family](hf, split_qkv)
